"""Which replicas have probably computed which beginnings of prompts.

What a replica's KV cache really holds is not asked: whoever was sent a prompt has its blocks for a
while, and being wrong costs one prefill.
"""

from collections import OrderedDict
from collections.abc import Sequence

BLOCK_TOKENS = 64
"""Tokens of a block: a few of the engine's own, which keeps the index small."""
MOST_BLOCKS = 100_000
"""Blocks that are remembered: 6.4 million tokens of prompts, in 16 MiB if each has one holder."""
MOST_HOLDERS = 64
"""Replicas that are remembered for a block; the latest."""


def fingerprints(token_ids: Sequence[int], cache_salt: str) -> list[int]:
    """Return a hash for each whole block, of its tokens, all tokens before it, and the salt.

    It is the same in all processes, so that all gateway replicas agree on a prompt's home.
    """
    whole = len(token_ids) - len(token_ids) % BLOCK_TOKENS
    before = int.from_bytes(cache_salt.encode())  # `hash` of a text differs between processes
    prints = []
    for start in range(0, whole, BLOCK_TOKENS):
        before = hash((before, *token_ids[start : start + BLOCK_TOKENS]))
        prints.append(before)
    return prints


class PrefixIndex:
    """Remembers the latest blocks; if a block is known, so are all before it in its prompt."""

    def __init__(self, most_blocks: int = MOST_BLOCKS) -> None:
        self._most_blocks = most_blocks
        self._holders: OrderedDict[int, list[str]] = OrderedDict()

    def __len__(self) -> int:
        """Return how many blocks are known."""
        return len(self._holders)

    def known(self, prints: Sequence[int]) -> int:
        """Return how many blocks of a prompt are known."""
        low, high = 0, len(prints)
        while low < high:
            middle = (low + high + 1) // 2
            if prints[middle - 1] in self._holders:
                low = middle
            else:
                high = middle - 1
        return low

    def holders(self, block: int) -> list[str]:
        """Return the holders of a known block; a caller may remove those that are gone."""
        return self._holders[block]

    def add(self, prints: Sequence[int], replica_id: str) -> None:
        """Record that a replica has been sent a prompt."""
        # Last block first, so that a prompt is forgotten from its end.
        for block in reversed(prints):
            holders = self._holders.get(block)
            if holders is None:
                self._holders[block] = [replica_id]
                continue
            self._holders.move_to_end(block)
            if replica_id not in holders:
                holders.append(replica_id)
                if len(holders) > MOST_HOLDERS:
                    del holders[0]
        while len(self._holders) > self._most_blocks:
            self._holders.popitem(last=False)

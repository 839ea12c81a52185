"""The prefix cache of the simulated engine."""

from array import array
from collections import OrderedDict
from collections.abc import Sequence

BLOCK_TOKENS = 16
"""Tokens per block of the prefix cache, as in vLLM."""


class PrefixCache:
    """Which blocks of tokens the KV cache holds; the least recently used are evicted first."""

    def __init__(self, capacity_tokens: int) -> None:
        self._capacity = capacity_tokens // BLOCK_TOKENS
        self._blocks: OrderedDict[int, None] = OrderedDict()

    def match(self, token_ids: Sequence[int], salt: str) -> int:
        """Return how many leading tokens are cached with this salt.

        The last token must always be computed.
        """
        held = 0
        for key in _block_keys(token_ids[:-1], salt):
            if key not in self._blocks:
                break
            self._blocks.move_to_end(key)
            held += BLOCK_TOKENS
        return held

    def add(self, token_ids: Sequence[int], salt: str) -> None:
        """Cache the complete blocks of these tokens with this salt."""
        for key in _block_keys(token_ids, salt):
            self._blocks[key] = None
            self._blocks.move_to_end(key)
        while len(self._blocks) > self._capacity:
            self._blocks.popitem(last=False)


def _block_keys(token_ids: Sequence[int], salt: str) -> list[int]:
    data = array("I", token_ids).tobytes()
    width = BLOCK_TOKENS * 4
    keys = []
    key = hash(salt)
    for end in range(width, len(data) + 1, width):
        key = hash((key, data[end - width : end]))
        keys.append(key)
    return keys

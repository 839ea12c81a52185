"""The simulated engine's model: a hash function over all tokens so far.

The next token is a function of all tokens before it and of the seed, so a generation that is
resumed from its prompt and its tokens so far continues as if nothing had happened, whatever the
sampling. `top_p`, `top_k`, `min_p` and the penalties change nothing; `logit_bias` forces at
100 and forbids at -100, and is ignored in between.
"""

import itertools
import math
import secrets
from array import array
from collections.abc import Sequence
from zlib import crc32

from tera.engine.simulated_vocabulary import SPELLED_CHARACTERS, Vocabulary
from tera.generation import Generation, Sampling, TokenLogprobs

VOCABULARY = Vocabulary()
EOS = Vocabulary.eos_id
_KEYS = [token_id.to_bytes(4, "little") for token_id in range(VOCABULARY.size)]


class _Node(dict[int, "_Node"]):
    """The bytes that can follow the beginning of a character; none if it is complete."""


def _spelling_tree() -> _Node:
    root = _Node()
    for character in SPELLED_CHARACTERS:
        node = root
        for byte in character.encode():
            node = node.setdefault(byte, _Node())
    return root


_ROOT = _spelling_tree()


def _plan() -> tuple[int, ...]:
    # Of 96 tokens, 8 begin a character spelled in bytes (1 in 12), 9 are punctuation, the rest
    # words.
    first_bytes = sorted(_ROOT)
    slots = []
    for index in range(4096):
        turn, part = divmod(index, 96)
        if part < 8:
            slots.append(first_bytes[(turn * 8 + part) % len(first_bytes)])
        elif part < 17:
            slots.append(b",,,,...\n?"[part - 8])
        else:
            slots.append(VOCABULARY.word_ids[(index * 7) % len(VOCABULARY.word_ids)])
    return tuple(slots)


_PLAN = _plan()


class Continuation:
    """The continuation of some token ids: each next token depends on all before it.

    `state` is the CRC-32 of the ids so far, starting from the seed: whether the ids were generated
    or given, the state is the same.
    """

    __slots__ = ("_forbidden", "_forced", "_node", "length", "state")

    def __init__(self, prompt: Sequence[int], resumed: Sequence[int], sampling: Sampling) -> None:
        begin = _seed_state(sampling)
        self.state = crc32(array("I", prompt).tobytes(), begin)
        self.length = 20 + _mix(self.state) % 381
        """How many tokens the text has before its end of sequence."""
        self.state = crc32(array("I", resumed).tobytes(), self.state)
        self._node = _ROOT
        for token_id in [*prompt[-3:], *resumed[-3:]][-3:]:  # no character is longer than 4 bytes
            self._node = self._node.get(token_id) or _ROOT.get(token_id) or _ROOT
        bias = sampling.logit_bias or {}
        forced = [(-value, token_id) for token_id, value in bias.items() if value >= 100]
        self._forced = min(forced)[1] if forced else None
        self._forbidden = frozenset(token_id for token_id, value in bias.items() if value <= -100)

    def next_token(self, may_end: bool) -> int:
        """Return the next token and advance; with `may_end` it is the end of sequence.

        A character that has begun is completed first.
        """
        mixed = _mix(self.state)
        node = self._node
        if node is not _ROOT:
            choices = tuple(node)
            token_id = choices[mixed % len(choices)]
        elif may_end:
            token_id = EOS
        else:
            token_id = _PLAN[mixed & 4095]
        if self._forced is not None:
            token_id = self._forced
        elif token_id in self._forbidden:
            token_id = self._allowed(mixed)
        self.state = crc32(_KEYS[token_id], self.state)
        if token_id < 256:
            self._node = node.get(token_id) or _ROOT.get(token_id) or _ROOT
        else:
            self._node = _ROOT
        return token_id

    def _allowed(self, mixed: int) -> int:
        for offset in range(len(_PLAN)):
            token_id = _PLAN[(mixed + offset) & 4095]
            if token_id not in self._forbidden:
                return token_id
        return EOS


def token_logprobs(state: int, token_id: int, sampling: Sampling) -> list[TokenLogprobs] | None:
    """Return the requested log-probabilities of a generated token; `state` is that before it."""
    if sampling.logprobs is None:
        return None
    rank = 0 if _is_greedy(sampling) else _sampled_rank(state)
    return [_distribution(state, token_id, rank, sampling.logprobs)]


def prompt_logprobs(generation: Generation) -> list[TokenLogprobs | None] | None:
    """Return the requested log-probabilities of each prompt token; the first has none."""
    count = generation.sampling.prompt_logprobs
    if count is None:
        return None
    found: list[TokenLogprobs | None] = [None]
    state = 0
    for before, token_id in itertools.pairwise(generation.token_ids):
        state = crc32(_KEYS[before], state)
        found.append(_distribution(state, token_id, _sampled_rank(state), count))
    return found


def _distribution(state: int, token_id: int, rank: int, count: int) -> TokenLogprobs:
    """Return a distribution whose token of rank r has probability 2^-(r+1)."""
    top: list[tuple[int, float]] = []
    candidate = _mix(state)
    for place in range(count):
        if place == rank:
            alternative = token_id
        else:
            taken = {token_id, *(other for other, _ in top)}
            while (alternative := VOCABULARY.word_ids[candidate % 512]) in taken:
                candidate += 1
            candidate += 37
        top.append((alternative, -math.log(2) * (place + 1)))
    return TokenLogprobs(token_id, -math.log(2) * (rank + 1), top)


def _sampled_rank(state: int) -> int:
    bits = _mix(state ^ 0x5BD1E995) | 1 << 19
    return (bits & -bits).bit_length() - 1


def _is_greedy(sampling: Sampling) -> bool:
    return sampling.temperature <= 0 or sampling.top_p <= 0 or sampling.top_k == 1


def _seed_state(sampling: Sampling) -> int:
    if _is_greedy(sampling):
        return 0
    seed = secrets.randbits(64) if sampling.seed is None else sampling.seed
    return crc32(str(seed).encode(), 1)


def _mix(state: int) -> int:
    return (state * 2_654_435_761 >> 12) & 0xFFFFF  # Knuth's multiplicative hash, 20 of its bits

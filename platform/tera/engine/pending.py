"""What one link has not sent yet, cut into frames that stay short whatever a generation makes."""

from collections.abc import Callable, Iterable, Sequence

import msgspec

from tera import wire
from tera.errors import InvalidValueError
from tera.generation import GenerationFailure, TokenDelta, TokenLogprobs, merge

# Upper bounds of what MessagePack needs. Token ids have at most 32 bits.
_DELTA_BYTES, _ID_BYTES = 64, 5
_ENTRY_BYTES, _LIKELY_BYTES = 20, 15
"""A position's log-probabilities, without and for each likely token."""

MOST_FAILURES = 64
"""Per frame, so that those with the longest messages still fit beside a full one."""
MAX_MESSAGE_CHARACTERS = 2000
"""Per failure: an engine may repeat what it was sent, however long."""

Taken = tuple[list[TokenDelta], list[GenerationFailure], list[int]]


class Pending:
    """The deltas, failures and refusals that one link has not sent yet.

    Deltas of one generation are merged while they wait. A frame takes about `wire.FRAME_BYTES`, and
    a generation of which only a part fits goes to the end of the queue, so that no other waits for
    all of it.
    """

    def __init__(self, give_up: Callable[[int], None]) -> None:
        """`give_up` is called with the id of a generation that fits into no frame."""
        self._give_up = give_up
        self._deltas: dict[int, TokenDelta] = {}
        self._most_bytes = 0
        """Upper bound for all deltas; with log-probabilities, just more than a frame holds."""
        self._failures: dict[int, GenerationFailure] = {}
        self._refused: dict[int, None] = {}

    def __bool__(self) -> bool:
        return bool(self._deltas or self._failures or self._refused)

    def add(self, delta: TokenDelta) -> None:
        """Add what a generation has gained."""
        held = self._deltas.get(delta.generation_id)
        self._deltas[delta.generation_id] = delta if held is None else merge(held, delta)
        if delta.logprobs is None and delta.prompt_logprobs is None:
            self._most_bytes += _DELTA_BYTES + _ID_BYTES * len(delta.token_ids)
        else:
            self._most_bytes += wire.FRAME_BYTES + 1

    def fail(self, failure: GenerationFailure) -> None:
        """Add why a generation has ended; this is sent after its deltas."""
        if len(failure.message) > MAX_MESSAGE_CHARACTERS:
            message = failure.message[:MAX_MESSAGE_CHARACTERS] + "…"
            failure = msgspec.structs.replace(failure, message=message)
        self._failures[failure.generation_id] = failure

    def refuse(self, generation_ids: Iterable[int]) -> None:
        """Add generations that must go elsewhere; this is sent after their deltas."""
        self._refused |= dict.fromkeys(generation_ids)

    def clear(self) -> None:
        """Forget everything."""
        self._deltas.clear()
        self._most_bytes = 0
        self._failures.clear()
        self._refused.clear()

    def take(self) -> Taken:
        """Remove and return the content of the next frame: everything, if it fits."""
        if self._most_bytes <= wire.FRAME_BYTES:  # nearly always, and once per engine step
            deltas, self._deltas, self._most_bytes = list(self._deltas.values()), {}, 0
        else:
            deltas = self._take_deltas()
        held = self._deltas
        failures = [it for it in self._failures.values() if it.generation_id not in held]
        failures = failures[:MOST_FAILURES]
        for failure in failures:
            del self._failures[failure.generation_id]
        refused = [it for it in self._refused if it not in held]
        for generation_id in refused:
            del self._refused[generation_id]
        return deltas, failures, refused

    def _take_deltas(self) -> list[TokenDelta]:
        taken: list[TokenDelta] = []
        waiting, self._deltas = self._deltas, {}
        begun: dict[int, TokenDelta] = {}
        room = wire.FRAME_BYTES
        for generation_id, delta in waiting.items():
            if room <= 0:
                self._deltas[generation_id] = delta
                continue
            part, rest, left = _cut(delta, room)
            if part is not None:
                taken.append(part)
                if rest is not None:
                    begun[generation_id] = rest
            elif room == wire.FRAME_BYTES:
                self._end_too_large(generation_id)
                continue
            else:
                self._deltas[generation_id] = delta  # first in the next frame
            room = left if rest is None else 0
        self._deltas.update(begun)
        if not self._deltas:
            self._most_bytes = 0
        return taken

    def _end_too_large(self, generation_id: int) -> None:
        message = "The log-probabilities at one token are more than can be sent; ask for fewer."
        self.fail(GenerationFailure(generation_id, message, InvalidValueError.code, "logprobs"))
        self._give_up(generation_id)


def _cut(delta: TokenDelta, room: int) -> tuple[TokenDelta | None, TokenDelta | None, int]:
    """Return the part of a delta that fits into `room` bytes, the rest, and the room left.

    The prompt's log-probabilities come first, and only the last part has the finish reason.
    """
    room -= _DELTA_BYTES
    token_ids, logprobs, prompt = delta.token_ids, delta.logprobs, delta.prompt_logprobs
    positions = tokens = 0
    if prompt is not None:
        positions, room = _fitting(prompt, room)
    if prompt is None or positions == len(prompt):
        if logprobs is None:
            tokens = min(len(token_ids), max(0, room // _ID_BYTES))
            room -= tokens * _ID_BYTES
        else:
            tokens, room = _fitting(logprobs, room)
        if tokens == len(token_ids):
            return delta, None, room
    if not positions and not tokens:
        return None, delta, room
    part = msgspec.structs.replace(
        delta,
        token_ids=token_ids[:tokens],
        finish_reason=None,
        logprobs=None if logprobs is None else logprobs[:tokens],
        prompt_logprobs=None if prompt is None else prompt[:positions],
    )
    rest = msgspec.structs.replace(
        delta,
        token_ids=token_ids[tokens:],
        logprobs=None if logprobs is None else logprobs[tokens:],
        # An empty list goes along with the first token if all others were sent before it.
        prompt_logprobs=None if prompt is None or tokens else prompt[positions:],
    )
    return part, rest, room


def _fitting(entries: Sequence[TokenLogprobs | None], room: int) -> tuple[int, int]:
    """Return how many entries from the start fit, with their tokens' ids, and the room left."""
    for count, entry in enumerate(entries):
        top = 0 if entry is None else len(entry.top)
        needed = _ID_BYTES + _ENTRY_BYTES + _LIKELY_BYTES * top
        if needed > room:
            return count, room
        room -= needed
    return len(entries), room

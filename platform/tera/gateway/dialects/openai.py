"""What OpenAI's APIs have in common: events, sampling fields, the end of a stream."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec

from tera.contract.common import error_envelope
from tera.errors import TeraError
from tera.generation import Sampling

DONE = b"data: [DONE]\n\n"

encode = msgspec.json.Encoder().encode

_MARK = "\x00 the text \x00"
_MARKED = encode(_MARK)


def event(chunk: msgspec.Struct) -> bytes:
    """Return a chunk as an event."""
    return b"data: " + encode(chunk) + b"\n\n"


def failed(error: TeraError) -> bytes:
    """Return the event of an error in mid-stream."""
    return b"data: " + error_envelope(error) + b"\n\n"


class EncodedList:
    """A JSON list whose entries are encoded as they are added, in pieces.

    The log-probabilities of a whole answer are up to a hundred thousand entries. Encoded at the
    end, they would keep the event loop for half a second, and objects take more memory.
    """

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def extend(self, entries: Sequence[object]) -> None:
        """Add entries."""
        if entries:
            self._parts.append((b"," if self._parts else b"[") + encode(entries)[1:-1])

    def json(self) -> msgspec.Raw:
        """Return the list as JSON."""
        return msgspec.Raw(b"".join([*(self._parts or [b"["]), b"]"]))


@dataclass(frozen=True, slots=True)
class EventShape:
    """An event in which only the text changes: the rest is encoded once per stream."""

    before: bytes
    after: bytes

    @classmethod
    def of(cls, marked: msgspec.Struct) -> "EventShape":
        """Return the shape of a chunk that has `mark()` in the place of its text."""
        before, after = event(marked).split(_MARKED)
        return cls(before, after)

    def event(self, text: str) -> bytes:
        """Return the event with this text."""
        return b"%b%b%b" % (self.before, encode(text), self.after)


def mark() -> str:
    """Return the placeholder for the text in a chunk that a shape is made from."""
    return _MARK


class SamplingFields(Protocol):
    """The fields that control sampling, as both APIs name them."""

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    seed: int | None
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    logit_bias: dict[int, float] | None


def sampling(fields: SamplingFields, *, logprobs: int | None) -> Sampling:
    """Return the request's sampling, still without the token bound and the seed of each completion.

    Args:
        fields: of the request.
        logprobs: how many alternatives to report at each position; None reports none.
    """
    # 0 means "the most likely token"; vLLM wants a nucleus that is not empty, so this is greedy.
    greedy = fields.temperature == 0 or fields.top_p == 0
    return Sampling(
        max_tokens=0,
        temperature=0.0 if greedy else fields.temperature,
        top_p=1.0 if greedy else fields.top_p,
        top_k=max(fields.top_k, 0),
        min_p=fields.min_p,
        seed=fields.seed,
        presence_penalty=fields.presence_penalty,
        frequency_penalty=fields.frequency_penalty,
        repetition_penalty=fields.repetition_penalty,
        logit_bias=fields.logit_bias,
        logprobs=logprobs,
    )

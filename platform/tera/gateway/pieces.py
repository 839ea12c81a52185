"""The pieces of an answer, in a form common to all APIs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec

from tera.contract.chat_answers import ToolCallDelta
from tera.gateway.render import TokenText
from tera.generation import FinishReason


@dataclass(frozen=True, slots=True)
class PositionLogprobs:
    """The token at one position, and the likeliest tokens there, likeliest first."""

    token: TokenText
    logprob: float | None
    """None for the first token of a prompt, which nothing predicts."""
    top: list[tuple[TokenText, float]]


class Piece(msgspec.Struct, frozen=True, gc=False):
    """What one delivery of tokens added to a choice; possibly nothing to show."""

    index: int
    content: str
    finish_reason: FinishReason | None = None
    reasoning: str = ""
    tool_calls: Sequence[ToolCallDelta] = ()
    logprobs: list[PositionLogprobs] | None = None
    """One for each token of the piece, if requested."""

    @property
    def says_something(self) -> bool:
        """Whether to send it to the client; in the middle of a character there is no text yet."""
        if self.content or self.finish_reason is not None:
            return True
        return bool(self.reasoning or self.tool_calls or self.logprobs)


class Answer(Protocol):
    """One request's answer in progress: gets pieces as they arrive, while a frame is read."""

    @property
    def blocked(self) -> bool:
        """Whether the client reads more slowly than tokens arrive; then pieces should be merged."""
        ...

    async def free(self) -> None:
        """Wait until it is not blocked."""
        ...

    def add(self, piece: Piece) -> None:
        """Add a new piece, without waiting."""
        ...

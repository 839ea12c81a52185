"""What an answer is made of, whichever API asked for it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec

from tera.contract.chat_answers import ToolCallDelta
from tera.gateway.render import TokenText
from tera.generation import FinishReason


@dataclass(frozen=True, slots=True)
class PositionLogprobs:
    """The token at one position, and the likeliest ones there, likeliest first."""

    token: TokenText
    logprob: float | None
    """None for the first token of a prompt, which nothing predicts."""
    top: list[tuple[TokenText, float]]


class Piece(msgspec.Struct, frozen=True, gc=False):
    """What one choice of an answer gained by one delivery of tokens: maybe nothing to show."""

    index: int
    content: str
    finish_reason: FinishReason | None = None
    reasoning: str = ""
    tool_calls: Sequence[ToolCallDelta] = ()
    logprobs: list[PositionLogprobs] | None = None
    """One for each token that the piece stands for, when asked for."""

    @property
    def says_something(self) -> bool:
        """Whether a client has to hear of it; inside of a character there is no text yet."""
        if self.content or self.finish_reason is not None:
            return True
        return bool(self.reasoning or self.tool_calls or self.logprobs)


class Answer(Protocol):
    """One request's answer in the making: takes pieces as they come, from inside of a frame."""

    @property
    def blocked(self) -> bool:
        """Whether the client reads slower than tokens come; then pieces are to be merged."""
        ...

    async def free(self) -> None:
        """Wait until it is not blocked."""
        ...

    def add(self, piece: Piece) -> None:
        """Take what is new, without waiting."""
        ...

"""Answers of `POST /v1/chat/completions`: the whole answer, and the chunks of a stream (T-2)."""

from typing import Literal

import msgspec

from tera.contract.common import StreamUsage, Usage


class TopLogprob(msgspec.Struct, frozen=True):
    """A likely token at one position."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(msgspec.Struct, frozen=True):
    """The token at one position, and the likely ones there."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct, frozen=True):
    """Log-probabilities of a choice's tokens."""

    content: list[TokenLogprob] | msgspec.Raw
    """As JSON where a whole answer has had them encoded as they came."""
    refusal: None = None


class FunctionCallDelta(msgspec.Struct, frozen=True, omit_defaults=True):
    """A piece of a function call: the name is sent whole, arguments in pieces."""

    name: str | None = None
    arguments: str | None = None


class ToolCallDelta(msgspec.Struct, frozen=True, omit_defaults=True):
    """A piece of one tool call; the first piece has `id` and `type`."""

    index: int
    id: str | None = None
    type: str | None = None
    function: FunctionCallDelta | None = None


class AnswerFunction(msgspec.Struct, frozen=True):
    """A whole function call; `arguments` is JSON as text, as the model wrote it."""

    name: str
    arguments: str


class AnswerToolCall(msgspec.Struct, frozen=True):
    """A whole tool call."""

    id: str
    function: AnswerFunction
    type: Literal["function"] = "function"


class AnswerMessage(msgspec.Struct, frozen=True):
    """What the assistant says."""

    content: str | None
    tool_calls: list[AnswerToolCall] | msgspec.UnsetType = msgspec.UNSET
    reasoning_content: str | msgspec.UnsetType = msgspec.UNSET
    refusal: None = None
    role: Literal["assistant"] = "assistant"


class ChatChoice(msgspec.Struct, frozen=True):
    """One answer."""

    index: int
    message: AnswerMessage
    finish_reason: str
    logprobs: ChatLogprobs | None = None


class ChatCompletion(msgspec.Struct, frozen=True):
    """The answer without `stream`."""

    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    object: Literal["chat.completion"] = "chat.completion"


class MessageDelta(msgspec.Struct, frozen=True, omit_defaults=True):
    """What an event adds to a message."""

    role: str | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChatChunkChoice(msgspec.Struct, frozen=True):
    """The part of one event that belongs to a choice."""

    index: int
    delta: MessageDelta
    finish_reason: str | None = None
    logprobs: ChatLogprobs | None = None


class ChatChunk(msgspec.Struct, frozen=True):
    """One event of a stream; it has `usage` only with `include_usage`."""

    id: str
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: StreamUsage = msgspec.UNSET
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"

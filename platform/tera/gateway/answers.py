"""From deltas to the API's answers: one JSON object, or the events of a stream."""

import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Generic, Protocol, TypeVar

import msgspec

from tera.contract.chat import (
    AnswerFunction,
    AnswerMessage,
    AnswerToolCall,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatLogprobs,
    ChatRequest,
    MessageDelta,
    TokenLogprob,
    ToolCallDelta,
    TopLogprob,
)
from tera.contract.common import StreamUsage
from tera.contract.completions import (
    Completion,
    CompletionChoice,
    CompletionChunk,
    CompletionLogprobs,
    CompletionRequest,
)
from tera.gateway.call import Call, ChatDelta, ChoiceDelta, PositionLogprobs

D_contra = TypeVar("D_contra", contravariant=True)

_encode = msgspec.json.Encoder().encode


class Answer(Protocol, Generic[D_contra]):
    """One request's answer in the making."""

    def events(self, deltas: "AsyncGenerator[D_contra]") -> AsyncGenerator[bytes]:
        """Yield the event of each delta, without `[DONE]`; closes `deltas`.

        A delta that says nothing gives no bytes, so that the reader knows of every step.
        """
        ...

    async def whole(self, deltas: "AsyncGenerator[D_contra]") -> msgspec.Struct:
        """Return the one object that the deltas add up to; closes `deltas`."""
        ...


def _event(chunk: msgspec.Struct) -> bytes:
    return b"data: " + _encode(chunk) + b"\n\n"


class CompletionAnswer:
    """The answer of `/v1/completions`."""

    def __init__(self, request: CompletionRequest, call: Call) -> None:
        self._request = request
        self._call = call
        self._id = f"cmpl-{secrets.token_hex(16)}"
        self._created = int(time.time())
        self._text_offsets = [0] * (len(request.prompt) * request.n)

    async def events(self, deltas: AsyncGenerator[ChoiceDelta]) -> AsyncGenerator[bytes]:
        """Yield the events of a stream; see `Answer`."""
        usage = None if self._request.include_usage else msgspec.UNSET
        async with aclosing(deltas):
            async for delta in deltas:
                if not delta.says_something:
                    yield b""
                    continue
                choice = CompletionChoice(
                    delta.text, delta.index, delta.finish_reason, self._logprobs(delta)
                )
                yield _event(self._chunk([choice], usage))
        if self._request.include_usage:
            yield _event(self._chunk([], self._call.usage()))

    def _chunk(self, choices: list[CompletionChoice], usage: StreamUsage) -> CompletionChunk:
        return CompletionChunk(
            self._id,
            self._created,
            self._request.model,
            choices,
            usage,
        )

    async def whole(self, deltas: AsyncGenerator[ChoiceDelta]) -> Completion:
        """Return the whole completion; see `Answer`."""
        choices = len(self._text_offsets)
        texts: list[list[str]] = [[] for _ in range(choices)]
        logprobs: list[CompletionLogprobs | None] = [None] * choices
        finishes: list[str | None] = [None] * choices
        async with aclosing(deltas):
            async for delta in deltas:
                index = delta.index
                texts[index].append(delta.text)
                logprobs[index] = _joined(logprobs[index], self._logprobs(delta))
                finishes[index] = delta.finish_reason or finishes[index]
        return Completion(
            id=self._id,
            created=self._created,
            model=self._request.model,
            choices=[
                CompletionChoice("".join(texts[index]), index, finishes[index], logprobs[index])
                for index in range(choices)
            ],
            usage=self._call.usage(),
        )

    def _logprobs(self, delta: ChoiceDelta) -> CompletionLogprobs | None:
        if delta.logprobs is None:
            return None
        offsets = []
        for position in delta.logprobs:
            offsets.append(self._text_offsets[delta.index])
            self._text_offsets[delta.index] += len(position.token.text)
        return CompletionLogprobs(
            tokens=[position.token.text for position in delta.logprobs],
            token_logprobs=[position.logprob for position in delta.logprobs],
            top_logprobs=[_top(position) for position in delta.logprobs],
            text_offset=offsets,
        )


def _top(position: PositionLogprobs) -> dict[str, float] | None:
    """Return OpenAI's map of the likeliest tokens; the one that was drawn is always in it."""
    if position.logprob is None:
        return None
    # First come the likeliest: of two tokens with one text, the likelier is kept.
    likely = {token.text: logprob for token, logprob in reversed(position.top)}
    return {**dict(reversed(likely.items())), position.token.text: position.logprob}


def _joined(
    before: CompletionLogprobs | None, more: CompletionLogprobs | None
) -> CompletionLogprobs | None:
    if before is None or more is None:
        return before or more
    return CompletionLogprobs(
        before.tokens + more.tokens,
        before.token_logprobs + more.token_logprobs,
        before.top_logprobs + more.top_logprobs,
        before.text_offset + more.text_offset,
    )


class _Gathered:
    """What one chat choice has said so far."""

    def __init__(self) -> None:
        self.content: list[str] = []
        self.reasoning: list[str] = []
        self.calls: dict[int, tuple[str, str, list[str]]] = {}
        """Id, name and pieces of the arguments, by index."""
        self.logprobs: list[PositionLogprobs] | None = None
        self.finish_reason = "stop"

    def add(self, delta: ChatDelta) -> None:
        self.content.append(delta.piece.content)
        self.reasoning.append(delta.piece.reasoning)
        for call in delta.piece.tool_calls:
            self._add_call(call)
        if delta.logprobs is not None:
            self.logprobs = [*(self.logprobs or []), *delta.logprobs]
        self.finish_reason = delta.finish_reason or self.finish_reason

    def _add_call(self, call: ToolCallDelta) -> None:
        call_id, name, arguments = self.calls.get(call.index, ("", "", []))
        if call.function is not None:
            name = call.function.name or name
            arguments = [*arguments, call.function.arguments or ""]
        self.calls[call.index] = (call.id or call_id, name, arguments)

    def choice(self, index: int) -> ChatChoice:
        content, reasoning = "".join(self.content), "".join(self.reasoning)
        calls = [
            AnswerToolCall(call_id, AnswerFunction(name, "".join(arguments)))
            for _, (call_id, name, arguments) in sorted(self.calls.items())
        ]
        message = AnswerMessage(
            # As OpenAI: an answer that only calls tools says nothing.
            content=content if content or not calls else None,
            tool_calls=calls or msgspec.UNSET,
            reasoning_content=reasoning or msgspec.UNSET,
        )
        return ChatChoice(index, message, self.finish_reason, _chat_logprobs(self.logprobs))


class ChatAnswer:
    """The answer of `/v1/chat/completions`."""

    def __init__(self, request: ChatRequest, call: Call) -> None:
        self._request = request
        self._call = call
        self._id = f"chatcmpl-{secrets.token_hex(16)}"
        self._created = int(time.time())

    async def events(self, deltas: AsyncGenerator[ChatDelta]) -> AsyncGenerator[bytes]:
        """Yield the events of a stream; see `Answer`."""
        usage = None if self._request.include_usage else msgspec.UNSET
        began = 0
        async with aclosing(deltas):
            async for delta in deltas:
                if not delta.says_something:
                    yield b""
                    continue
                piece = delta.piece
                first = delta.index >= began
                # OpenAI's client looks for the choices' first chunks in the order of their index.
                for index in range(began, delta.index):
                    opening = ChatChunkChoice(index, MessageDelta("assistant", ""))
                    yield _event(self._chunk([opening], usage))
                began = max(began, delta.index + 1)
                message = MessageDelta(
                    role="assistant" if first else None,
                    content=piece.content if piece.content or first else None,
                    reasoning_content=piece.reasoning or None,
                    tool_calls=list(piece.tool_calls) or None,
                )
                choice = ChatChunkChoice(
                    delta.index, message, delta.finish_reason, _chat_logprobs(delta.logprobs)
                )
                yield _event(self._chunk([choice], usage))
        if self._request.include_usage:
            yield _event(self._chunk([], self._call.usage()))

    def _chunk(self, choices: list[ChatChunkChoice], usage: StreamUsage) -> ChatChunk:
        return ChatChunk(
            self._id,
            self._created,
            self._request.model,
            choices,
            usage,
        )

    async def whole(self, deltas: AsyncGenerator[ChatDelta]) -> ChatCompletion:
        """Return the whole answer; see `Answer`."""
        gathered = [_Gathered() for _ in range(self._request.n)]
        async with aclosing(deltas):
            async for delta in deltas:
                gathered[delta.index].add(delta)
        return ChatCompletion(
            id=self._id,
            created=self._created,
            model=self._request.model,
            choices=[choice.choice(index) for index, choice in enumerate(gathered)],
            usage=self._call.usage(),
        )


def _chat_logprobs(positions: list[PositionLogprobs] | None) -> ChatLogprobs | None:
    if positions is None:
        return None
    return ChatLogprobs(
        [
            TokenLogprob(
                token=position.token.text,
                logprob=position.logprob or 0.0,
                bytes=list(position.token.data),
                top_logprobs=[
                    TopLogprob(token.text, logprob, list(token.data))
                    for token, logprob in position.top
                ],
            )
            for position in positions
        ]
    )

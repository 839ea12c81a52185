"""`POST /v1/chat/completions`: from its body to a request, and from pieces to its answers."""

import secrets
import time
from typing import Any

import msgspec

from tera.contract.chat import ChatRequest, NamedToolChoice
from tera.contract.chat_answers import (
    AnswerFunction,
    AnswerMessage,
    AnswerToolCall,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatLogprobs,
    MessageDelta,
    TokenLogprob,
    ToolCallDelta,
    TopLogprob,
)
from tera.contract.common import StreamUsage, parse_request
from tera.errors import TeraError
from tera.gateway.dialects import openai
from tera.gateway.dialects.base import Streamed, Unblocked
from tera.gateway.exchange import Exchange
from tera.gateway.pieces import Piece, PositionLogprobs
from tera.gateway.relay import Events
from tera.gateway.request import Conversation, TextRequest
from tera.generation import FinishReason


class ChatQuestion:
    """A request of `/v1/chat/completions`; see `Question`."""

    def __init__(self, body: dict[str, Any]) -> None:
        asked = parse_request(ChatRequest, body)
        self._asked = asked
        self.stream = asked.stream
        self.request = TextRequest(
            model=asked.model,
            capability="chat",
            content=_conversation(asked),
            sampling=openai.sampling(
                asked, logprobs=(asked.top_logprobs or 0) if asked.logprobs else None
            ),
            max_tokens=asked.completion_bound,
            n=asked.n,
            stops=asked.stop,
            user=asked.user or "",
        )

    def streamed(self, exchange: Exchange, events: Events) -> "ChatStream":
        """Return the answer as events."""
        return ChatStream(self._asked, exchange, events)

    def whole(self, exchange: Exchange) -> "WholeChat":
        """Return the answer as one object."""
        return WholeChat(self._asked, exchange)


def _conversation(asked: ChatRequest) -> Conversation:
    fields = asked.model_dump(
        include={
            "messages",
            "tools",
            "tool_choice",
            "parallel_tool_calls",
            "chat_template_kwargs",
            "reasoning_effort",
            "response_format",
        },
        exclude_none=True,
        by_alias=True,
    )
    return Conversation(**fields)


class _ToolCalls:
    """Which of the model's tool calls a client is sent, and the finish reason of such an answer."""

    def __init__(self, asked: ChatRequest) -> None:
        self._parallel = asked.parallel_tool_calls
        # Like OpenAI: calling the one tool that the client named is not the model's decision.
        self._named = isinstance(asked.tool_choice, NamedToolChoice)
        self._calling: set[int] = set()

    def of(self, piece: Piece) -> list[ToolCallDelta]:
        """Return what a piece adds; only of the first call if the client wants just one."""
        calls = [call for call in piece.tool_calls if self._parallel or call.index == 0]
        if calls:
            self._calling.add(piece.index)
        return calls

    def finish_reason(self, piece: Piece) -> str | None:
        """Return why a choice has ended; call it after `of`."""
        if piece.finish_reason is not FinishReason.STOP or self._named:
            return piece.finish_reason
        return "tool_calls" if piece.index in self._calling else piece.finish_reason


class ChatStream(Streamed):
    """The events of a streamed chat answer."""

    def __init__(self, asked: ChatRequest, exchange: Exchange, events: Events) -> None:
        super().__init__(events)
        self._asked = asked
        self._exchange = exchange
        self._id, self._created = _new_id(), int(time.time())
        self._usage: StreamUsage = None if asked.include_usage else msgspec.UNSET
        self._tool_calls = _ToolCalls(asked)
        self._begun = 0
        """Choices with a lower index have had their first chunk."""
        self._shapes: dict[int, openai.EventShape] = {}

    def add(self, piece: Piece) -> None:
        """Write the event of a piece."""
        if piece.index < self._begun and piece.content and _is_only_content(piece):
            shape = self._shapes.get(piece.index) or self._new_shape(piece.index)
            self._events.write(shape.event(piece.content))
            return
        calls = self._tool_calls.of(piece)
        finish_reason = self._tool_calls.finish_reason(piece)
        said = piece.content or piece.reasoning or calls or piece.logprobs
        if not said and finish_reason is None:
            return
        first = piece.index >= self._begun
        self._open_up_to(piece.index)
        delta = MessageDelta(
            role="assistant" if first else None,
            content=piece.content if piece.content or first else None,
            reasoning_content=piece.reasoning or None,
            tool_calls=calls or None,
        )
        logprobs = _logprobs(piece.logprobs)
        self._write([ChatChunkChoice(piece.index, delta, finish_reason, logprobs)])

    def end(self) -> bytes:
        """Return the usage, if requested, and the end marker."""
        if not self._asked.include_usage:
            return openai.DONE
        return openai.event(self._chunk([], self._exchange.usage())) + openai.DONE

    def failed(self, error: TeraError) -> bytes:
        """Return the event of an error in mid-stream."""
        return openai.failed(error)

    def _open_up_to(self, index: int) -> None:
        # OpenAI's client expects the choices' first chunks in the order of their index.
        for earlier in range(self._begun, index):
            self._write([ChatChunkChoice(earlier, MessageDelta("assistant", ""))])
        self._begun = max(self._begun, index + 1)

    def _new_shape(self, index: int) -> openai.EventShape:
        choice = ChatChunkChoice(index, MessageDelta(content=openai.mark()))
        shape = openai.EventShape.of(self._chunk([choice], self._usage))
        self._shapes[index] = shape
        return shape

    def _write(self, choices: list[ChatChunkChoice]) -> None:
        self._events.write(openai.event(self._chunk(choices, self._usage)))

    def _chunk(self, choices: list[ChatChunkChoice], usage: StreamUsage) -> ChatChunk:
        return ChatChunk(self._id, self._created, self._asked.model, choices, usage)


def _is_only_content(piece: Piece) -> bool:
    other = piece.reasoning or piece.tool_calls or piece.logprobs is not None
    return piece.finish_reason is None and not other


class _Gathered:
    """What one choice has said so far."""

    def __init__(self) -> None:
        self.content: list[str] = []
        self.reasoning: list[str] = []
        self.calls: dict[int, tuple[str, str, list[str]]] = {}
        """Id, name and pieces of the arguments, by index."""
        self.logprobs: openai.EncodedList | None = None
        self.finish_reason = "stop"

    def add_call(self, call: ToolCallDelta) -> None:
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
            # Like OpenAI: the content of an answer that only calls tools is null.
            content=content if content or not calls else None,
            tool_calls=calls or msgspec.UNSET,
            reasoning_content=reasoning or msgspec.UNSET,
        )
        logprobs = None if self.logprobs is None else ChatLogprobs(self.logprobs.json())
        return ChatChoice(index, message, self.finish_reason, logprobs)


class WholeChat(Unblocked):
    """A chat answer that is sent once, when it is complete."""

    def __init__(self, asked: ChatRequest, exchange: Exchange) -> None:
        self._asked = asked
        self._exchange = exchange
        self._tool_calls = _ToolCalls(asked)
        self._gathered = [_Gathered() for _ in range(asked.n)]

    def add(self, piece: Piece) -> None:
        """Keep a piece."""
        gathered = self._gathered[piece.index]
        gathered.content.append(piece.content)
        gathered.reasoning.append(piece.reasoning)
        for call in self._tool_calls.of(piece):
            gathered.add_call(call)
        if piece.logprobs is not None:
            gathered.logprobs = gathered.logprobs or openai.EncodedList()
            gathered.logprobs.extend(_told(piece.logprobs))
        gathered.finish_reason = self._tool_calls.finish_reason(piece) or gathered.finish_reason

    def body(self) -> bytes:
        """Return the answer as JSON."""
        return openai.encode(
            ChatCompletion(
                id=_new_id(),
                created=int(time.time()),
                model=self._asked.model,
                choices=[each.choice(index) for index, each in enumerate(self._gathered)],
                usage=self._exchange.usage(),
            )
        )


def _new_id() -> str:
    return f"chatcmpl-{secrets.token_hex(16)}"


def _logprobs(positions: list[PositionLogprobs] | None) -> ChatLogprobs | None:
    return None if positions is None else ChatLogprobs(_told(positions))


def _told(positions: list[PositionLogprobs]) -> list[TokenLogprob]:
    return [
        TokenLogprob(
            token=position.token.text,
            logprob=position.logprob or 0.0,
            bytes=list(position.token.data),
            top_logprobs=[
                TopLogprob(token.text, logprob, list(token.data)) for token, logprob in position.top
            ],
        )
        for position in positions
    ]

"""`POST /v1/completions`: from its body to a request, and from pieces to its answers."""

import secrets
import time
from typing import Any

import msgspec

from tera.contract.common import StreamUsage, parse_request
from tera.contract.completions import (
    Completion,
    CompletionChoice,
    CompletionChunk,
    CompletionLogprobs,
    CompletionRequest,
    PromptArray,
)
from tera.errors import TeraError
from tera.gateway.dialects import openai
from tera.gateway.dialects.base import Streamed, Unblocked
from tera.gateway.exchange import Exchange
from tera.gateway.pieces import Piece, PositionLogprobs
from tera.gateway.relay import Events
from tera.gateway.request import Prompts, TextRequest


class CompletionQuestion:
    """A request of `/v1/completions`; see `Question`."""

    def __init__(self, body: dict[str, Any]) -> None:
        asked = parse_request(CompletionRequest, body)
        self._asked = asked
        self.stream = asked.stream
        sampling = openai.sampling(asked, logprobs=asked.logprobs)
        if asked.echo:
            sampling = msgspec.structs.replace(sampling, prompt_logprobs=asked.logprobs)
        self.request = TextRequest(
            model=asked.model,
            capability="completions",
            content=Prompts(list(asked.prompt), _paths(asked), asked.echo),
            sampling=sampling,
            max_tokens=asked.max_tokens,
            n=asked.n,
            stops=asked.stop,
            user=asked.user or "",
        )

    def streamed(self, exchange: Exchange, events: Events) -> "CompletionStream":
        """Return the answer as events."""
        return CompletionStream(self._asked, exchange, events)

    def whole(self, exchange: Exchange) -> "WholeCompletion":
        """Return the answer as one object."""
        return WholeCompletion(self._asked, exchange)


def _paths(asked: CompletionRequest) -> list[str]:
    if not isinstance(asked.prompt, PromptArray):
        return ["prompt"]
    return [f"prompt[{position}]" for position in range(len(asked.prompt))]


class CompletionStream(Streamed):
    """The events of a streamed completion."""

    def __init__(self, asked: CompletionRequest, exchange: Exchange, events: Events) -> None:
        super().__init__(events)
        self._asked = asked
        self._exchange = exchange
        self._id, self._created = _new_id(), int(time.time())
        self._usage: StreamUsage = None if asked.include_usage else msgspec.UNSET
        self._offsets = _Offsets(len(asked.prompt) * asked.n)
        self._shapes: dict[int, openai.EventShape] = {}

    def add(self, piece: Piece) -> None:
        """Write the event of a piece."""
        if piece.finish_reason is None and piece.logprobs is None:
            if piece.content:
                shape = self._shapes.get(piece.index) or self._new_shape(piece.index)
                self._events.write(shape.event(piece.content))
            return
        logprobs = self._offsets.logprobs(piece)
        choice = CompletionChoice(piece.content, piece.index, piece.finish_reason, logprobs)
        if piece.says_something:
            self._events.write(openai.event(self._chunk([choice], self._usage)))

    def end(self) -> bytes:
        """Return the usage, if requested, and the end marker."""
        if not self._asked.include_usage:
            return openai.DONE
        return openai.event(self._chunk([], self._exchange.usage())) + openai.DONE

    def failed(self, error: TeraError) -> bytes:
        """Return the event of an error in mid-stream."""
        return openai.failed(error)

    def _new_shape(self, index: int) -> openai.EventShape:
        chunk = self._chunk([CompletionChoice(openai.mark(), index)], self._usage)
        shape = self._shapes[index] = openai.EventShape.of(chunk)
        return shape

    def _chunk(self, choices: list[CompletionChoice], usage: StreamUsage) -> CompletionChunk:
        return CompletionChunk(self._id, self._created, self._asked.model, choices, usage)


class WholeCompletion(Unblocked):
    """A completion that is sent once, when it is complete."""

    def __init__(self, asked: CompletionRequest, exchange: Exchange) -> None:
        self._asked = asked
        self._exchange = exchange
        choices = len(asked.prompt) * asked.n
        self._offsets = _Offsets(choices)
        self._texts: list[list[str]] = [[] for _ in range(choices)]
        self._logprobs: list[_EncodedLogprobs | None] = [None] * choices
        self._finishes: list[str | None] = [None] * choices

    def add(self, piece: Piece) -> None:
        """Keep a piece."""
        index = piece.index
        self._texts[index].append(piece.content)
        more = self._offsets.logprobs(piece)
        if more is not None:
            logprobs = self._logprobs[index] = self._logprobs[index] or _EncodedLogprobs()
            logprobs.add(more)
        if piece.finish_reason is not None:
            self._finishes[index] = piece.finish_reason

    def body(self) -> bytes:
        """Return the completion as JSON."""
        choices = [
            CompletionChoice(
                "".join(texts),
                index,
                self._finishes[index],
                None if logprobs is None else logprobs.told(),
            )
            for index, (texts, logprobs) in enumerate(zip(self._texts, self._logprobs, strict=True))
        ]
        return openai.encode(
            Completion(
                id=_new_id(),
                created=int(time.time()),
                model=self._asked.model,
                choices=choices,
                usage=self._exchange.usage(),
            )
        )


def _new_id() -> str:
    return f"cmpl-{secrets.token_hex(16)}"


class _Offsets:
    """Where each choice's next token begins in its text; this API reports it with logprobs."""

    def __init__(self, choices: int) -> None:
        self._offsets = [0] * choices

    def logprobs(self, piece: Piece) -> CompletionLogprobs | None:
        if piece.logprobs is None:
            return None
        offsets = []
        for position in piece.logprobs:
            offsets.append(self._offsets[piece.index])
            self._offsets[piece.index] += len(position.token.text)
        return CompletionLogprobs(
            tokens=[position.token.text for position in piece.logprobs],
            token_logprobs=[position.logprob for position in piece.logprobs],
            top_logprobs=[_top(position) for position in piece.logprobs],
            text_offset=offsets,
        )


def _top(position: PositionLogprobs) -> dict[str, float] | None:
    """Return OpenAI's map of the likeliest tokens; it always contains the one that was drawn."""
    if position.logprob is None:
        return None
    # The likeliest come first: of two tokens with the same text, the likelier one is kept.
    likely = {token.text: logprob for token, logprob in reversed(position.top)}
    return {**dict(reversed(likely.items())), position.token.text: position.logprob}


class _EncodedLogprobs:
    """The four lists of one choice, encoded as they come; see `EncodedList`."""

    def __init__(self) -> None:
        self._lists = [openai.EncodedList() for _ in CompletionLogprobs.__struct_fields__]

    def add(self, more: CompletionLogprobs) -> None:
        for encoded, entries in zip(self._lists, msgspec.structs.astuple(more), strict=True):
            encoded.extend(entries)

    def told(self) -> CompletionLogprobs:
        return CompletionLogprobs(*(encoded.json() for encoded in self._lists))

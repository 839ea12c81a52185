"""From a generation's tokens to the pieces of an answer: text, stop strings, tool calls."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import msgspec

from tera.gateway.echo import EchoedPrompt, position
from tera.gateway.exchange import Exchange
from tera.gateway.pieces import Answer, Piece, PositionLogprobs
from tera.gateway.render import AnswerParser, Detokenizer, StopStrings, TextModel
from tera.generation import FinishReason, TokenDelta, merge

SLICE_ENTRIES: Final = 512
"""Log-probabilities that are made text of in one go: 3 ms, or 15 where no token was seen before."""

LEAST_TOKENS: Final = 16
"""As many tokens are never cut; an engine step has one, or a few."""


@dataclass(frozen=True, slots=True)
class Choice:
    """One completion to be generated."""

    index: int
    sample: int
    """Its number among the completions of its prompt."""
    token_ids: list[int]
    """The prompt."""
    stops: list[str]
    special_tokens: bool = False
    """Whether special tokens are text."""
    logprobs: bool = False
    echo: str = ""
    """The text that the answer begins with."""
    prompt: EchoedPrompt | None = None
    """Set if the answer begins with the prompt and its log-probabilities."""


class ChoiceText:
    """The text state of one choice, from its first token to its last; a `Sink` of its run.

    It lives in the gateway and so survives the replica that generates the tokens. While the client
    does not keep up, tokens are held back here and become one piece once it does; their number is
    bounded by the tokens that the request may generate. They are also held back until an echoed
    prompt has been sent.
    """

    def __init__(
        self,
        choice: Choice,
        text: TextModel,
        parser: AnswerParser | None,
        answer: Answer,
        exchange: Exchange,
        delivered: Callable[[TokenDelta], None],
    ) -> None:
        """`delivered` is called with each delta that arrives; `exchange` counts the tokens used."""
        self._choice = choice
        self._text = text
        self._parser = parser
        self._answer = answer
        self._exchange = exchange
        self._delivered = delivered
        self._detokenizer: Detokenizer = text.detokenizer(
            choice.token_ids, special_tokens=choice.special_tokens
        )
        self._stops = StopStrings(choice.stops)
        self._echo = choice.echo
        self._prompt = choice.prompt
        self._held: TokenDelta | None = None

    def push(self, delta: TokenDelta) -> bool:
        """Add what is new to the answer; return whether a stop string has ended it."""
        self._delivered(delta)
        prompt = self._prompt
        if prompt is not None and self._choice.sample == 0:
            prompt.take(delta)
        if self._held is not None:
            delta, self._held = merge(self._held, delta), None
        if self._answer.blocked or (prompt is not None and not prompt.is_told):
            # The client does not keep up: merge what comes instead of queueing it.
            self._held = delta
            return False
        return self._add_first(delta)

    async def finish(self) -> None:
        """Add what is still held back, once the client accepts it."""
        if self._held is not None and self._prompt is not None:
            await self._prompt.told()
        while self._held is not None:
            await self._answer.free()
            if not self._answer.blocked:
                held, self._held = self._held, None
                self._add_first(held)
                await asyncio.sleep(0)

    @property
    def held_tokens(self) -> int:
        """How many tokens are held back and not yet counted in `exchange`."""
        return 0 if self._held is None else len(self._held.token_ids)

    def _add_first(self, delta: TokenDelta) -> bool:
        """Add a delta; of very many log-probabilities only the first ones, and hold back the rest.

        Making text of all that a client has left waiting would keep the event loop for half a
        second. The rest follows with the next deltas, or at the end.
        """
        part, rest = _cut(delta)
        stopped = self._add(part)
        if not stopped:
            self._held = rest
        return stopped

    def _add(self, delta: TokenDelta) -> bool:
        text, used, stopped = self._derender(delta)
        # Tokens after a stop string are not part of the answer and are not charged.
        self._exchange.completion_tokens += used
        finish = FinishReason.STOP if stopped else delta.finish_reason
        if finish is not None and not stopped:
            # No stop string came, so what looked like the beginning of one is text.
            text += self._stops.flush()
        logprobs = self._logprobs(delta, used) if self._choice.logprobs else None
        self._echo, text = "", self._echo + text
        index = self._choice.index
        if self._parser is None:
            self._answer.add(Piece(index, text, finish, logprobs=logprobs))
        else:
            means = self._parser.push(text, delta.token_ids[:used], finished=finish is not None)
            self._answer.add(
                Piece(index, means.content, finish, means.reasoning, means.tool_calls, logprobs)
            )
        return stopped

    def _derender(self, delta: TokenDelta) -> tuple[str, int, bool]:
        """Return a delta's text, how many tokens it used, and whether it hit a stop string."""
        token_ids, detokenize = delta.token_ids, self._detokenizer.push
        count = len(token_ids)
        # The token that ended the text is not part of it.
        shown = token_ids[:-1] if delta.finish_reason is FinishReason.STOP else token_ids
        if not self._choice.stops:
            return "".join(map(detokenize, shown)), count, False
        text = ""
        for taken, token_id in enumerate(shown, start=1):
            piece, stopped = self._stops.push(detokenize(token_id))
            text += piece
            if stopped:
                return text, taken, True
        return text, count, False

    def _logprobs(self, delta: TokenDelta, used: int) -> list[PositionLogprobs]:
        """Return the log-probabilities of a delta's first `used` tokens as text.

        The token that ended the text has none.
        """
        entries = list((delta.logprobs or [])[:used])
        if delta.finish_reason is FinishReason.STOP and used == len(delta.token_ids):
            entries = entries[: used - 1]
        return [position(self._text, entry) for entry in entries]


def _cut(delta: TokenDelta) -> tuple[TokenDelta, TokenDelta | None]:
    """Return as much of a delta as is made text of in one go, and the rest."""
    logprobs = delta.logprobs
    if not logprobs or len(logprobs) <= LEAST_TOKENS:
        return delta, None
    tokens = max(LEAST_TOKENS, SLICE_ENTRIES // (len(logprobs[0].top) + 1))
    if len(logprobs) <= tokens:
        return delta, None
    part = msgspec.structs.replace(
        delta,
        token_ids=delta.token_ids[:tokens],
        finish_reason=None,
        logprobs=logprobs[:tokens],
    )
    rest = msgspec.structs.replace(
        delta, token_ids=delta.token_ids[tokens:], logprobs=logprobs[tokens:], prompt_logprobs=None
    )
    return part, rest

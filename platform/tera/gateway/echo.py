"""Echoes a prompt with its log-probabilities: computed once, sent to all its answers in slices.

A prompt of ten thousand tokens has up to sixty thousand entries. Decoding them in one go would
block every other stream for a second.
"""

import asyncio
from typing import Final

from tera.gateway.pieces import Answer, Piece, PositionLogprobs
from tera.gateway.render import TextModel
from tera.generation import TokenDelta, TokenLogprobs

SLICE_TOKENS: Final = 64
"""Prompt tokens in one piece of an answer. Their log-probabilities take up to 10 ms to decode, 1 ms
when the tokens have been seen before; then other tasks run."""


class EchoedPrompt:
    """A prompt that its answers begin with, with log-probabilities.

    They are the same for all samples, so only the first sample requests them from the engine. The
    samples' own text is held back until the prompt has been sent.
    """

    def __init__(self, text: str, token_ids: list[int], indexes: range) -> None:
        """`indexes` are those of the choices that echo the prompt."""
        self._text = text
        self._token_ids = token_ids
        self._indexes = indexes
        self._found: asyncio.Future[list[TokenLogprobs | None]]
        self._found = asyncio.get_running_loop().create_future()
        self._told = asyncio.Event()

    @property
    def is_told(self) -> bool:
        """Whether the whole prompt has been sent, so that the samples' text may follow."""
        return self._told.is_set()

    async def told(self) -> None:
        """Wait until the whole prompt has been sent."""
        await self._told.wait()

    def take(self, delta: TokenDelta) -> None:
        """Take the log-probabilities from the first delta of the first sample."""
        if not self._found.done():
            # Without log-probabilities from the engine, the tokens alone are sent.
            self._found.set_result(delta.prompt_logprobs or [None] * len(self._token_ids))

    async def tell(self, text: TextModel, answer: Answer) -> None:
        """Add the prompt to the choices that echo it, as fast as the client reads."""
        found = await self._found
        for start in range(0, len(self._token_ids), SLICE_TOKENS):
            tokens = slice(start, start + SLICE_TOKENS)
            positions = _positions(text, self._token_ids[tokens], found[tokens])
            for index in self._indexes:
                await answer.free()
                answer.add(Piece(index, "" if start else self._text, logprobs=positions))
                await asyncio.sleep(0)
        self._told.set()


def _positions(
    text: TextModel, token_ids: list[int], found: list[TokenLogprobs | None]
) -> list[PositionLogprobs]:
    return [
        PositionLogprobs(token, None, []) if entry is None else position(text, entry)
        for token, entry in zip(text.token_texts(token_ids), found, strict=True)
    ]


def position(text: TextModel, entry: TokenLogprobs) -> PositionLogprobs:
    """Return the log-probabilities at one position as text."""
    token, *top = text.token_texts([entry.token_id, *(token_id for token_id, _ in entry.top)])
    likely = [(name, logprob) for name, (_, logprob) in zip(top, entry.top, strict=True)]
    return PositionLogprobs(token, entry.logprob, likely)


def echoed_prompts(
    prompts: list[list[int]], echoes: list[str | None], n: int
) -> list[EchoedPrompt]:
    """Return the prompts to be echoed, each by its `n` answers."""
    return [
        EchoedPrompt(echo or "", prompt, range(place * n, (place + 1) * n))
        for place, (prompt, echo) in enumerate(zip(prompts, echoes, strict=True))
    ]

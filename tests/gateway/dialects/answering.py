"""A dialect's answers, made of pieces that tests own: as events, and as one object."""

import asyncio
import json
from collections.abc import Sequence
from random import Random
from typing import Any

from tests.gateway.conftest import Client, exchange

from tera.contract.chat_answers import FunctionCallDelta, ToolCallDelta
from tera.gateway.dialects import openai
from tera.gateway.dialects.base import Question
from tera.gateway.pieces import Piece, PositionLogprobs
from tera.gateway.relay import Events, Outbox
from tera.gateway.render import TokenText
from tera.generation import FinishReason

LAST = b"data: [DONE]\n\n"


async def streamed(question: Question, pieces: Sequence[Piece]) -> list[Any]:
    """Return the JSON of the events that pieces become, each of which came in a turn of its own."""
    client = Client()
    its_exchange = exchange(client.send)
    its_exchange.prompt_tokens = 7
    events = Events(client.send, Outbox(), keep_alive_s=3600, hang_up=lambda: None)
    answer = question.streamed(its_exchange, events)
    for piece in pieces:
        answer.add(piece)
        its_exchange.completion_tokens += 1
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    await events.close(answer.end())
    events.stop()
    assert client.body.endswith(LAST)
    blocks = client.body.removesuffix(LAST).split(b"\n\n")[:-1]
    return [json.loads(block.removeprefix(b"data: ")) for block in blocks]


def whole(question: Question, pieces: Sequence[Piece]) -> Any:
    """Return the one object that pieces become."""
    its_exchange = exchange()
    its_exchange.prompt_tokens = 7
    answer = question.whole(its_exchange)
    assert not answer.blocked
    for piece in pieces:
        answer.add(piece)
        its_exchange.completion_tokens += 1
    return json.loads(answer.body())


# What JSON escapes, and what stands in a shape in the place of the text.
WORDS = ["", "", "a", "é🚀", '"quoted\\', "two\nlines\u2028", "\x00", openai.mark()]


def drawn_pieces(seed: int, choices: int, *, logprobs: bool, chat: bool) -> list[Piece]:
    """Return the pieces of some answer, the choices in any order among each other."""
    draw = Random(seed)

    def token() -> TokenText:
        text = draw.choice(WORDS)
        return TokenText(text, text.encode())

    def position() -> PositionLogprobs:
        return PositionLogprobs(token(), -0.5, [(token(), -0.5) for _ in range(draw.randrange(3))])

    def call() -> ToolCallDelta:
        index = draw.randrange(3)
        function = FunctionCallDelta("get", draw.choice(WORDS))
        return ToolCallDelta(index, f"call_{index}", "function", function)

    def piece(index: int, finish: FinishReason | None) -> Piece:
        return Piece(
            index,
            draw.choice(WORDS),
            finish,
            draw.choice(WORDS) if chat else "",
            [call() for _ in range(draw.choice([0, 0, 1, 2]))] if chat else (),
            [position() for _ in range(draw.randrange(3))] if logprobs else None,
        )

    order = [index for index in range(choices) for _ in range(draw.randrange(1, 6))]
    draw.shuffle(order)
    ends = {index: at for at, index in enumerate(order)}
    return [
        piece(index, draw.choice(list(FinishReason)) if ends[index] == at else None)
        for at, index in enumerate(order)
    ]

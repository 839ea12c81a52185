"""Answers in the making, from deltas that come in any order."""

import json
from collections.abc import AsyncGenerator

from tera.contract.chat import ChatRequest
from tera.gateway.answers import ChatAnswer
from tera.gateway.call import Call, ChatDelta
from tera.gateway.render import AnswerPiece

REQUEST = ChatRequest.model_validate(
    {"model": "m", "messages": [{"role": "user", "content": "x"}], "n": 3}
)


async def deltas(*indexes: int) -> AsyncGenerator[ChatDelta]:
    for index in indexes:
        yield ChatDelta(index, AnswerPiece(f"{index}"), None)


async def test_t2_choices_begin_in_the_order_of_their_index() -> None:
    answer = ChatAnswer(REQUEST, Call("req_0", "/v1/chat/completions", 0.0, 0.0))
    events = [event async for event in answer.events(deltas(2, 0, 1, 2))]
    found = [json.loads(event.removeprefix(b"data: "))["choices"][0] for event in events]
    assert [(choice["index"], choice["delta"]) for choice in found] == [
        (0, {"role": "assistant", "content": ""}),
        (1, {"role": "assistant", "content": ""}),
        (2, {"role": "assistant", "content": "2"}),
        (0, {"content": "0"}),
        (1, {"content": "1"}),
        (2, {"content": "2"}),
    ]

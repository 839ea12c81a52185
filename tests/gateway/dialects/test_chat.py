"""Chat answers in the making, from pieces that come in any order."""

from typing import Any

import pytest
from tests.gateway.dialects.answering import drawn_pieces, streamed, whole

from tera.contract.chat_answers import FunctionCallDelta, ToolCallDelta
from tera.gateway.dialects.chat import ChatQuestion
from tera.gateway.pieces import Piece
from tera.gateway.request import Conversation
from tera.generation import FinishReason

TOOL = {"type": "function", "function": {"name": "get", "parameters": {"type": "object"}}}
NAMED = {"type": "function", "function": {"name": "get"}}


def question(**fields: Any) -> ChatQuestion:
    messages = [{"role": "user", "content": "x"}]
    return ChatQuestion({"model": "m", "messages": messages, **fields})


def choices_of(chunks: list[Any], index: int) -> list[Any]:
    return [each for chunk in chunks for each in chunk["choices"] if each["index"] == index]


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize(
    ("logprobs", "usage"), [(True, False), (False, True)], ids=["logprobs", "usage"]
)
async def test_s4_a_streams_events_add_up_to_the_whole_answer(
    seed: int, logprobs: bool, usage: bool
) -> None:
    pieces = drawn_pieces(seed, 3, logprobs=logprobs, chat=True)
    fields: dict[str, Any] = {"n": 3, "tools": [TOOL]}
    if logprobs:
        fields |= {"logprobs": True, "top_logprobs": 2}
    said = whole(question(**fields), pieces)
    options = {"stream": True, "stream_options": {"include_usage": usage}}
    chunks = await streamed(question(**fields, **options), pieces)
    if usage:
        *chunks, last = chunks
        assert (last["choices"], last["usage"]) == ([], said["usage"])
    assert all(chunk.get("usage") is None for chunk in chunks)
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1
    for index, wanted in enumerate(said["choices"]):
        mine = choices_of(chunks, index)
        assert mine[0]["delta"]["role"] == "assistant"
        assert not any("role" in each["delta"] for each in mine[1:])
        message = wanted["message"]
        assert _joined(mine, "content") == (message["content"] or "")
        assert _joined(mine, "reasoning_content") == message.get("reasoning_content", "")
        told_calls = [call["function"] for call in message.get("tool_calls", [])]
        assert [function for _, function in sorted(_calls(mine).items())] == told_calls
        assert [each["finish_reason"] for each in mine if each["finish_reason"]] == [
            wanted["finish_reason"]
        ]
        assert mine[-1]["finish_reason"] is not None
        told = [each["logprobs"]["content"] for each in mine if each["logprobs"] is not None]
        entries = wanted["logprobs"] and wanted["logprobs"]["content"]
        assert [entry for part in told for entry in part] == (entries or [])


def _joined(choices: list[Any], name: str) -> str:
    return "".join(each["delta"].get(name) or "" for each in choices)


def _calls(choices: list[Any]) -> dict[int, dict[str, str]]:
    found: dict[int, dict[str, str]] = {}
    for each in choices:
        for call in each["delta"].get("tool_calls", ()):
            function = found.setdefault(call["index"], {"name": "", "arguments": ""})
            function["name"] = call["function"]["name"]
            function["arguments"] += call["function"]["arguments"]
    return found


async def test_t2_choices_begin_in_the_order_of_their_index() -> None:
    pieces = [Piece(index, f"{index}") for index in (2, 0, 1, 2)]
    chunks = await streamed(question(n=3, stream=True), pieces)
    found = [chunk["choices"][0] for chunk in chunks]
    assert [(choice["index"], choice["delta"]) for choice in found] == [
        (0, {"role": "assistant", "content": ""}),
        (1, {"role": "assistant", "content": ""}),
        (2, {"role": "assistant", "content": "2"}),
        (0, {"content": "0"}),
        (1, {"content": "1"}),
        (2, {"content": "2"}),
    ]


async def test_s2_a_piece_that_says_nothing_is_no_event() -> None:
    second = ToolCallDelta(1, "call_1", "function", FunctionCallDelta("get", "{}"))
    pieces = [
        Piece(0, ""),
        Piece(0, "", logprobs=[]),
        Piece(0, "a"),
        Piece(0, "", tool_calls=[second]),
        Piece(0, "", FinishReason.LENGTH),
    ]
    chunks = await streamed(question(stream=True, tools=[TOOL], parallel_tool_calls=False), pieces)
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [
        {"role": "assistant", "content": "a"},
        {},
    ]


CALLS = [
    ToolCallDelta(index, f"call_{index}", "function", FunctionCallDelta("get", "{}"))
    for index in range(2)
]


@pytest.mark.parametrize(
    ("fields", "ends", "finish", "calls"),
    [
        pytest.param({}, "stop", "tool_calls", 2, id="chosen by the model"),
        pytest.param({"tool_choice": "required"}, "stop", "tool_calls", 2, id="required"),
        pytest.param({"tool_choice": NAMED}, "stop", "stop", 2, id="named by the client"),
        pytest.param({"parallel_tool_calls": False}, "stop", "tool_calls", 1, id="one at most"),
        pytest.param({}, "length", "length", 2, id="cut"),
    ],
)
@pytest.mark.parametrize("apart", [True, False], ids=["calls before the end", "calls with the end"])
async def test_t2_calls_of_tools_are_why_an_answer_ends(
    fields: dict[str, Any], ends: str, finish: str, calls: int, apart: bool
) -> None:
    reason = FinishReason(ends)
    pieces = [Piece(0, "", reason, tool_calls=CALLS)]
    if apart:
        pieces = [Piece(0, "", tool_calls=CALLS), Piece(0, "", reason)]
    said = whole(question(tools=[TOOL], **fields), pieces)["choices"][0]
    assert said["finish_reason"] == finish
    assert len(said["message"]["tool_calls"]) == calls
    assert said["message"]["content"] is None
    chunks = await streamed(question(tools=[TOOL], stream=True, **fields), pieces)
    mine = choices_of(chunks, 0)
    assert mine[-1]["finish_reason"] == finish
    assert len(_calls(mine)) == calls


def test_t1_a_question_is_read_into_what_the_pipeline_knows() -> None:
    asked = question(
        n=2,
        stop=["x"],
        max_completion_tokens=5,
        logprobs=True,
        top_logprobs=3,
        tools=[TOOL],
        tool_choice="auto",
        parallel_tool_calls=False,
        temperature=0,
        stream=True,
    )
    request = asked.request
    assert asked.stream
    assert isinstance(request.content, Conversation)
    assert request.content.messages == [{"role": "user", "content": "x"}]
    assert [tool["function"]["name"] for tool in request.content.tools or ()] == ["get"]
    assert request.content.tool_choice == "auto"
    assert request.content.parallel_tool_calls is False
    assert (request.capability, request.n, request.max_tokens) == ("chat", 2, 5)
    assert (request.stops, request.sampling.logprobs) == (["x"], 3)
    assert request.sampling.prompt_logprobs is None


@pytest.mark.parametrize(
    ("fields", "logprobs"),
    [({}, None), ({"logprobs": False}, None), ({"logprobs": True}, 0)],
    ids=["unsaid", "off", "without alternatives"],
)
def test_t1_without_a_bound_or_logprobs_none_is_made_up(
    fields: dict[str, Any], logprobs: int | None
) -> None:
    request = question(**fields).request
    assert request.max_tokens is None
    assert request.sampling.logprobs == logprobs

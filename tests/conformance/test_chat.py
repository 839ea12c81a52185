"""Rules T: `POST /v1/chat/completions`."""

import json
import math
import re
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from tests.conformance.answers import accepted, assert_refused, chunks, contents
from tests.conformance.gateways import ABSENT, Gateway, InProcessGateway

TYPE, VALUE, UNSUPPORTED = "invalid_type", "invalid_value", "unsupported_parameter"
MISSING = "missing_required_parameter"


def said(role: str, content: Any = "Hello", **members: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **members}


CALL = {"id": "call_1", "type": "function", "function": {"name": "clock", "arguments": "{}"}}
TOOL = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object"}}}

CONVERSATIONS = [
    pytest.param([said("user")], id="user"),
    pytest.param([said("system", "Be brief."), said("user")], id="system"),
    pytest.param([said("developer", "Be brief."), said("user")], id="developer"),
    pytest.param([said("user"), said("assistant"), said("user")], id="assistant"),
    pytest.param([said("user", name="Ada")], id="name"),
    pytest.param([said("user", [{"type": "text", "text": "Hello"}])], id="text-part"),
    pytest.param(
        [said("user", [{"type": "text", "text": "é"}, {"type": "text", "text": "日🚀"}])],
        id="text-parts",
    ),
    pytest.param([said("user"), said("assistant", None), said("user")], id="assistant-of-null"),
    pytest.param(
        [said("user"), said("assistant", [{"type": "refusal", "refusal": "No."}]), said("user")],
        id="refusal-part",
    ),
    pytest.param([said("user", "")], id="empty-text"),
    pytest.param([said("user", unknown=1)], id="unknown-member"),
]


@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_t1_conversations_are_accepted(text_gateway: Gateway, messages: list[Any]) -> None:
    accepted(text_gateway.chat(messages=messages))


def test_t1_tool_calls_and_their_results_are_part_of_a_conversation(gateway: Gateway) -> None:
    messages = [
        said("user"),
        {"role": "assistant", "tool_calls": [CALL]},
        said("tool", "12:00", tool_call_id="call_1"),
        said("tool", [{"type": "text", "text": "12:00"}], tool_call_id="call_1"),
    ]
    accepted(gateway.chat(messages=messages))


ACCEPTED: list[tuple[str, list[Any]]] = [
    ("max_completion_tokens", [1, 2, 3.0]),
    ("max_tokens", [1, 3.0]),
    ("temperature", [0, 2, 0.5]),
    ("top_p", [0, 1]),
    ("top_k", [-1, 0, 2**31 - 1]),
    ("min_p", [0, 1]),
    ("repetition_penalty", [0.1, 2]),
    ("stop", ["x", ["a", "b", "c", "d"], []]),
    ("seed", [2**63 - 1, -(2**63)]),
    ("stream", [False, True]),
    ("n", [1, 3]),
    ("logprobs", [False, True]),
    ("presence_penalty", [-2, 2]),
    ("frequency_penalty", [-2, 2]),
    ("logit_bias", [{}, {"65": -100}]),
    ("response_format", [{"type": "text"}]),
    ("tool_choice", ["none"]),
    ("parallel_tool_calls", [True, False]),
    ("chat_template_kwargs", [{}, {"enable_thinking": False}]),
    ("modalities", [["text"]]),
    ("user", ["", "x" * 512]),
    ("unknown", [1, "x", {"y": []}]),
    ("best_of", ["no field of chat's"]),
    ("store", [True]),
    ("metadata", [{"a": "b"}]),
    ("service_tier", ["auto"]),
]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        pytest.param(name, value, id=f"{name}={json.dumps(value)[:40]}")
        for name, values in ACCEPTED
        for value in values
    ],
)
def test_t1_accepts(gateway: Gateway, name: str, value: Any) -> None:
    fields = {"max_tokens": ABSENT} if name == "max_completion_tokens" else {}
    answer = gateway.chat(**{**fields, name: value})
    assert answer.status_code == 200, answer.text


REFUSED: list[tuple[str, dict[str, Any], str, str]] = [
    ("no-messages", {"messages": []}, VALUE, "messages"),
    ("messages-text", {"messages": "Hello"}, TYPE, "messages"),
    ("message-text", {"messages": ["Hello"]}, TYPE, "messages[0]"),
    ("no-role", {"messages": [{"content": "x"}]}, MISSING, "messages[0].role"),
    ("role", {"messages": [said("robot")]}, VALUE, "messages[0].role"),
    ("role-number", {"messages": [said("user"), {"role": 5}]}, TYPE, "messages[1].role"),
    ("no-content", {"messages": [said("user", None)]}, MISSING, "messages[0].content"),
    ("content-number", {"messages": [said("user", 5)]}, TYPE, "messages[0].content"),
    ("content-object", {"messages": [said("user", {})]}, TYPE, "messages[0].content"),
    ("part-text", {"messages": [said("user", ["x"])]}, TYPE, "messages[0].content[0]"),
    (
        "part-type",
        {"messages": [said("user", [{"type": "smell"}])]},
        VALUE,
        "messages[0].content[0].type",
    ),
    (
        "part-without-text",
        {"messages": [said("user", [{"type": "text", "text": 5}])]},
        TYPE,
        "messages[0].content[0].text",
    ),
    ("part-no-type", {"messages": [said("user", [{}])]}, MISSING, "messages[0].content[0].type"),
    (
        "part-no-text",
        {"messages": [said("user", [{"type": "text", "text": None}])]},
        MISSING,
        "messages[0].content[0].text",
    ),
    (
        "call-no-name",
        {"messages": [said("assistant", tool_calls=[{**CALL, "function": {"arguments": ""}}])]},
        MISSING,
        "messages[0].tool_calls[0].function.name",
    ),
    (
        "call-empty-name",
        {"messages": [said("assistant", tool_calls=[{**CALL, "id": ""}])]},
        VALUE,
        "messages[0].tool_calls[0].id",
    ),
    (
        "image",
        {
            "messages": [
                said(
                    "user", [{"type": "text", "text": "x"}, {"type": "image_url", "image_url": {}}]
                )
            ]
        },
        UNSUPPORTED,
        "messages[0].content[1]",
    ),
    (
        "audio",
        {"messages": [said("user", [{"type": "input_audio", "input_audio": {}}])]},
        UNSUPPORTED,
        "messages[0].content[0]",
    ),
    ("tool-without-call", {"messages": [said("tool")]}, MISSING, "messages[0].tool_call_id"),
    ("both-bounds", {"max_completion_tokens": 5, "max_tokens": 6}, VALUE, "max_tokens"),
    ("bound-zero", {"max_completion_tokens": 0}, VALUE, "max_completion_tokens"),
    ("bound-text", {"max_completion_tokens": "5"}, TYPE, "max_completion_tokens"),
    ("logprobs-number", {"logprobs": 5}, TYPE, "logprobs"),
    ("top-without", {"top_logprobs": 2}, VALUE, "top_logprobs"),
    ("top-with-false", {"top_logprobs": 2, "logprobs": False}, VALUE, "top_logprobs"),
    ("top-zero-without", {"top_logprobs": 0}, VALUE, "top_logprobs"),
    ("top-21", {"top_logprobs": 21, "logprobs": True}, VALUE, "top_logprobs"),
    ("top-negative", {"top_logprobs": -1, "logprobs": True}, VALUE, "top_logprobs"),
    ("temperature", {"temperature": 2.1}, VALUE, "temperature"),
    ("top_p", {"top_p": -0.1}, VALUE, "top_p"),
    ("n", {"n": 129}, VALUE, "n"),
    ("n-zero", {"n": 0}, VALUE, "n"),
    ("stop-five", {"stop": ["a"] * 5}, VALUE, "stop"),
    ("stop-empty", {"stop": ["a", ""]}, VALUE, "stop[1]"),
    ("seed", {"seed": 2**63}, VALUE, "seed"),
    ("penalty", {"presence_penalty": 2.5}, VALUE, "presence_penalty"),
    ("bias", {"logit_bias": {"x": 1}}, VALUE, "logit_bias"),
    ("format-text", {"response_format": "json"}, TYPE, "response_format"),
    ("format-kind", {"response_format": {"type": "xml"}}, VALUE, "response_format.type"),
    (
        "format-no-kind",
        {"response_format": {}},
        MISSING,
        "response_format.type",
    ),
    (
        "format-no-schema",
        {"response_format": {"type": "json_schema"}},
        MISSING,
        "response_format.json_schema",
    ),
    ("no-tools", {"tools": []}, VALUE, "tools"),
    ("tools-object", {"tools": {}}, TYPE, "tools"),
    ("tool-kind", {"tools": [{"type": "web_search"}]}, VALUE, "tools[0].type"),
    (
        "tool-name",
        {"tools": [{"type": "function", "function": {"name": "no spaces"}}]},
        VALUE,
        "tools[0].function.name",
    ),
    ("tools", {"tools": [TOOL]}, UNSUPPORTED, "tools"),
    ("choice-without-tools", {"tool_choice": "auto"}, VALUE, "tool_choice"),
    ("choice-kind", {"tool_choice": "maybe", "tools": [TOOL]}, VALUE, "tool_choice"),
    ("parallel", {"parallel_tool_calls": 1}, TYPE, "parallel_tool_calls"),
    ("kwargs", {"chat_template_kwargs": []}, TYPE, "chat_template_kwargs"),
    ("functions", {"functions": []}, UNSUPPORTED, "functions"),
    ("audio-out", {"modalities": ["text", "audio"]}, UNSUPPORTED, "modalities"),
    ("user", {"user": "x" * 513}, VALUE, "user"),
]


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [pytest.param(fields, code, param, id=name) for name, fields, code, param in REFUSED],
)
def test_t1_refuses(gateway: Gateway, fields: dict[str, Any], code: str, param: str) -> None:
    error = assert_refused(gateway.chat(**fields), code, param)
    assert param in error["message"]


BOUNDED: list[tuple[str, int, Callable[[int], dict[str, Any]], str]] = [
    # The context of no gateway here holds so many, so what passes the bound fails at that.
    ("messages", 2048, lambda n: {"messages": [{"role": "assistant"}] * n}, "messages"),
    (
        "parts",
        2048,
        lambda n: {"messages": [said("user", [{"type": "text", "text": ""}] * n)]},
        "messages[0].content",
    ),
    (
        "calls",
        128,
        lambda n: {"messages": [said("user"), said("assistant", tool_calls=[CALL] * n)]},
        "messages[1].tool_calls",
    ),
    ("tools", 128, lambda n: {"tools": [TOOL] * n, "tool_choice": "none"}, "tools"),
]


@pytest.mark.parametrize(
    ("most", "fields", "param"),
    [pytest.param(most, fields, param, id=name) for name, most, fields, param in BOUNDED],
)
def test_x1_what_a_conversation_holds_is_bounded(
    gateway: Gateway, most: int, fields: Callable[[int], dict[str, Any]], param: str
) -> None:
    answer = gateway.chat(**fields(most))
    assert answer.status_code == 200 or answer.json()["error"]["code"] == "context_length_exceeded"
    error = assert_refused(gateway.chat(**fields(most + 1)), VALUE, param)
    for number in (most, most + 1):
        assert str(number) in error["message"]


def test_x1_a_long_array_is_refused_for_its_length_whatever_is_in_it(gateway: Gateway) -> None:
    for fields in ({"messages": [0] * 3000}, {"tools": [0] * 3000}, {"modalities": [0] * 3000}):
        error = assert_refused(gateway.chat(**fields), VALUE, next(iter(fields)))
        assert "3000" in error["message"]


def test_t1_both_names_of_the_bound_may_agree(gateway: Gateway) -> None:
    answer = accepted(gateway.chat(max_completion_tokens=2, max_tokens=2))
    assert answer["usage"]["completion_tokens"] <= 2


def test_t1_either_name_bounds_the_answer(text_gateway: Gateway) -> None:
    for fields in ({"max_tokens": 2}, {"max_completion_tokens": 2, "max_tokens": ABSENT}):
        answer = accepted(text_gateway.chat(**fields))
        assert answer["usage"]["completion_tokens"] == 2
        assert answer["choices"][0]["finish_reason"] == "length"


def test_t1_without_a_bound_the_context_is_the_bound(in_process: InProcessGateway) -> None:
    endless = {"max_tokens": ABSENT, "logit_bias": {"256": -100}}
    answer = accepted(in_process.chat(**endless))
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["total_tokens"] == in_process.context_tokens


def test_t1_a_conversation_over_the_context_is_refused(gateway: Gateway) -> None:
    messages = [said("user", "x" * gateway.context_tokens)]
    for max_tokens in (ABSENT, 1):
        answer = gateway.chat(messages=messages, max_tokens=max_tokens)
        error = assert_refused(answer, "context_length_exceeded", answer.json()["error"]["param"])
        assert str(gateway.context_tokens) in error["message"]


def test_t1_a_seed_repeats_an_answer(text_gateway: Gateway) -> None:
    sampled = partial(text_gateway.chat, temperature=1, n=2, max_tokens=20)
    answers = text_gateway.together(*(partial(sampled, seed=seed) for seed in (5, 5, 6)))
    first, again, other = (accepted(answer)["choices"] for answer in answers)
    assert first == again != other


def test_t1_the_answer_ends_before_a_stop_string(text_gateway: Gateway) -> None:
    asked = {"messages": [said("user", "Tell me a story.")], "max_tokens": 40}
    text = accepted(text_gateway.chat(**asked))["choices"][0]["message"]["content"]
    stop = text[len(text) // 2 :][:4]
    whole, streamed = text_gateway.together(
        partial(text_gateway.chat, **asked, stop=stop),
        partial(text_gateway.chat, **asked, stop=[stop], stream=True),
    )
    [choice] = accepted(whole)["choices"]
    assert choice["message"]["content"] == text[: text.index(stop)]
    assert choice["finish_reason"] == "stop"
    assert contents(chunks(streamed)) == {0: text[: text.index(stop)]}


def test_t2_the_response_has_exactly_these_members(text_gateway: Gateway) -> None:
    answer = accepted(text_gateway.chat(user="somebody", n=2))
    assert set(answer) == {"id", "object", "created", "model", "choices", "usage"}
    assert re.fullmatch(r"chatcmpl-[0-9a-f]{32}", answer["id"])
    assert answer["object"] == "chat.completion"
    assert type(answer["created"]) is int
    assert abs(answer["created"] - time.time()) < 60
    assert answer["model"] == text_gateway.model
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    for choice in answer["choices"]:
        assert set(choice) == {"index", "message", "logprobs", "finish_reason"}
        assert choice["logprobs"] is None
        assert choice["finish_reason"] in ("stop", "length")
        message = choice["message"]
        assert set(message) == {"role", "content", "refusal"}
        assert (message["role"], message["refusal"]) == ("assistant", None)
        assert isinstance(message["content"], str)
    usage = answer["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert set(usage["prompt_tokens_details"]) == {"cached_tokens"}


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("include_usage", [False, True])
def test_t2_a_stream_has_openais_shape(text_gateway: Gateway, n: int, include_usage: bool) -> None:
    options = {"stream_options": {"include_usage": True}} if include_usage else {}
    asked = {"messages": [said("user", "Tell me a story.")], "n": n, "max_tokens": 8}
    whole = accepted(text_gateway.chat(**asked))
    found = chunks(text_gateway.chat(**asked, stream=True, **options))
    members = {"id", "object", "created", "model", "choices", *(["usage"] if include_usage else [])}
    if include_usage:
        *found, last = found
        assert last["choices"] == []
        assert last["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
        assert set(last) == members
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in found}) == 1
    deltas: dict[int, list[Any]] = {}
    finishes: dict[int, list[Any]] = {}
    for chunk in found:
        assert set(chunk) == members
        assert chunk.get("usage") is None
        assert chunk["object"] == "chat.completion.chunk"
        assert re.fullmatch(r"chatcmpl-[0-9a-f]{32}", chunk["id"])
        for choice in chunk["choices"]:
            assert set(choice) == {"index", "delta", "logprobs", "finish_reason"}
            deltas.setdefault(choice["index"], []).append(choice["delta"])
            finishes.setdefault(choice["index"], []).append(choice["finish_reason"])
    # OpenAI's client cannot gather choices whose first chunks come in another order.
    assert list(deltas) == list(range(n))
    for choice in whole["choices"]:
        first, *others = deltas[choice["index"]]
        assert first["role"] == "assistant"
        assert not any("role" in delta for delta in others)
        assert finishes[choice["index"]] == [None] * len(others) + [choice["finish_reason"]]
        text = "".join(delta.get("content") or "" for delta in [first, *others])
        assert text == choice["message"]["content"]


@pytest.mark.parametrize("top", [None, 0, 1, 20])
def test_t2_logprobs_have_openais_form(text_gateway: Gateway, top: int | None) -> None:
    asked = {"max_tokens": 6, "logprobs": True, "top_logprobs": top}
    [choice] = accepted(text_gateway.chat(**asked))["choices"]
    assert set(choice["logprobs"]) == {"content", "refusal"}
    assert choice["logprobs"]["refusal"] is None
    positions = choice["logprobs"]["content"]
    assert "".join(position["token"] for position in positions) == choice["message"]["content"]
    for position in positions:
        assert set(position) == {"token", "logprob", "bytes", "top_logprobs"}
        assert math.isfinite(position["logprob"])
        assert position["logprob"] <= 0
        assert len(position["top_logprobs"]) == (top or 0)
        if "\ufffd" not in position["token"]:
            assert bytes(position["bytes"]).decode() == position["token"]
        for likely in position["top_logprobs"]:
            assert set(likely) == {"token", "logprob", "bytes"}
        if top:
            found = [likely["logprob"] for likely in position["top_logprobs"]]
            assert found == sorted(found, reverse=True)
            assert found[0] >= position["logprob"]
    streamed = chunks(text_gateway.chat(**asked, stream=True))
    tokens = [
        position["token"]
        for chunk in streamed
        for position in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]
    ]
    assert tokens == [position["token"] for position in positions]


@pytest.mark.parametrize("stream", [False, True])
def test_t2_an_answer_that_ends_at_once_says_nothing(gateway: Gateway, stream: bool) -> None:
    answer = gateway.chat(logit_bias={"256": 100}, stream=stream)
    if stream:
        [chunk] = chunks(answer)
        assert chunk["choices"][0]["delta"]["role"] == "assistant"
        assert chunk["choices"][0]["finish_reason"] == "stop"
    else:
        [choice] = accepted(answer)["choices"]
        assert (choice["message"]["content"], choice["finish_reason"]) == ("", "stop")


def test_t4_a_model_that_only_chats_completes_nothing(in_process: InProcessGateway) -> None:
    accepted(in_process.chat(model="Sim/Chat-Only"))
    answer = in_process.complete(model="Sim/Chat-Only")
    assert_refused(answer, "unsupported_parameter", "model")


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [TOOL]},
        {"tools": [TOOL], "tool_choice": "required"},
        {"reasoning_effort": "low"},
    ],
    ids=["tools", "forced", "reasoning"],
)
def test_t1_what_the_model_has_no_parser_for_is_never_dropped(
    text_gateway: Gateway, fields: dict[str, Any]
) -> None:
    assert_refused(text_gateway.chat(**fields), "unsupported_parameter", next(iter(fields)))


def test_t1_tools_that_must_not_be_used_need_no_parser(gateway: Gateway) -> None:
    accepted(gateway.chat(tools=[TOOL], tool_choice="none"))

"""Rules H-2 and E-1: whatever is sent, the answer is one that the contract knows."""

import json
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.conformance.answers import (
    ERRORS,
    assert_envelope,
    assert_identified,
    events,
)
from tests.conformance.gateways import InProcessGateway

ROUTES = ["/v1/completions", "/v1/chat/completions"]
BOUNDED = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-5, 5)
    | st.sampled_from([2**31, 2**53 + 1, 2**63, -(2**63) - 1, 10**300, 1e308, -0.0, 5e-324])
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20)
    | st.sampled_from(["", "sim/small", "user", "text", "none", "auto", "\x00", "🚀", "e\u0301"])
)
values: st.SearchStrategy[Any] = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)

NAMES = [
    *("model", "prompt", "messages", "max_tokens", "max_completion_tokens", "temperature"),
    *("top_p", "top_k", "min_p", "repetition_penalty", "stop", "seed", "stream", "n", "best_of"),
    *("stream_options", "logprobs", "top_logprobs", "echo", "presence_penalty", "user"),
    *("frequency_penalty", "logit_bias", "suffix", "response_format", "tools", "tool_choice"),
    *("parallel_tool_calls", "chat_template_kwargs", "reasoning_effort", "modalities", "functions"),
]


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the path of every value inside of a JSON value."""
    inside: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        inside = list(value.items())
    elif isinstance(value, list):
        inside = list(enumerate(value))
    return [path] + [found for key, each in inside for found in places(each, (*path, key))]


def changed(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """Return the value with another one at a place."""
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = changed(value[path[0]], path[1:], new)
    return copy


@st.composite
def mutated(draw: st.DrawFn, valid: dict[str, Any]) -> dict[str, Any]:
    """Return a valid body with some places changed and some fields added."""
    body = dict(valid)
    for _ in range(draw(st.integers(1, 3))):
        if draw(st.booleans()):
            body[draw(st.sampled_from(NAMES))] = draw(values)
        else:
            path = draw(st.sampled_from(places(body)[1:]))
            body = changed(body, path, draw(values))
    return body


def assert_known(answer: httpx.Response) -> None:
    """Fail unless the answer is a success or an error that the client caused."""
    assert_identified(answer)
    if answer.status_code != 200:
        error = assert_envelope(answer.content)
        assert (answer.status_code, error["type"]) == ERRORS[error["code"]]
        assert answer.status_code in (400, 404), answer.text
    elif answer.headers["content-type"].startswith("text/event-stream"):
        found = events(answer.content)
        assert found[-1] == b"[DONE]"
        assert not any("error" in json.loads(data) for data in found[:-1])
    else:
        assert "choices" in answer.json()


@pytest.mark.parametrize("path", ROUTES)
def test_h2_any_json_is_answered(in_process: InProcessGateway, path: str) -> None:
    @BOUNDED
    @given(values | st.dictionaries(st.sampled_from(NAMES), values, max_size=6))
    def answers(body: Any) -> None:
        assert_known(in_process.post(path, body))

    answers()


@pytest.mark.parametrize("path", ROUTES)
def test_h2_a_valid_body_with_changes_is_answered(in_process: InProcessGateway, path: str) -> None:
    full = {
        "stop": ["x", "é"],
        "seed": 5,
        "n": 2,
        "stream": True,
        "stream_options": {"include_usage": True},
        "logit_bias": {"65": 1.5},
        "user": "somebody",
    }
    valid = (
        in_process.completion(prompt=["One", "Two"], logprobs=2, echo=True, **full)
        if path == "/v1/completions"
        else in_process.conversation(
            messages=[
                {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
                {"role": "user", "content": "Hello", "name": "Ada"},
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [
                        {"id": "1", "type": "function", "function": {"name": "f", "arguments": ""}}
                    ],
                },
                {"role": "tool", "content": "x", "tool_call_id": "1"},
            ],
            logprobs=True,
            top_logprobs=2,
            response_format={"type": "text"},
            tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}],
            tool_choice="none",
            **full,
        )
    )
    assert in_process.post(path, valid).status_code == 200

    @BOUNDED
    @given(mutated(valid))
    def answers(body: dict[str, Any]) -> None:
        assert_known(in_process.post(path, body))

    answers()


@pytest.mark.parametrize("path", ROUTES)
def test_h2_any_bytes_are_answered(in_process: InProcessGateway, path: str) -> None:
    make = in_process.completion if path == "/v1/completions" else in_process.conversation
    valid = json.dumps(make()).encode()

    @BOUNDED
    @given(st.data())
    def answers(data: st.DataObject) -> None:
        start, end = sorted(data.draw(st.tuples(*[st.integers(0, len(valid))] * 2)))
        content = valid[:start] + data.draw(st.binary(max_size=6)) + valid[end:]
        assert_known(in_process.post(path, content))

    answers()


def test_h2_any_path_and_method_are_answered(in_process: InProcessGateway) -> None:
    parts = st.sampled_from(["v1", "models", "completions", "chat", "..", "", "%2F", "é", "x"])
    methods = st.sampled_from(["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "BREW"])

    @BOUNDED
    @given(methods, st.lists(parts, max_size=4).map("/".join).filter(lambda it: it[:1] != "/"))
    def answers(method: str, path: str) -> None:
        answer = in_process.request(method, f"/{path}", content=b"{")
        assert_identified(answer)
        assert answer.status_code in (200, 400, 404, 405)
        if answer.status_code != 200 and method != "HEAD":
            error = assert_envelope(answer.content)
            assert (answer.status_code, error["type"]) == ERRORS[error["code"]]

    answers()


def test_h2_any_authorization_is_answered(in_process: InProcessGateway) -> None:
    @BOUNDED
    @given(st.binary(max_size=40), st.booleans())
    def answers(value: bytes, bearer: bool) -> None:
        shown = (b"Bearer " if bearer else b"") + value
        answer = in_process.request("GET", "/v1/models", headers={"authorization": shown})
        assert answer.status_code == 401
        assert_envelope(answer.content)

    answers()

"""Rules S: what streams are made of, byte by byte."""

import json
from collections.abc import Callable
from functools import partial
from typing import Any

import httpx
import pytest
from tests.conformance.answers import (
    accepted,
    assert_envelope,
    assert_refused,
    chunks,
    contents,
    events,
    texts,
)
from tests.conformance.gateways import Gateway, InProcessGateway

UNICODE = {
    "latin": "naïve café über",
    "cjk": "日本語の文章、中国的文字。한국어",
    "emoji": "🚀😀👩‍🚀🇫🇷👍🏽",
    "combining-marks": "e\u0301o\u0308a\u20d7",
    "right-to-left": "שלום مرحبا سلام",
    "indic-and-thai": "नमस्ते ไทย",
    "mixed": "mixed: é日🚀 x",
}
USAGE = {"stream_options": {"include_usage": True}}


def both_ways(
    gateway: Gateway, ask: Callable[..., httpx.Response], *requests: dict[str, Any]
) -> list[tuple[list[Any], list[Any]]]:
    """Return the choices of each request's answer, and the chunks of its stream."""
    answers = gateway.together(
        *(partial(ask, **asked, stream=stream) for asked in requests for stream in (False, True))
    )
    return [
        (accepted(whole)["choices"], chunks(streamed))
        for whole, streamed in zip(answers[::2], answers[1::2], strict=True)
    ]


@pytest.mark.parametrize("fields", [{}, USAGE, {"n": 3}, {"logprobs": 2}, {"echo": True}], ids=str)
def test_s1_a_completions_stream_is_events_of_one_object_each(
    text_gateway: Gateway, fields: dict[str, Any]
) -> None:
    answer = text_gateway.complete(stream=True, max_tokens=10, **fields)
    assert chunks(answer)
    assert answer.content.endswith(b"\n\ndata: [DONE]\n\n")
    assert answer.content.count(b"[DONE]") == 1


def test_s1_a_chat_stream_is_events_of_one_object_each(text_gateway: Gateway) -> None:
    answer = text_gateway.chat(stream=True, max_tokens=10, **USAGE)
    assert chunks(answer)
    assert answer.content.count(b"[DONE]") == 1


def test_s1_a_line_break_in_the_text_is_none_in_the_stream(in_process: InProcessGateway) -> None:
    newline = {"10": 100}  # the byte's own token, again and again
    answer = in_process.complete(stream=True, logit_bias=newline)
    assert texts(chunks(answer)) == {0: "\n\n\n"}


@pytest.mark.parametrize(("fields", "usage"), [({}, False), (USAGE, True)], ids=["bare", "usage"])
def test_s2_a_chunk_is_a_response_without_usage(
    text_gateway: Gateway, fields: dict[str, Any], usage: bool
) -> None:
    asked = {"prompt": ["One", "Two"], "n": 2, "max_tokens": 5}
    found = chunks(text_gateway.complete(stream=True, **asked, **fields))
    pieces = [chunk for chunk in found if chunk["choices"]]
    members = {"id", "object", "created", "model", "choices"} | ({"usage"} if usage else set())
    for chunk in pieces:
        assert set(chunk) == members
        assert chunk["object"] == "text_completion"
        assert chunk.get("usage") is None
        for choice in chunk["choices"]:
            assert set(choice) == {"text", "index", "logprobs", "finish_reason"}
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in found}) == 1
    assert {choice["index"] for chunk in pieces for choice in chunk["choices"]} == {0, 1, 2, 3}


@pytest.mark.parametrize("n", [1, 3])
def test_s2_each_choice_ends_exactly_once_with_its_last_chunk(
    text_gateway: Gateway, n: int
) -> None:
    found = chunks(text_gateway.complete(stream=True, prompt=["One", "Two"], n=n, max_tokens=6))
    reasons: dict[int, list[str | None]] = {}
    for chunk in found:
        for choice in chunk["choices"]:
            reasons.setdefault(choice["index"], []).append(choice["finish_reason"])
    assert set(reasons) == set(range(2 * n))
    for *before, last in reasons.values():
        assert set(before) <= {None}
        assert last in ("stop", "length")


def test_s2_ids_are_new_in_each_stream(gateway: Gateway) -> None:
    found = {chunks(gateway.complete(stream=True))[0]["id"] for _ in range(4)}
    assert len(found) == 4


def test_s3_usage_comes_in_one_more_chunk_without_choices(text_gateway: Gateway) -> None:
    asked: dict[str, Any] = {"prompt": [[65, 66], [67]], "n": 2, "max_tokens": 5}
    whole = accepted(text_gateway.complete(**asked))
    *pieces, last = chunks(text_gateway.complete(**asked, stream=True, **USAGE))
    assert all(piece["usage"] is None and piece["choices"] for piece in pieces)
    assert last["choices"] == []
    details = {"prompt_tokens_details": None}
    assert {**last["usage"], **details} == {**whole["usage"], **details}
    assert set(last["usage"]) == set(whole["usage"])


@pytest.mark.parametrize("options", [None, {}, {"include_usage": False}], ids=str)
def test_s3_usage_comes_only_where_it_is_asked_for(gateway: Gateway, options: Any) -> None:
    for ask in (gateway.complete, gateway.chat):
        found = chunks(ask(stream=True, stream_options=options))
        assert all(chunk["choices"] and "usage" not in chunk for chunk in found)


def test_s4_a_stream_adds_up_to_the_whole_text(text_gateway: Gateway) -> None:
    asked = [{"prompt": prompt, "max_tokens": 30} for prompt in UNICODE.values()]
    for [choice], found in both_ways(text_gateway, text_gateway.complete, *asked):
        assert texts(found) == {0: choice["text"]}
        assert found[-1]["choices"][0]["finish_reason"] == choice["finish_reason"]


def test_s4_a_chat_stream_adds_up_to_the_whole_answer(text_gateway: Gateway) -> None:
    asked = [
        {"messages": [{"role": "user", "content": prompt}], "max_tokens": 30}
        for prompt in UNICODE.values()
    ]
    for [choice], found in both_ways(text_gateway, text_gateway.chat, *asked):
        assert contents(found) == {0: choice["message"]["content"]}


@pytest.mark.parametrize(
    "prompt", [pytest.param(prompt, id=name) for name, prompt in UNICODE.items()]
)
def test_s4_no_chunk_splits_a_character(gateway: Gateway, prompt: str) -> None:
    # The simulated engine spells one character in twelve, byte by byte; only the last may be
    # cut, by max_tokens.
    found = chunks(gateway.complete(prompt=prompt, max_tokens=200, stream=True))
    pieces = [chunk["choices"][0]["text"] for chunk in found]
    assert len(pieces) > 20
    assert "\ufffd" not in "".join(pieces)[:-1]


def test_s4_an_echo_streams_as_it_is(text_gateway: Gateway) -> None:
    asked = [{"prompt": prompt, "max_tokens": 10, "echo": True} for prompt in UNICODE.values()]
    found = both_ways(text_gateway, text_gateway.complete, *asked)
    for prompt, ([choice], streamed) in zip(UNICODE.values(), found, strict=True):
        assert choice["text"].startswith(prompt)
        assert texts(streamed) == {0: choice["text"]}


@pytest.mark.parametrize(
    "asked",
    [
        pytest.param({"prompt": ["One", "日本", "🚀"]}, id="prompts"),
        pytest.param({"temperature": 1, "seed": 11}, id="samples"),
    ],
)
def test_s4_many_choices_add_up_each_for_itself(
    text_gateway: Gateway, asked: dict[str, Any]
) -> None:
    asked = {**asked, "n": 2, "max_tokens": 20}
    [(choices, streamed)] = both_ways(text_gateway, text_gateway.complete, asked)
    assert texts(streamed) == {choice["index"]: choice["text"] for choice in choices}


def test_s4_no_part_of_a_stop_string_gets_out(text_gateway: Gateway) -> None:
    asked = {"prompt": "Once upon a time", "max_tokens": 25}
    text = accepted(text_gateway.complete(**asked))["choices"][0]["text"]
    stops = [
        text[at : at + length]
        for length in (1, 4, 20)
        for at in (0, len(text) // 2, len(text) - length)
    ]
    answers = text_gateway.together(
        *(
            partial(text_gateway.complete, **asked, stop=["\ufffd\ufffd", stop], stream=True)
            for stop in stops
        )
    )
    for stop, found in zip(stops, map(chunks, answers), strict=True):
        assert texts(found) == {0: text[: text.index(stop)]}
        assert found[-1]["choices"][0]["finish_reason"] == "stop"


def test_s4_what_only_began_as_a_stop_string_is_text(text_gateway: Gateway) -> None:
    asked = {"prompt": "Once upon a time", "max_tokens": 30}
    text = accepted(text_gateway.complete(**asked))["choices"][0]["text"]
    stops = [text[-4:] + "\u0000", text[3:9] + "\u0000"]
    found = chunks(text_gateway.complete(**asked, stop=stops, stream=True))
    assert texts(found) == {0: text}


@pytest.mark.parametrize("echo", [False, True])
def test_s4_logprobs_of_a_stream_add_up_to_the_whole(text_gateway: Gateway, echo: bool) -> None:
    asked = {"prompt": "Once upon é🚀", "max_tokens": 12, "logprobs": 2, "echo": echo}
    [([choice], found)] = both_ways(text_gateway, text_gateway.complete, asked)
    pieces = [chunk["choices"][0]["logprobs"] for chunk in found]
    for name in ("tokens", "text_offset"):
        parts = [part for piece in pieces if piece for part in piece[name]]
        assert parts == choice["logprobs"][name]
    logprobs = [part for piece in pieces if piece for part in piece["token_logprobs"]]
    assert logprobs == [
        None if each is None else pytest.approx(each, abs=1e-4)
        for each in choice["logprobs"]["token_logprobs"]
    ]


def test_s4_a_stream_of_a_single_token_is_whole(text_gateway: Gateway) -> None:
    [choice] = accepted(text_gateway.complete(max_tokens=1))["choices"]
    assert texts(chunks(text_gateway.complete(max_tokens=1, stream=True))) == {0: choice["text"]}


def test_s4_a_text_that_ends_at_once_is_one_chunk(gateway: Gateway) -> None:
    [chunk] = chunks(gateway.complete(stream=True, logit_bias={"256": 100}))
    assert chunk["choices"] == [{"text": "", "index": 0, "logprobs": None, "finish_reason": "stop"}]


@pytest.mark.slow
def test_s5_each_token_has_an_event_of_its_own(behind_haproxy: Gateway) -> None:
    # One token every ten milliseconds: nobody is behind, so nothing is held together.
    asked = {"prompt": "One", "max_tokens": 20, "stream": True}
    bias = {str(ord("x")): 100}
    found = chunks(behind_haproxy.complete(**asked, logit_bias=bias))
    assert [chunk["choices"][0]["text"] for chunk in found] == ["x"] * 20


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        pytest.param({"temperature": 3}, "invalid_value", "temperature", id="field"),
        pytest.param({"model": "nobody/none"}, "model_not_found", "model", id="model"),
        pytest.param({"max_tokens": 10**9}, "context_length_exceeded", "max_tokens", id="context"),
        pytest.param({"prompt": [10**9]}, "invalid_value", "prompt[0]", id="token"),
    ],
)
def test_s6_an_error_before_the_first_event_is_plain_http(
    gateway: Gateway, fields: dict[str, Any], code: str, param: str
) -> None:
    assert_refused(gateway.complete(stream=True, **fields), code, param)


@pytest.mark.parametrize("n", [1, 3])
def test_s6_a_later_error_is_an_event_and_the_end(in_process: InProcessGateway, n: int) -> None:
    asked = {"stream": True, "max_tokens": 400, "n": n, "logit_bias": {"256": -100}}
    messages = [{"role": "user", "content": "FAULT"}]
    answers = [
        in_process.complete(prompt="FAULT", **asked),
        in_process.chat(messages=messages, **asked),
    ]
    for answer in answers:
        assert answer.status_code == 200
        *pieces, last = events(answer.content)
        assert pieces
        assert all("error" not in json.loads(piece) for piece in pieces)
        error = assert_envelope(last)
        assert (error["type"], error["code"]) == ("server_error", "backend_failure")
        assert b"[DONE]" not in answer.content
    in_process.wait_until_idle()


@pytest.mark.parametrize(
    ("path", "model"),
    [("/v1/completions", "sim/stalled"), ("/v1/chat/completions", "sim/stuck")],
)
def test_s7_silence_is_broken_by_comments(
    in_process: InProcessGateway, path: str, model: str
) -> None:
    in_process.keep_alive_after(0.01)
    make = in_process.completion if path == "/v1/completions" else in_process.conversation
    readable = {str(ord("x")): 100}
    body = make(model=model, stream=True, max_tokens=50, logit_bias=readable)
    # After the one token come only comments, and the client leaves after two of them.
    comments = b": keep-alive\n\n: keep-alive\n\n"
    exchange = in_process.exchange(
        [json.dumps(body).encode()],
        path=path,
        hang_up_when=lambda so_far: b"data: " in so_far and so_far.endswith(comments),
    )
    before, _, token_and_after = exchange.body.partition(b"data: ")
    token, _, after = token_and_after.partition(b"\n\n")
    assert "choices" in json.loads(token)
    assert before.replace(b": keep-alive\n\n", b"") == b""
    assert after.replace(b": keep-alive\n\n", b"") == b""


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize(
    ("stream", "hang_up_after"),
    [
        pytest.param(False, 0, id="no-stream"),
        pytest.param(True, 0, id="before-the-first-event"),
        pytest.param(True, 3, id="in-mid-stream"),
    ],
)
def test_s8_a_hang_up_ends_the_generation(
    in_process: InProcessGateway, path: str, stream: bool, hang_up_after: int
) -> None:
    in_process.keep_alive_after(0.01)
    make = in_process.completion if path == "/v1/completions" else in_process.conversation
    # The model that stalls never ends by itself.
    body = make(model="sim/stalled", stream=stream, max_tokens=400, n=3)
    exchange = in_process.exchange(
        [json.dumps(body).encode()], path=path, hang_up_after=hang_up_after
    )
    in_process.wait_until_idle()
    assert all(message.get("status", 200) == 200 for message in exchange.sent)
    assert b"[DONE]" not in exchange.body


def test_s8_a_hang_up_is_counted_as_no_failure_of_ours(in_process: InProcessGateway) -> None:
    before = in_process.metrics.exposition()
    body = in_process.completion(model="sim/stalled", max_tokens=400)
    exchange = in_process.exchange([json.dumps(body).encode()], hang_up_after=0)
    assert exchange.sent == []
    gone = [
        line
        for line in in_process.metrics.exposition().splitlines()
        if line.startswith("tera_requests_total") and line not in before
    ]
    assert [line for line in gone if 'status="499"' in line]
    assert not [line for line in gone if 'status="500"' in line]

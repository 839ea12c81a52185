"""Rules C: what `POST /v1/completions` accepts and refuses."""

import json
import re
from functools import partial
from typing import Any

import pytest
from tests.conformance.answers import accepted, assert_refused
from tests.conformance.gateways import ABSENT, Gateway
from tests.conformance.refused import TYPE, VALUE, Refused, each

STREAM = {"stream": True}


def shown(name: str, value: Any) -> str:
    """Return a field as a test's id."""
    return f"{name}={json.dumps(value)[:40]}"


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"max_tokens": 3.0}, id="whole-float-as-integer"),
        pytest.param({"n": 1.0, "top_k": -1.0, "seed": 5.0}, id="whole-floats"),
        pytest.param({"prompt": [65.0, 66]}, id="whole-float-as-token"),
        pytest.param({"temperature": 0, "top_p": 1}, id="integer-as-number"),
        pytest.param({"unknown": 1, "engine": {"x": [1]}, "ignore_eos": True}, id="unknown-fields"),
        pytest.param({"": 1, "MODEL": 5, "Prompt": ""}, id="names-of-other-case"),
        pytest.param({"extra_body": {"top_k": "x"}, "guided_json": {}}, id="vllms-own"),
        pytest.param({"stream_options": {"include_usage": True, "x": 1}, **STREAM}, id="inside"),
        pytest.param({"functions": 5, "tools": "x"}, id="fields-of-chat"),
    ],
)
def test_c1_accepts(gateway: Gateway, fields: dict[str, Any]) -> None:
    answer = gateway.complete(**fields)
    assert answer.status_code == 200, answer.text


OPTIONAL = [
    *("max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "stop", "seed"),
    *("stream", "stream_options", "n", "best_of", "logprobs", "echo", "presence_penalty"),
    *("frequency_penalty", "logit_bias", "suffix", "user"),
]


def test_c1_null_is_absent(gateway: Gateway) -> None:
    nothing: dict[str, Any] = dict.fromkeys(OPTIONAL)
    answer = accepted(gateway.complete(**{**nothing, "seed": 7}))
    bare = {**dict.fromkeys(OPTIONAL, ABSENT), "seed": 7}
    assert answer["choices"] == accepted(gateway.complete(**bare))["choices"]


@pytest.mark.parametrize("name", OPTIONAL)
def test_c1_each_field_may_be_null(gateway: Gateway, name: str) -> None:
    accepted(gateway.complete(**{name: None}))


def test_c1_null_inside_stream_options_is_absent(gateway: Gateway) -> None:
    answer = gateway.complete(stream=True, stream_options={"include_usage": None})
    assert answer.status_code == 200
    assert b'"usage"' not in answer.content


UNKNOWN_TO_THE_ENGINE = {
    "ignore_eos": True,
    "min_tokens": 50,
    "stop_token_ids": [32],
    "prompt_logprobs": 3,
    "add_special_tokens": False,
    "truncate_prompt_tokens": 1,
    "use_beam_search": True,
    "priority": 5,
    "return_token_ids": True,
    "cache_salt": "x",
}


def test_c1_unknown_fields_reach_no_engine(text_gateway: Gateway) -> None:
    ask = partial(text_gateway.complete, max_tokens=20)
    plain, extended = text_gateway.together(ask, partial(ask, **UNKNOWN_TO_THE_ENGINE))
    assert accepted(plain)["choices"] == accepted(extended)["choices"]


ACCEPTED: list[tuple[str, list[Any]]] = [
    ("prompt", ["One", ["One"], ["One", "Two"], [65], [65, 66], [[65]], [[65, 66], [67]]]),
    ("prompt", ["é", "日本語", "🚀", "e\u0301", "مرحبا", "\u0000", " ", "\n", "\ufeff", "\uffff"]),
    ("prompt", [[65] * 200, ["x"] * 128, [[65]] * 128, [0], [256]]),
    ("max_tokens", [1, 2, 1.0]),
    ("temperature", [0, 2, 0.0, 2.0, 1, 0.5, 1e-300]),
    ("top_p", [0, 1, 0.0, 1.0, 0.5, 1e-300]),
    ("top_k", [-1, 0, 1, 40, 2**31 - 1]),
    ("min_p", [0, 1, 0.5]),
    ("repetition_penalty", [1e-9, 0.5, 1, 2, 2.0]),
    ("stop", ["x", " ", "\n", "🚀", ["x"], ["a", "b", "c", "d"], ["x", "x"], []]),
    ("seed", [0, 1, -1, 2**63 - 1, -(2**63), 42.0]),
    ("stream", [False, True]),
    ("n", [1, 2, 128]),
    ("best_of", [1, 1.0]),
    ("logprobs", [0, 1, 5]),
    ("echo", [False, True]),
    ("presence_penalty", [-2, 2, 0, 0.5]),
    ("frequency_penalty", [-2, 2, 0, 0.5]),
    ("logit_bias", [{}, {"65": -100}, {"65": 100, "66": -100.0}, {"65": 0}]),
    ("logit_bias", [{str(token): 0 for token in range(1024)}]),
    ("user", ["", "x" * 512, "🚀" * 512]),
]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        pytest.param(name, value, id=shown(name, value))
        for name, values in ACCEPTED
        for value in values
    ],
)
def test_c2_accepts(gateway: Gateway, name: str, value: Any) -> None:
    answer = gateway.complete(**{"max_tokens": 1, name: value})
    assert answer.status_code == 200, answer.text


REFUSED: list[Refused] = [
    ("model", "", VALUE, "model"),
    *each("model", TYPE, 5, True, ["sim/small"], {}),
    *each("prompt", VALUE, "", []),
    *each("prompt", TYPE, 5, True, 1.5, {"text": "x"}),
    ("prompt", [""], VALUE, "prompt[0]"),
    ("prompt", ["a", "b", ""], VALUE, "prompt[2]"),
    ("prompt", [[]], VALUE, "prompt[0]"),
    ("prompt", [[65], []], VALUE, "prompt[1]"),
    ("prompt", ["a", 5], TYPE, "prompt[1]"),
    ("prompt", ["a", [5]], TYPE, "prompt[1]"),
    ("prompt", ["a", None], TYPE, "prompt[1]"),
    ("prompt", [65, "a"], TYPE, "prompt[1]"),
    ("prompt", [65, [66]], TYPE, "prompt[1]"),
    ("prompt", [65, True], TYPE, "prompt[1]"),
    ("prompt", [65, 66.5], TYPE, "prompt[1]"),
    ("prompt", [65, None], TYPE, "prompt[1]"),
    ("prompt", [[65], "a"], TYPE, "prompt[1]"),
    ("prompt", [[65], 66], TYPE, "prompt[1]"),
    ("prompt", [[65], [66, "a"]], TYPE, "prompt[1][1]"),
    ("prompt", [None], TYPE, "prompt[0]"),
    ("prompt", [True], TYPE, "prompt[0]"),
    ("prompt", [{}], TYPE, "prompt[0]"),
    ("prompt", [0.5], TYPE, "prompt[0]"),
    ("prompt", ["x"] * 129, VALUE, "prompt"),
    ("prompt", [[65]] * 129, VALUE, "prompt"),
    ("prompt", [-1], VALUE, "prompt[0]"),
    ("prompt", [65, 10**9], VALUE, "prompt[1]"),
    ("prompt", [65, 10**30], VALUE, "prompt[1]"),
    ("prompt", [[65], [66, -5]], VALUE, "prompt[1][1]"),
    *each("max_tokens", VALUE, 0, -1, -(2**70)),
    *each("max_tokens", TYPE, "5", True, 1.5, [5], {}),
    *each("temperature", VALUE, -0.01, 2.01, -1, 3, 1e308),
    *each("temperature", TYPE, "1", True, [1], {}),
    *each("top_p", VALUE, -0.01, 1.01, 2, -(10**300)),
    *each("top_p", TYPE, "1", False, []),
    *each("top_k", VALUE, -2, 2**31, 2**70),
    *each("top_k", TYPE, "1", True, 1.5),
    *each("min_p", VALUE, -0.01, 1.01),
    *each("min_p", TYPE, "0", True),
    *each("repetition_penalty", VALUE, 0, -1, 2.01, 0.0),
    *each("repetition_penalty", TYPE, "1", True),
    ("stop", "", VALUE, "stop"),
    ("stop", ["a", "b", "c", "d", "e"], VALUE, "stop"),
    ("stop", ["a", ""], VALUE, "stop[1]"),
    ("stop", [""], VALUE, "stop[0]"),
    ("stop", [5], TYPE, "stop[0]"),
    ("stop", ["a", None], TYPE, "stop[1]"),
    ("stop", ["a", ["b"]], TYPE, "stop[1]"),
    *each("stop", TYPE, 5, True, {}),
    *each("seed", VALUE, 2**63, -(2**63) - 1, 10**30),
    *each("seed", TYPE, "1", True, 1.5),
    *each("stream", TYPE, "true", 1, 0, []),
    *each("n", VALUE, 0, -1, 129),
    *each("n", TYPE, "1", True, 1.5),
    *each("best_of", "unsupported_parameter", 2, 20),
    *each("best_of", TYPE, "1", True, 1.5),
    *each("logprobs", VALUE, -1, 6),
    *each("logprobs", TYPE, True, False, "1", 1.5),
    *each("echo", TYPE, 1, "true", []),
    *(
        (name, value, VALUE, name)
        for name in ("presence_penalty", "frequency_penalty")
        for value in (-2.01, 2.01)
    ),
    *(
        (name, value, TYPE, name)
        for name in ("presence_penalty", "frequency_penalty")
        for value in ("0", True)
    ),
    *each("logit_bias", TYPE, [], "x", 5),
    *(
        ("logit_bias", {key: 1}, VALUE, "logit_bias")
        for key in ("", "word", "-1", "1.0", " 65", "+65", "٦٥", "999999999", "9" * 30)
    ),
    ("logit_bias", {"65": 100.01}, VALUE, "logit_bias.65"),
    ("logit_bias", {"65": -101}, VALUE, "logit_bias.65"),
    ("logit_bias", {"65": "1"}, TYPE, "logit_bias.65"),
    ("logit_bias", {"65": True}, TYPE, "logit_bias.65"),
    ("logit_bias", {"65": []}, TYPE, "logit_bias.65"),
    ("logit_bias", {str(token): 0 for token in range(1025)}, VALUE, "logit_bias"),
    ("suffix", "end", "unsupported_parameter", "suffix"),
    *each("suffix", TYPE, 5, True),
    ("user", "x" * 513, VALUE, "user"),
    *each("user", TYPE, 5, True, []),
]


@pytest.mark.parametrize(
    ("name", "value", "code", "param"),
    REFUSED,
    ids=[shown(name, value) for name, value, _, _ in REFUSED],
)
def test_c2_refuses(gateway: Gateway, name: str, value: Any, code: str, param: str) -> None:
    error = assert_refused(gateway.complete(**{name: value}), code, param)
    assert param in error["message"]


@pytest.mark.parametrize(
    ("name", "value", "bounds"),
    [
        ("max_tokens", 0, ["1", "0"]),
        ("temperature", 2.5, ["2", "2.5"]),
        ("temperature", -0.5, ["0", "-0.5"]),
        ("top_k", 2**31, [str(2**31 - 1), str(2**31)]),
        ("seed", 2**63, [str(2**63 - 1), str(2**63)]),
        ("n", 129, ["128", "129"]),
        ("logprobs", 6, ["5", "6"]),
        ("presence_penalty", -3, ["-2", "-3"]),
        ("prompt", ["x"] * 129, ["128", "129"]),
        ("logit_bias", {str(token): 0 for token in range(1025)}, ["1024", "1025"]),
    ],
    ids=lambda it: it if isinstance(it, str) else "",
)
def test_c2_a_value_out_of_range_is_told_with_range_and_value(
    gateway: Gateway, name: str, value: Any, bounds: list[str]
) -> None:
    error = assert_refused(gateway.complete(**{name: value}), "invalid_value", name)
    for bound in bounds:
        assert re.search(rf"(?<![\d.-]){re.escape(bound)}(?![\d])", error["message"]), error


RANGES = [
    ("max_tokens", [0], "must be at least 1,"),
    ("temperature", [-1, 3], "must be from 0 to 2,"),
    ("top_p", [-1, 2], "must be from 0 to 1,"),
    ("top_k", [-2, 2**31], f"must be from -1 to {2**31 - 1},"),
    ("min_p", [-1, 2], "must be from 0 to 1,"),
    ("repetition_penalty", [0, 3], "must be above 0 and at most 2,"),
    ("seed", [-(2**63) - 1, 2**63], f"must be from {-(2**63)} to {2**63 - 1},"),
    ("n", [0, 129], "must be from 1 to 128,"),
    ("logprobs", [-1, 6], "must be from 0 to 5,"),
    ("presence_penalty", [-3, 3], "must be from -2 to 2,"),
    ("frequency_penalty", [-3, 3], "must be from -2 to 2,"),
]


@pytest.mark.parametrize(("name", "values", "told"), RANGES, ids=lambda it: str(it)[:20])
def test_t9_an_error_names_the_whole_range_whichever_end_was_missed(
    gateway: Gateway, name: str, values: list[int], told: str
) -> None:
    for value in values:
        error = assert_refused(gateway.complete(**{name: value}), "invalid_value", name)
        assert told in error["message"]


def test_c2_one_prompt_in_an_array_is_named_by_its_place(gateway: Gateway) -> None:
    assert_refused(gateway.complete(prompt=[[65, 10**9]]), "invalid_value", "prompt[0][1]")


def test_c2_the_last_token_of_the_vocabulary_is_accepted(text_gateway: Gateway) -> None:
    last = text_gateway.vocab_size - 1
    accepted(text_gateway.complete(prompt=[65, last], max_tokens=1))
    answer = text_gateway.complete(prompt=[65, last + 1], max_tokens=1)
    assert_refused(answer, "invalid_value", "prompt[1]")
    accepted(text_gateway.complete(logit_bias={str(last): -1}))
    answer = text_gateway.complete(logit_bias={str(last + 1): -1})
    assert_refused(answer, "invalid_value", "logit_bias")


@pytest.mark.parametrize("stream", [False, True])
def test_c2_prompt_and_max_tokens_may_fill_the_context_and_no_more(
    gateway: Gateway, stream: bool
) -> None:
    prompt = [65] * (gateway.context_tokens - 10)
    answer = gateway.complete(prompt=prompt, max_tokens=10, stream=stream)
    assert answer.status_code == 200
    for over in (11, 2**31, 2**63, 2**64, 10**30):
        answer = gateway.complete(prompt=prompt, max_tokens=over, stream=stream)
        assert_refused(answer, "context_length_exceeded", "max_tokens")


def test_c2_a_prompt_longer_than_the_context_is_refused(text_gateway: Gateway) -> None:
    for tokens in (text_gateway.context_tokens, 3 * text_gateway.context_tokens):
        answer = text_gateway.complete(prompt=[65] * tokens, max_tokens=1)
        error = assert_refused(answer, "context_length_exceeded", "prompt")
        assert str(tokens) in error["message"]


def test_x1_a_text_that_cannot_fit_is_refused_by_what_is_known_without_its_tokens(
    gateway: Gateway,
) -> None:
    asked = [
        (gateway.complete(prompt="1" * 50_000), "prompt"),
        (gateway.complete(prompt=["One", "1" * 50_000]), "prompt"),
        (gateway.chat(messages=[{"role": "user", "content": "1" * 50_000}]), "messages"),
    ]
    for answer, param in asked:
        error = assert_refused(answer, "context_length_exceeded", param)
        assert f"{gateway.context_tokens} tokens" in error["message"]
        assert re.search(r"at least \d{4,}", error["message"])


def test_c2_one_of_many_prompts_is_too_long(gateway: Gateway) -> None:
    prompts = [[65], [65] * (gateway.context_tokens + 1)]
    answer = gateway.complete(prompt=prompts, max_tokens=1)
    assert answer.json()["error"]["code"] == "context_length_exceeded"

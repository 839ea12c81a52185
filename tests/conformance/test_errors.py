"""Rules E and A: how a request is refused, and who may ask."""

import json
import logging
from typing import Any

import pytest
from tests.conformance.answers import accepted, assert_refused
from tests.conformance.gateways import ABSENT, Gateway, InProcessGateway

POSTS = ["/v1/completions", "/v1/chat/completions"]


def nested(levels: int) -> bytes:
    """Return arrays nested that deep."""
    return b"[" * levels + b"]" * levels


def with_member(gateway: Gateway, path: str, member: bytes) -> bytes:
    """Return a valid body of the route with one more member, as raw JSON."""
    make = gateway.completion if path == "/v1/completions" else gateway.conversation
    return json.dumps(make()).encode().removesuffix(b"}") + b", " + member + b"}"


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"   ", id="blank"),
        pytest.param(b"{", id="cut-off"),
        pytest.param(b"{} {}", id="two-values"),
        pytest.param(b"{}}", id="closed-twice"),
        pytest.param(b'{"a": [1}]', id="closed-crosswise"),
        pytest.param(b"{'model': 1}", id="single-quotes"),
        pytest.param(b'{"a": 1,}', id="trailing-comma"),
        pytest.param(b'{"a": /* why */ 1}', id="comment"),
        pytest.param(b'{"a": "line\nbreak"}', id="raw-control-character"),
        pytest.param(b'{"a": +1}', id="plus"),
        pytest.param(b'{"a": 01}', id="leading-zero"),
        pytest.param(b'{"a": .5}', id="no-integer-part"),
        pytest.param(b'{"a": 0x10}', id="hexadecimal"),
        pytest.param(b'{"a": "\\x41"}', id="unknown-escape"),
        pytest.param(b"[]", id="array"),
        pytest.param(b'"text"', id="string"),
        pytest.param(b"5", id="number"),
        pytest.param(b"null", id="null"),
        pytest.param(b"true", id="boolean"),
        pytest.param('{"a": "é"}'.encode("latin-1"), id="latin-1"),
        pytest.param('{"a": 1}'.encode("utf-16"), id="utf-16"),
        pytest.param(b'{"a": "\xed\xa0\x80"}', id="surrogate-in-utf-8"),
        pytest.param(b'{"a": "\xc0\x80"}', id="overlong"),
        pytest.param(b'{"a": "\xf4\x90\x80\x80"}', id="beyond-unicode"),
        pytest.param(b'{"a": "\xe2\x82"}', id="cut-off-character"),
        pytest.param(b"\x00", id="zero"),
    ],
)
def test_e2_what_is_no_json_object_is_invalid(gateway: Gateway, path: str, content: bytes) -> None:
    assert_refused(gateway.post(path, content), "invalid_json")


INVALID_MEMBERS = [
    pytest.param(b'"x": NaN', id="nan"),
    pytest.param(b'"x": Infinity', id="infinity"),
    pytest.param(b'"x": [-Infinity]', id="minus-infinity"),
    pytest.param(b'"x": 1e999', id="beyond-a-double"),
    pytest.param(b'"x": {"y": -1e999}', id="below-a-double"),
    pytest.param(b'"x": 1' + b"0" * 309, id="integer-beyond-a-double"),
    pytest.param(b'"x": ' + b"9" * 5000, id="integer-of-5000-digits"),
    pytest.param(b'"x": "\\ud800"', id="lone-high-surrogate"),
    pytest.param(b'"x": "\\udc00 text"', id="lone-low-surrogate"),
    pytest.param(b'"x": "\\udc00\\ud800"', id="swapped-surrogates"),
    pytest.param(b'"\\ud83d": 1', id="surrogate-in-a-key"),
    pytest.param(b'"x": [{"y": ["\\ud800"]}]', id="surrogate-inside"),
    pytest.param(b'"x": 1, "x": 1', id="key-twice"),
    pytest.param(b'"model": "sim/small"', id="known-key-twice"),
    pytest.param(b'"x": 1, "\\u0078": 2', id="key-twice-by-an-escape"),
    pytest.param(b'"x": [{"y": 1, "z": 2, "y": 1}]', id="key-twice-inside"),
    pytest.param(b'"x": ' + nested(64), id="65-levels"),
    pytest.param(b'"x": ' + b'{"y":' * 64 + b"1" + b"}" * 64, id="65-levels-of-objects"),
    pytest.param(b'"x": ' + nested(20_000), id="20000-levels"),
]


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize("member", INVALID_MEMBERS)
def test_e2_what_parsers_disagree_about_is_invalid_even_in_ignored_fields(
    gateway: Gateway, path: str, member: bytes
) -> None:
    assert_refused(gateway.post(path, with_member(gateway, path, member)), "invalid_json")


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize(
    "member",
    [
        pytest.param(b'"x": 1e308', id="large-double"),
        pytest.param(b'"x": 5e-324', id="small-double"),
        pytest.param(b'"x": 1e-999', id="zero-by-underflow"),
        pytest.param(b'"x": 1' + b"0" * 308, id="large-integer"),
        pytest.param(b'"x": "\\ud83d\\ude80"', id="surrogate-pair"),
        pytest.param(b'"x": "\\u0000"', id="zero"),
        pytest.param('"x": "🚀 \u2028"'.encode(), id="unescaped"),
        pytest.param(b'"x": {"y": 1}, "z": {"y": 1}', id="key-in-two-objects"),
        pytest.param(b'"X": 1, "x": 1', id="keys-of-other-case"),
        pytest.param(b'"x": ' + nested(63), id="64-levels"),
        pytest.param(b'"x": ' + b'{"y":' * 63 + b"1" + b"}" * 63, id="64-levels-of-objects"),
        pytest.param(b'"\\\\ud800": "\\\\udc00"', id="escaped-backslash"),
    ],
)
def test_e2_all_other_json_is_accepted(gateway: Gateway, path: str, member: bytes) -> None:
    accepted(gateway.post(path, with_member(gateway, path, member)))


# One wrong value for each field, in the order of the table, with codes of all kinds.
WRONG_COMPLETION: list[tuple[str, Any, str]] = [
    ("model", "", "invalid_value"),
    ("prompt", {}, "invalid_type"),
    ("max_tokens", 0, "invalid_value"),
    ("temperature", "1", "invalid_type"),
    ("top_p", 2, "invalid_value"),
    ("top_k", True, "invalid_type"),
    ("min_p", -1, "invalid_value"),
    ("repetition_penalty", [], "invalid_type"),
    ("stop", "", "invalid_value"),
    ("seed", "1", "invalid_type"),
    ("stream", 0, "invalid_type"),
    ("stream_options", 5, "invalid_type"),
    ("n", 0, "invalid_value"),
    ("best_of", "2", "invalid_type"),
    ("logprobs", 6, "invalid_value"),
    ("echo", "no", "invalid_type"),
    ("presence_penalty", 3, "invalid_value"),
    ("frequency_penalty", "0", "invalid_type"),
    ("logit_bias", [], "invalid_type"),
    ("suffix", "end", "unsupported_parameter"),
    ("user", 5, "invalid_type"),
]


@pytest.mark.parametrize("position", range(len(WRONG_COMPLETION)))
def test_e2_the_first_wrong_field_of_the_table_is_reported_whatever_its_code(
    gateway: Gateway, position: int
) -> None:
    name, _, code = WRONG_COMPLETION[position]
    # From last to first: the order in the body must not matter.
    fields = {name: value for name, value, _ in reversed(WRONG_COMPLETION[position:])}
    body = {**fields, **{k: v for k, v in gateway.completion().items() if k not in fields}}
    assert_refused(gateway.post("/v1/completions", body), code, name)


@pytest.mark.parametrize("code", ["invalid_type", "invalid_value", "unsupported_parameter"])
def test_e2_a_missing_field_is_reported_before_later_ones(gateway: Gateway, code: str) -> None:
    later = {field: value for field, value, its_code in WRONG_COMPLETION if its_code == code}
    fields = {**later, "model": ABSENT, "prompt": ABSENT}
    assert_refused(gateway.complete(**fields), "missing_required_parameter", "model")
    assert_refused(
        gateway.complete(**{**fields, "model": gateway.model}),
        "missing_required_parameter",
        "prompt",
    )


def test_e2_a_wrong_field_is_reported_before_a_missing_later_one(gateway: Gateway) -> None:
    assert_refused(gateway.complete(model=5, prompt=ABSENT), "invalid_type", "model")


@pytest.mark.parametrize("absent", [ABSENT, None])
def test_e2_required_fields_are_named(gateway: Gateway, absent: Any) -> None:
    for name in ("model", "prompt"):
        answer = gateway.complete(**{name: absent})
        assert_refused(answer, "missing_required_parameter", name)
    for name in ("model", "messages"):
        answer = gateway.chat(**{name: absent})
        assert_refused(answer, "missing_required_parameter", name)


def test_e2_an_empty_object_lacks_the_model(gateway: Gateway) -> None:
    for path in POSTS:
        assert_refused(gateway.post(path, {}), "missing_required_parameter", "model")


@pytest.mark.parametrize("path", POSTS)
def test_e2_too_long_a_context_is_told_with_all_three_numbers(gateway: Gateway, path: str) -> None:
    if path == "/v1/completions":
        answer = gateway.complete(prompt=[65] * 100, max_tokens=gateway.context_tokens)
        prompt_tokens = 100
    else:
        used = accepted(gateway.chat())["usage"]
        prompt_tokens = used["prompt_tokens"]
        answer = gateway.chat(max_tokens=gateway.context_tokens)
    error = assert_refused(answer, "context_length_exceeded", "max_tokens")
    for number in (gateway.context_tokens, prompt_tokens, gateway.context_tokens):
        assert str(number) in error["message"]


NOT_FOUND = "The model `{}` does not exist or is not deployed, or you do not have access to it."


@pytest.mark.parametrize("name", ["nobody/none", "sim/dead", "SIM/small", "sim/small ", "é🚀"])
def test_e2_a_model_that_is_not_there_and_one_that_is_not_allowed_are_the_same(
    in_process: InProcessGateway, name: str
) -> None:
    key = in_process.make_key(models=("sim/small",))
    answers = [
        in_process.post("/v1/completions", in_process.completion(model=name), key=key),
        in_process.post("/v1/chat/completions", in_process.conversation(model=name), key=key),
        in_process.request("GET", f"/v1/models/{name}", key=key),
    ]
    for answer in answers:
        error = assert_refused(answer, "model_not_found", "model")
        assert error["message"] == NOT_FOUND.format(name)


def test_h9_a_name_is_repeated_up_to_256_characters(in_process: InProcessGateway) -> None:
    name = "nobody/" + "x" * 20_000
    for answer in (
        in_process.complete(model=name),
        in_process.chat(model=name),
        in_process.request("GET", f"/v1/models/{name}"),
    ):
        error = assert_refused(answer, "model_not_found", "model")
        assert error["message"] == NOT_FOUND.format(name[:256] + "…")


def test_e2_a_failing_backend_is_told_as_such(in_process: InProcessGateway) -> None:
    for stream in (False, True):
        assert_refused(in_process.complete(model="sim/dead", stream=stream), "backend_failure")
        assert_refused(in_process.chat(model="sim/dead", stream=stream), "backend_failure")


def test_e3_a_failed_request_leaves_nothing_behind(in_process: InProcessGateway) -> None:
    for prompt in ("FAULT", ["One", "FAULT", "Two"]):
        answer = in_process.complete(prompt=prompt, max_tokens=100, n=3)
        assert_refused(answer, "backend_failure")
    in_process.wait_until_idle()
    accepted(in_process.complete())


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER", "bEaReR"])
def test_a1_the_scheme_is_case_insensitive(gateway: Gateway, scheme: str) -> None:
    headers = {"authorization": f"{scheme} {gateway.key}"}
    accepted(gateway.request("GET", "/v1/models", headers=headers))
    accepted(gateway.post("/v1/completions", gateway.completion(), headers=headers))


PROTECTED = [
    ("GET", "/v1/models"),
    ("GET", "/v1/models/sim/small"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
    ("GET", "/openapi.json"),
]


@pytest.mark.parametrize(("method", "path"), PROTECTED)
def test_a1_without_a_key_one_is_asked_for(gateway: Gateway, method: str, path: str) -> None:
    for url in (path, f"{path}?api_key={gateway.key}"):
        answer = gateway.request(method, url, key=None, headers={"x-api-key": gateway.key})
        assert_refused(answer, "missing_api_key")
        assert answer.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(("method", "path"), PROTECTED)
def test_a1_no_wrong_key_can_be_told_from_another(gateway: Gateway, method: str, path: str) -> None:
    key = gateway.key
    swapped = key[:-1] + ("0" if key[-1] != "0" else "1")
    shown: list[str | bytes] = [
        f"Bearer {swapped}",
        f"Bearer {key[:-1]}",
        f"Bearer {key}x",
        f"Bearer {key.upper()}",
        f"Bearer {key} {key}",
        f"Bearer {key},",
        f'Bearer "{key}"',
        "Bearer sk-tera-",
        f"Bearer sk-tera-{'0' * 42}",
        "Bearer sk-other",
        "Bearer",
        f"Bearer{key}",
        f"Basic {key}",
        f"Token {key}",
        key,
        "Bearer " + "x" * 4000,
        "Bearer \xff\xfe".encode("latin-1"),
    ]
    answers = [gateway.request(method, path, headers={"authorization": each}) for each in shown]
    for answer in answers:
        assert_refused(answer, "invalid_api_key")
        assert answer.headers["www-authenticate"] == "Bearer"
    assert len({answer.content for answer in answers}) == 1
    names = {tuple(sorted({*answer.headers} - {"date"})) for answer in answers}
    assert len(names) == 1


def test_a1_revoked_expired_and_unknown_keys_are_the_same(in_process: InProcessGateway) -> None:
    revoked = in_process.make_key()
    expiring = in_process.make_key(expires_s=in_process.now_s + 60)
    for key in (revoked, expiring):
        accepted(in_process.request("GET", "/v1/models", key=key))
    in_process.revoke(revoked)
    in_process.now_s += 60
    answers = [
        in_process.request("GET", "/v1/models", key=key)
        for key in (revoked, expiring, "sk-tera-unknown")
    ]
    for answer in answers:
        assert_refused(answer, "invalid_api_key")
    assert len({answer.content for answer in answers}) == 1


def test_a4_no_part_of_a_key_is_shown_logged_or_counted(
    in_process: InProcessGateway, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    wrong = in_process.key[:-1] + ("0" if in_process.key[-1] != "0" else "1")
    answers = [
        in_process.complete(),
        in_process.complete(model="sim/defective"),
        in_process.complete(model=5),
        in_process.request("GET", "/v1/models", key=wrong),
        in_process.request("GET", "/nothing"),
    ]
    told = [f"{answer.headers} {answer.text}" for answer in answers]
    told += [caplog.text, in_process.metrics.exposition()]
    for text in told:
        assert in_process.key[8:20] not in text
        assert in_process.key[-8:] not in text
        assert wrong[-8:] not in text


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/metrics", "/metrics/all"])
def test_a5_health_and_metrics_need_no_key(gateway: Gateway, path: str) -> None:
    for key in (None, "sk-wrong"):
        assert gateway.request("GET", path, key=key).status_code == 200

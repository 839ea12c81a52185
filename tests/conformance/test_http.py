"""Rules H: what holds for every request and response."""

import json
from collections.abc import Mapping
from typing import Any

import httpx
import pytest
from tests.conformance.answers import accepted, assert_envelope, assert_identified, assert_refused
from tests.conformance.gateways import ABSENT, Gateway, InProcessGateway
from tests.conformance.requests import POSTS, PREFLIGHT, valid

TEXT = {"content-type": "text/plain"}


def padded(body: dict[str, Any], size: int) -> bytes:
    """Return the body as JSON of exactly that many bytes, by a field that is ignored."""
    short = json.dumps({**body, "padding": ""}).encode()
    return json.dumps({**body, "padding": "x" * (size - len(short))}).encode()


@pytest.mark.parametrize(
    ("method", "path", "code"),
    [
        pytest.param("POST", "/v1/nothing", "unknown_url", id="path-before-key"),
        pytest.param("GET", "/v1/completions", "method_not_allowed", id="method-before-key"),
        pytest.param("DELETE", "/v1/models", "method_not_allowed", id="models-method-before-key"),
    ],
)
def test_h1_the_route_comes_before_the_key(
    gateway: Gateway, method: str, path: str, code: str
) -> None:
    for key in (None, "sk-wrong"):
        assert_refused(gateway.request(method, path, key=key), code)


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize(
    ("content", "headers"),
    [
        pytest.param(b"x" * 100, TEXT, id="content-type"),
        pytest.param(b"{", {}, id="json"),
        pytest.param(b"{}", {}, id="fields"),
        pytest.param(b'{"model": "nobody/none", "prompt": "One"}', {}, id="model"),
    ],
)
def test_h1_the_key_comes_before_the_body(
    gateway: Gateway, path: str, content: bytes, headers: Mapping[str, str]
) -> None:
    for key, code in ((None, "missing_api_key"), ("sk-wrong", "invalid_api_key")):
        assert_refused(gateway.post(path, content, headers=headers, key=key), code)


def test_h1_the_key_comes_before_the_size(gateway: Gateway) -> None:
    large = b"x" * (gateway.max_body_bytes + 1)
    assert_refused(gateway.post("/v1/completions", large, key=None), "missing_api_key")


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize("key", [None, "sk-wrong"])
def test_h1_a_body_is_never_read_before_the_key_is_accepted(
    in_process: InProcessGateway, path: str, key: str | None
) -> None:
    exchange = in_process.exchange([b"{", b"}"], path=path, key=key)
    assert exchange.status == 401
    assert exchange.received == 0


@pytest.mark.parametrize("path", POSTS)
def test_h1_the_size_comes_before_the_content_type(gateway: Gateway, path: str) -> None:
    large = b"x" * (gateway.max_body_bytes + 1)
    assert_refused(gateway.post(path, large, headers=TEXT), "request_too_large")


@pytest.mark.parametrize("path", POSTS)
def test_h1_the_content_type_comes_before_the_json(gateway: Gateway, path: str) -> None:
    assert_refused(gateway.post(path, b"{", headers=TEXT), "unsupported_content_type")


@pytest.mark.parametrize("path", POSTS)
def test_h1_the_json_comes_before_the_fields(gateway: Gateway, path: str) -> None:
    assert_refused(gateway.post(path, b'{"model": 5, "n": 0, "n": 0}'), "invalid_json")


@pytest.mark.parametrize("path", POSTS)
def test_h1_the_fields_come_before_the_model(gateway: Gateway, path: str) -> None:
    body = valid(gateway, path, model="nobody/none", temperature=3)
    assert_refused(gateway.post(path, body), "invalid_value", "temperature")


@pytest.mark.parametrize("path", POSTS)
def test_h1_the_model_comes_before_the_context_length(gateway: Gateway, path: str) -> None:
    body = valid(gateway, path, model="nobody/none", max_tokens=10**9)
    assert_refused(gateway.post(path, body), "model_not_found", "model")


@pytest.mark.parametrize("path", POSTS)
def test_h1_the_context_length_comes_before_the_backend(
    in_process: InProcessGateway, path: str
) -> None:
    body = valid(in_process, path, model="sim/dead", max_tokens=10**9)
    assert_refused(in_process.post(path, body), "context_length_exceeded", "max_tokens")


CASES = [
    pytest.param("GET", "/v1/models", {}, None, 200, id="models"),
    pytest.param("HEAD", "/v1/models", {}, None, 200, id="head"),
    pytest.param("OPTIONS", "/v1/models", PREFLIGHT, None, 204, id="preflight"),
    pytest.param("OPTIONS", "/v1/models", {}, None, 405, id="options"),
    pytest.param("GET", "/nothing", {}, None, 404, id="unknown-url"),
    pytest.param("GET", "/v1/models/nobody/none", {}, None, 404, id="unknown-model"),
    pytest.param("PUT", "/v1/completions", {}, None, 405, id="wrong-method"),
    pytest.param("POST", "/v1/completions", {}, b"{", 400, id="invalid-json"),
    pytest.param("POST", "/v1/completions", {"authorization": "Bearer x"}, b"{}", 401, id="key"),
    pytest.param("POST", "/v1/completions", {}, b" " * 2_000_000, 413, id="too-large"),
    pytest.param("GET", "/healthz", {}, None, 200, id="health"),
]


@pytest.mark.parametrize(("method", "path", "headers", "content", "status"), CASES)
def test_h3_every_answer_carries_a_new_request_id(
    gateway: Gateway,
    method: str,
    path: str,
    headers: Mapping[str, str],
    content: bytes | None,
    status: int,
) -> None:
    answers = [gateway.request(method, path, headers=headers, content=content) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [status, status]
    assert len({assert_identified(answer) for answer in answers}) == 2


@pytest.mark.parametrize(("method", "path", "headers", "content", "status"), CASES)
@pytest.mark.parametrize("chosen", ["mine", f"req_{'0' * 32}"])
def test_h3_an_id_of_the_clients_own_is_not_echoed(
    gateway: Gateway,
    method: str,
    path: str,
    headers: Mapping[str, str],
    content: bytes | None,
    status: int,
    chosen: str,
) -> None:
    sent = {**headers, "x-request-id": chosen}
    answer = gateway.request(method, path, headers=sent, content=content)
    assert answer.status_code == status
    assert assert_identified(answer) != chosen


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize("stream", [False, True])
def test_h3_completions_and_streams_carry_a_request_id(
    gateway: Gateway, path: str, stream: bool
) -> None:
    body = valid(gateway, path, stream=stream)
    answers = [gateway.post(path, body, headers={"x-request-id": "mine"}) for _ in range(2)]
    assert len({assert_identified(answer) for answer in answers}) == 2


@pytest.mark.parametrize("model", ["sim/dead", "sim/defective"])
def test_h3_failures_carry_a_request_id(in_process: InProcessGateway, model: str) -> None:
    answer = in_process.complete(model=model)
    assert answer.status_code == 500
    assert_identified(answer)


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/sim/small"])
def test_h4_json_is_declared_as_such(gateway: Gateway, path: str) -> None:
    assert gateway.request("GET", path).headers["content-type"] == "application/json"


@pytest.mark.parametrize("path", POSTS)
def test_h4_completions_are_declared_as_json(gateway: Gateway, path: str) -> None:
    answer = gateway.post(path, valid(gateway, path))
    assert answer.headers["content-type"] == "application/json"


@pytest.mark.parametrize("path", POSTS)
def test_h4_streams_are_events_that_nobody_keeps(gateway: Gateway, path: str) -> None:
    answer = gateway.post(path, valid(gateway, path, stream=True))
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["cache-control"] == "no-cache"
    assert answer.headers["x-accel-buffering"] == "no"


@pytest.mark.parametrize(
    ("path", "key", "status"),
    [
        pytest.param("/v1/models", "", 200, id="models"),
        pytest.param("/v1/models/sim/small", "", 200, id="model"),
        pytest.param("/v1/models/nobody/none", "", 404, id="unknown-model"),
        pytest.param("/v1/models", None, 401, id="no-key"),
        pytest.param("/healthz", None, 200, id="health"),
        pytest.param("/nothing", "", 404, id="unknown-url"),
        pytest.param("/v1/completions", "", 405, id="completions"),
        pytest.param("/v1/chat/completions", "", 405, id="chat"),
    ],
)
def test_h5_head_is_get_without_a_body(
    gateway: Gateway, path: str, key: str | None, status: int
) -> None:
    head, get = (gateway.request(method, path, key=key) for method in ("HEAD", "GET"))
    assert (head.status_code, get.status_code) == (status, status)
    assert head.content == b""
    assert head.headers["content-type"] == get.headers["content-type"]
    if status not in (404, 405):  # those messages name the method
        assert head.headers.get("content-length") == get.headers.get("content-length")


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/v1",
        "/v1/",
        "/v1/engines",
        "/v1/completions/",
        "/v1/chat/completions/",
        "/v1/chat",
        "/v1/models/",
        "/completions",
        "/V1/models",
        "//v1/models",
        "/v1/completions/more",
        "/docs",
        "/redoc",
        "/favicon.ico",
        "/%2e%2e/etc/passwd",
        "/v1/%2e%2e/metrics",
        "/v1/..%2fmetrics",
        "/%2d/routes",
    ],
)
def test_h6_unknown_paths_are_unknown_whatever_the_method(
    gateway: Gateway, method: str, path: str
) -> None:
    answer = gateway.request(method, path)
    assert_refused(answer, "unknown_url")
    assert "location" not in answer.headers


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("/v1/completions", {"POST"}),
        ("/v1/chat/completions", {"POST"}),
        ("/v1/models", {"GET", "HEAD"}),
        ("/v1/models/sim/small", {"GET", "HEAD"}),
    ],
)
def test_h6_a_wrong_method_is_told_the_right_ones(
    gateway: Gateway, path: str, allowed: set[str]
) -> None:
    for method in {"GET", "POST", "PUT", "PATCH", "DELETE"} - allowed:
        answer = gateway.request(method, path)
        assert_refused(answer, "method_not_allowed")
        assert {name.strip() for name in answer.headers["allow"].split(",")} - {"OPTIONS"} == (
            allowed
        )


def test_h6_a_query_changes_nothing(gateway: Gateway) -> None:
    accepted(gateway.request("GET", "/v1/models?limit=5&api_key=x"))
    accepted(gateway.post("/v1/completions?stream=true", gateway.completion()))


@pytest.mark.parametrize("path", POSTS)
def test_h7_a_body_of_exactly_the_limit_is_accepted(gateway: Gateway, path: str) -> None:
    content = padded(valid(gateway, path), gateway.max_body_bytes)
    accepted(gateway.post(path, content))


@pytest.mark.parametrize("path", POSTS)
def test_h7_one_byte_over_the_limit_is_too_large(gateway: Gateway, path: str) -> None:
    content = padded(valid(gateway, path), gateway.max_body_bytes + 1)
    error = assert_refused(gateway.post(path, content), "request_too_large")
    assert str(gateway.max_body_bytes) in error["message"]


def test_h7_a_declared_length_over_the_limit_is_refused_unread(
    in_process: InProcessGateway,
) -> None:
    for length in (in_process.max_body_bytes + 1, 10**40):
        exchange = in_process.exchange([b"x", b"x"], headers={"content-length": str(length)})
        assert exchange.status == 413
        assert exchange.read == 0
        assert json.loads(exchange.sent[1]["body"])["error"]["code"] == "request_too_large"


def test_h7_a_body_of_unknown_length_is_refused_as_soon_as_it_is_over_the_limit(
    in_process: InProcessGateway,
) -> None:
    pieces = [b" " * 1024] * 1000
    exchange = in_process.exchange(pieces)
    assert exchange.status == 413
    assert assert_envelope(exchange.body)["code"] == "request_too_large"
    assert exchange.received == in_process.max_body_bytes // 1024 + 1


def test_h7_a_body_of_unknown_length_may_have_exactly_the_limit(
    in_process: InProcessGateway,
) -> None:
    content = padded(in_process.completion(), in_process.max_body_bytes)
    pieces = [content[at : at + 1000] for at in range(0, len(content), 1000)]
    assert in_process.exchange(pieces).status == 200


@pytest.mark.parametrize(
    "content_type",
    [
        None,
        "application/json",
        "application/json; charset=utf-8",
        "application/json;charset=UTF-8",
        "Application/JSON",
        "application/json ; x=y",
    ],
)
def test_h8_json_is_accepted_however_it_is_written(
    gateway: Gateway, content_type: str | None
) -> None:
    headers = {} if content_type is None else {"content-type": content_type}
    accepted(gateway.post("/v1/completions", gateway.completion(), headers=headers))


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize(
    "headers",
    [
        {"content-type": "text/plain"},
        {"content-type": "text/json"},
        {"content-type": "application/jsonp"},
        {"content-type": "application/x-ndjson"},
        {"content-type": "application/x-www-form-urlencoded"},
        {"content-type": "multipart/form-data; boundary=x"},
        {"content-type": "application/problem+json"},
        {"content-type": "json"},
        {"content-type": "text/plain; application/json"},
        {"content-encoding": "gzip"},
        {"content-encoding": "br", "content-type": "application/json"},
        {"content-encoding": "GZIP"},
        {"content-encoding": "gzip, identity"},
    ],
    ids=str,
)
def test_h8_anything_but_plain_json_is_refused(
    gateway: Gateway, path: str, headers: Mapping[str, str]
) -> None:
    answer = gateway.post(path, valid(gateway, path), headers=headers)
    error = assert_refused(answer, "unsupported_content_type")
    given = headers.get("content-encoding") or headers["content-type"]
    assert given.split(";")[0].lower() in error["message"].lower()


def test_h8_a_body_without_content_type_must_parse(gateway: Gateway) -> None:
    assert_refused(gateway.post("/v1/completions", b"model=x"), "invalid_json")


@pytest.mark.parametrize("stream", [False, True])
def test_h9_a_defect_shows_nothing_of_the_inside(
    in_process: InProcessGateway, stream: bool
) -> None:
    answer = in_process.complete(model="sim/defective", stream=stream)
    error = assert_refused(answer, "internal_error")
    shown = f"{answer.headers} {error}"
    for secret in ("secret", "node-7", "RuntimeError", "Traceback", "abc#def"):
        assert secret not in shown


def test_h9_no_server_names_itself(gateway: Gateway) -> None:
    for answer in (gateway.request("GET", "/v1/models"), gateway.request("GET", "/nothing")):
        assert not {"server", "x-powered-by", "via"} & set(answer.headers)


def test_h9_a_request_is_shown_back_in_part_at_most(gateway: Gateway) -> None:
    secret = "confidential " * 100
    answers: list[httpx.Response] = [
        gateway.complete(prompt=[secret, 5]),
        gateway.complete(max_tokens=secret),
        gateway.complete(temperature=ABSENT, stop=[secret, 5]),
        gateway.post("/v1/completions", secret.encode()),
    ]
    for answer in answers:
        assert answer.status_code == 400
        assert "confidential confidential" not in answer.text

import re
from collections.abc import Iterator
from typing import Any

import pytest
from openapi_spec_validator import OpenAPIV31SpecValidator
from tests.contract.conftest import BROKEN_MODEL, CHAT_MODEL, CONTEXT_TOKENS, MODEL, Gateway
from tests.contract.document import (
    COMPONENTS,
    DOCUMENT,
    OPERATIONS,
    assert_described,
    assert_fits,
    codes,
    events,
    resolved,
)

from tera import errors
from tera.config.gateway import GatewayConfig
from tera.contract.chat import ChatRequest
from tera.contract.common import Request, parse_request
from tera.contract.completions import CompletionRequest
from tera.errors import ConfigError, TeraError

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "Hello"}]
WEATHER = {"type": "function", "function": {"name": "weather"}}


def test_document_is_valid_openapi_3_1() -> None:
    assert DOCUMENT["openapi"].startswith("3.1.")
    assert [error.message for error in OpenAPIV31SpecValidator(DOCUMENT).iter_errors()] == []


def test_operation_ids_are_unique_and_tags_declared() -> None:
    operations = OPERATIONS.values()
    assert len({operation["operationId"] for operation in operations}) == len(operations)
    used = {tag for operation in operations for tag in operation["tags"]}
    assert used == {tag["name"] for tag in DOCUMENT["tags"]}


def test_every_route_of_the_application_is_described(gateway: Gateway) -> None:
    def unnamed(path: str) -> str:
        return re.sub(r"\{[^}]*\}", "{}", path)

    routes = {
        (method, unnamed(route.path))
        for route in gateway.routes
        for method in set(route.methods or ()) - {"HEAD"}
    }
    assert routes == {(method, unnamed(path)) for method, path in OPERATIONS}


ERROR_TABLE = {
    (400, "invalid_request_error", "invalid_json"),
    (400, "invalid_request_error", "unsupported_content_type"),
    (400, "invalid_request_error", "missing_required_parameter"),
    (400, "invalid_request_error", "invalid_type"),
    (400, "invalid_request_error", "invalid_value"),
    (400, "invalid_request_error", "unsupported_parameter"),
    (400, "invalid_request_error", "context_length_exceeded"),
    (401, "authentication_error", "missing_api_key"),
    (401, "authentication_error", "invalid_api_key"),
    (404, "invalid_request_error", "model_not_found"),
    (404, "invalid_request_error", "unknown_url"),
    (405, "invalid_request_error", "method_not_allowed"),
    (413, "invalid_request_error", "request_too_large"),
    (429, "requests", "rate_limit_exceeded"),
    (429, "tokens", "rate_limit_exceeded"),
    (429, "requests", "concurrency_limit_exceeded"),
    (429, "insufficient_quota", "insufficient_quota"),
    (429, "overloaded", "engine_overloaded"),
    (500, "server_error", "backend_failure"),
    (500, "server_error", "internal_error"),
}


def _described_errors() -> set[tuple[int, str, str]]:
    return {
        (int(status), example["value"]["error"]["type"], example["value"]["error"]["code"])
        for operation in OPERATIONS.values()
        for status, response in operation["responses"].items()
        for example in _examples(resolved(response))
        if "error" in example["value"]
    }


def _examples(response: dict[str, Any]) -> list[Any]:
    json = response["content"].get("application/json", {})
    return [*json.get("examples", {}).values()]


def test_every_error_is_described() -> None:
    assert _described_errors() == ERROR_TABLE


def test_every_error_of_the_code_is_described() -> None:
    def below(kind: type[TeraError]) -> Iterator[type[TeraError]]:
        yield kind
        for child in kind.__subclasses__():
            yield from below(child)

    raised = {
        (kind.status, kind.type, kind.code)
        for kind in below(TeraError)
        # A wrong configuration reaches no tenant.
        if kind.__module__ == errors.__name__ and kind is not ConfigError
    }
    assert raised <= ERROR_TABLE


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        pytest.param(COMPLETIONS, CompletionRequest, id="completions"),
        pytest.param(CHAT, ChatRequest, id="chat"),
    ],
)
def test_example_requests_are_accepted(path: str, kind: type[Request]) -> None:
    content = DOCUMENT["paths"][path]["post"]["requestBody"]["content"]["application/json"]
    for example in content["examples"].values():
        parse_request(kind, example["value"])
        assert_fits(example["value"], content["schema"])


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_example_answers_fit_their_schema(method: str, path: str) -> None:
    for response in OPERATIONS[method, path]["responses"].values():
        for content in resolved(response)["content"].values():
            values = [example["value"] for example in content.get("examples", {}).values()]
            for value in [*values, *([content["example"]] if "example" in content else [])]:
                assert_fits(value, content["schema"])


def _bodies(path: str, extra: dict[str, Any]) -> dict[str, Any]:
    asked = {"prompt": "One"} if path == COMPLETIONS else {"messages": HELLO}
    return {"model": MODEL, "max_tokens": 4, **asked, **extra}


ANSWERED = [
    pytest.param(COMPLETIONS, {}, id="completion"),
    pytest.param(COMPLETIONS, {"prompt": [[1, 2], [3]], "n": 3, "echo": True}, id="batch"),
    pytest.param(COMPLETIONS, {"logprobs": 3, "echo": True}, id="logprobs"),
    pytest.param(COMPLETIONS, {"logprobs": 0, "n": 2}, id="no-alternatives"),
    pytest.param(COMPLETIONS, {"max_tokens": CONTEXT_TOKENS - 3}, id="whole-context"),
    pytest.param(CHAT, {}, id="chat"),
    pytest.param(CHAT, {"logprobs": True, "top_logprobs": 2, "n": 2}, id="chat-logprobs"),
    pytest.param(CHAT, {"max_tokens": None}, id="chat-to-the-end"),
]


@pytest.mark.parametrize(("path", "extra"), ANSWERED)
def test_answers_are_as_described(gateway: Gateway, path: str, extra: dict[str, Any]) -> None:
    answer = gateway.request("POST", path, json=_bodies(path, extra))
    assert answer.status_code == 200
    assert_described(answer, "POST", path)


@pytest.mark.parametrize("usage", [pytest.param(True, id="usage"), pytest.param(False, id="bare")])
@pytest.mark.parametrize(("path", "extra"), ANSWERED)
def test_events_are_as_described(
    gateway: Gateway, path: str, extra: dict[str, Any], usage: bool
) -> None:
    extra = {**extra, "stream": True, "stream_options": {"include_usage": usage}}
    answer = gateway.request("POST", path, json=_bodies(path, extra))
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert_described(answer, "POST", path)
    assert all(("usage" in event) is usage for event in events(answer.text))


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_stream_that_fails_ends_with_an_error_as_described(gateway: Gateway, path: str) -> None:
    # Without a seed one answer in thirty begins inside of a character that the failure cuts off, so
    # that no stream begins.
    body = _bodies(path, {"model": BROKEN_MODEL, "stream": True, "seed": 1})
    answer = gateway.request("POST", path, json=body)
    assert_described(answer, "POST", path)
    *some, last = events(answer.text)
    assert some
    assert last["error"]["code"] == "backend_failure"


@pytest.mark.parametrize(
    ("path", "extra", "status", "code"),
    [
        pytest.param(COMPLETIONS, {"prompt": None}, 400, "missing_required_parameter", id="field"),
        pytest.param(COMPLETIONS, {"stop": ["a", 1]}, 400, "invalid_type", id="type"),
        pytest.param(COMPLETIONS, {"n": 129}, 400, "invalid_value", id="range"),
        pytest.param(COMPLETIONS, {"best_of": 3}, 400, "unsupported_parameter", id="unsupported"),
        pytest.param(
            COMPLETIONS, {"max_tokens": 10**30}, 400, "context_length_exceeded", id="context"
        ),
        pytest.param(COMPLETIONS, {"model": "none"}, 404, "model_not_found", id="model"),
        pytest.param(
            COMPLETIONS, {"model": CHAT_MODEL}, 400, "unsupported_parameter", id="capability"
        ),
        pytest.param(COMPLETIONS, {"user": "x" * 70_000}, 413, "request_too_large", id="large"),
        pytest.param(COMPLETIONS, {"model": BROKEN_MODEL}, 500, "backend_failure", id="backend"),
        pytest.param(CHAT, {"messages": []}, 400, "invalid_value", id="no-messages"),
        pytest.param(CHAT, {"tools": [WEATHER]}, 400, "unsupported_parameter", id="tools"),
        pytest.param(CHAT, {"model": BROKEN_MODEL}, 500, "backend_failure", id="chat-backend"),
    ],
)
def test_refused_requests_are_as_described(
    gateway: Gateway, path: str, extra: dict[str, Any], status: int, code: str
) -> None:
    answer = gateway.request("POST", path, json=_bodies(path, extra))
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert_described(answer, "POST", path)


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_every_operation_answers_as_described(gateway: Gateway, method: str, path: str) -> None:
    concrete = path.replace("{id}", MODEL)
    body: dict[str, Any] = {"json": _bodies(path, {})} if method == "POST" else {}
    answer = gateway.request(method, concrete, **body)
    assert answer.status_code == 200
    assert_described(answer, method, path)

    wrong = gateway.request("PATCH", concrete)
    assert wrong.status_code == 405
    assert_described(wrong, method, path)

    keyless = gateway.request(method, concrete, key=None, **body)
    open_to_all = OPERATIONS[method, path].get("security") == []
    assert keyless.status_code == (200 if open_to_all else 401)
    assert_described(keyless, method, path)


def test_gateway_that_is_not_ready_says_so_as_described(gateway: Gateway) -> None:
    gateway.ready = False
    answer = gateway.request("GET", "/readyz", key=None)
    assert answer.status_code == 500
    assert_described(answer, "GET", "/readyz")


def test_unknown_model_is_as_described(gateway: Gateway) -> None:
    for path in ("/v1/models/nobody/none", "/v1/models/"):
        answer = gateway.request("GET", path)
        assert answer.status_code == 404
        assert_described(answer, "GET", "/v1/models/{id}")


def test_every_status_has_an_example_of_each_code() -> None:
    assert codes(COMPONENTS["responses"]["RateLimited"]) == {
        code for status, _, code in ERROR_TABLE if status == 429
    }


def test_document_is_served_to_those_with_a_key(gateway: Gateway) -> None:
    answer = gateway.request("GET", "/openapi.json")
    assert answer.headers["content-type"] == "application/json"
    assert answer.json() == DOCUMENT
    head = gateway.request("HEAD", "/openapi.json")
    assert head.status_code == 200
    assert head.headers["content-length"] == answer.headers["content-length"]
    assert gateway.request("HEAD", "/openapi.json", key=None).status_code == 401


@pytest.mark.parametrize("key", [pytest.param(None, id="no-key"), pytest.param("sk-", id="wrong")])
def test_document_needs_a_key(gateway: Gateway, key: str | None) -> None:
    answer = gateway.request("GET", "/openapi.json", key=key)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"


PREFLIGHT = {"origin": "https://a.example", "access-control-request-method": "GET"}


def test_document_answers_a_preflight(gateway: Gateway) -> None:
    answer = gateway.request("OPTIONS", "/openapi.json", headers=PREFLIGHT, key=None)
    assert answer.status_code == 204


@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS", "PATCH"])
def test_document_that_is_off_is_an_unknown_path(gateway: Gateway, method: str) -> None:
    gateway.config = GatewayConfig(openapi=False)
    answer = gateway.request(method, "/openapi.json", headers=PREFLIGHT)
    assert answer.status_code == 404
    other = gateway.request(method, "/other.json", headers=PREFLIGHT)
    assert answer.json()["error"] == {
        **other.json()["error"],
        "message": other.json()["error"]["message"].replace("/other.json", "/openapi.json"),
    }


def test_document_has_a_label_of_its_own_in_the_metrics(gateway: Gateway) -> None:
    def answered(route: str) -> float:
        labels = {"model": "", "route": route, "status": "200", "code": ""}
        return gateway.metrics.registry.get_sample_value("tera_requests_total", labels) or 0

    before = answered("/openapi.json")
    gateway.request("GET", "/openapi.json")
    assert answered("/openapi.json") == before + 1

"""Rule H-5: what the pages of other origins may do."""

from collections.abc import Mapping

import pytest
from tests.conformance.answers import assert_identified, assert_refused, chunks
from tests.conformance.gateways import Gateway, InProcessGateway
from tests.conformance.requests import ORIGIN, POSTS, PREFLIGHT


@pytest.mark.parametrize("path", [*POSTS, "/v1/models", "/v1/models/sim/small"])
def test_h5_a_preflight_needs_no_key_and_allows_nothing_by_default(
    gateway: Gateway, path: str
) -> None:
    for key in (None, "sk-wrong"):
        answer = gateway.request("OPTIONS", path, headers=PREFLIGHT, key=key)
        assert (answer.status_code, answer.content) == (204, b"")
        assert not [name for name in answer.headers if name.startswith("access-control-")]


@pytest.mark.parametrize("origins", [(ORIGIN,), ("https://other.example.com", ORIGIN), ("*",)])
def test_h5_a_preflight_of_an_allowed_origin_is_allowed(
    in_process: InProcessGateway, origins: tuple[str, ...]
) -> None:
    in_process.allow_origins(*origins)
    answer = in_process.request("OPTIONS", "/v1/completions", headers=PREFLIGHT, key=None)
    assert answer.status_code == 204
    assert answer.headers["access-control-allow-origin"] in (ORIGIN, "*")
    assert "POST" in answer.headers["access-control-allow-methods"]
    allowed = {
        name.strip().lower() for name in answer.headers["access-control-allow-headers"].split(",")
    }
    assert {"authorization", "content-type"} <= allowed
    assert_identified(answer)


@pytest.mark.parametrize(
    "origin",
    [
        "https://evil.example.com",
        "https://chat.example.com.evil.com",
        "http://chat.example.com",
        "null",
    ],
)
def test_h5_another_origin_is_allowed_nothing(in_process: InProcessGateway, origin: str) -> None:
    in_process.allow_origins(ORIGIN)
    answer = in_process.request(
        "OPTIONS", "/v1/completions", headers={**PREFLIGHT, "origin": origin}, key=None
    )
    assert answer.status_code == 204
    assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize(
    ("method", "path", "key", "status"),
    [
        pytest.param("GET", "/v1/models", "", 200, id="answer"),
        pytest.param("GET", "/v1/models", None, 401, id="no-key"),
        pytest.param("GET", "/nothing", "", 404, id="unknown"),
        pytest.param("POST", "/v1/completions", "", 400, id="bad-request"),
    ],
)
def test_h5_an_allowed_page_can_read_answers_and_errors(
    in_process: InProcessGateway, method: str, path: str, key: str | None, status: int
) -> None:
    in_process.allow_origins(ORIGIN)
    answer = in_process.request(method, path, headers={"origin": ORIGIN}, key=key)
    assert answer.status_code == status
    assert answer.headers["access-control-allow-origin"] == ORIGIN
    assert "origin" in answer.headers["vary"].lower()
    assert "x-request-id" in answer.headers["access-control-expose-headers"].lower()


def test_h5_an_allowed_page_can_read_streams(in_process: InProcessGateway) -> None:
    in_process.allow_origins(ORIGIN)
    body = in_process.completion(stream=True)
    answer = in_process.post("/v1/completions", body, headers={"origin": ORIGIN})
    assert chunks(answer)
    assert answer.headers["access-control-allow-origin"] == ORIGIN


@pytest.mark.parametrize("path", [*POSTS, "/v1/models", "/v1/models/sim/small"])
@pytest.mark.parametrize(
    "headers",
    [
        pytest.param({}, id="bare"),
        pytest.param({"origin": ORIGIN}, id="no-method"),
        pytest.param({"access-control-request-method": "POST"}, id="no-origin"),
    ],
)
def test_h5_options_that_is_no_preflight_is_not_allowed(
    gateway: Gateway, path: str, headers: Mapping[str, str]
) -> None:
    answer = gateway.request("OPTIONS", path, headers=headers)
    assert_refused(answer, "method_not_allowed")
    assert answer.headers["allow"]


def test_h5_a_preflight_of_an_unknown_path_is_unknown(gateway: Gateway) -> None:
    for path in ("/nothing", "/v1/models/"):
        answer = gateway.request("OPTIONS", path, headers=PREFLIGHT)
        assert_refused(answer, "unknown_url")

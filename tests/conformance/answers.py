"""What the contract says of every answer, as assertions that tests share."""

import json
import re
from typing import Any

import httpx

REQUEST_ID = re.compile(r"req_[0-9a-f]{32}")

# Rule E-2: what a code says of status and type. 429 is missing: limits have tests of their own.
ERRORS: dict[str, tuple[int, str]] = {
    "invalid_json": (400, "invalid_request_error"),
    "unsupported_content_type": (400, "invalid_request_error"),
    "missing_required_parameter": (400, "invalid_request_error"),
    "invalid_type": (400, "invalid_request_error"),
    "invalid_value": (400, "invalid_request_error"),
    "unsupported_parameter": (400, "invalid_request_error"),
    "context_length_exceeded": (400, "invalid_request_error"),
    "missing_api_key": (401, "authentication_error"),
    "invalid_api_key": (401, "authentication_error"),
    "model_not_found": (404, "invalid_request_error"),
    "unknown_url": (404, "invalid_request_error"),
    "method_not_allowed": (405, "invalid_request_error"),
    "request_too_large": (413, "invalid_request_error"),
    "backend_failure": (500, "server_error"),
    "internal_error": (500, "server_error"),
}

# Rule H-9, as far as a pattern can tell: traces, files of ours, addresses, replicas.
_INSIDES = re.compile(
    r"Traceback|site-packages|\.py\b|/opt/|/usr/|/home/|/tmp/|127\.0\.0\.1|\.internal", re.ASCII
)


def assert_envelope(body: bytes) -> dict[str, Any]:
    """Return the error in an envelope of exactly the four keys (rules E-1 and H-9)."""
    found = json.loads(body)
    assert list(found) == ["error"]
    error: dict[str, Any] = found["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert all(isinstance(error[name], str) and error[name] for name in ("message", "type", "code"))
    assert error["param"] is None or isinstance(error["param"], str)
    assert not _INSIDES.search(error["message"]), error["message"]
    return error


def assert_refused(answer: httpx.Response, code: str, param: str | None = None) -> dict[str, Any]:
    """Return the error of an answer that is refused with this code, and all that goes with it."""
    assert answer.content, answer
    error = assert_envelope(answer.content)
    assert (error["code"], error["param"]) == (code, param), error
    assert (answer.status_code, error["type"]) == ERRORS[code]
    assert answer.headers["content-type"] == "application/json"
    assert_identified(answer)
    return error


def assert_identified(answer: httpx.Response) -> str:
    """Return the one request id of an answer (rule H-3)."""
    [request_id] = answer.headers.get_list("x-request-id")
    assert REQUEST_ID.fullmatch(request_id)
    return str(request_id)


def accepted(answer: httpx.Response) -> Any:
    """Return the JSON of a successful answer."""
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert_identified(answer)
    return json.loads(answer.content)


def events(body: bytes) -> list[bytes]:
    """Return the data of each event of a stream, byte for byte as rule S-1 has it."""
    assert body.endswith(b"\n\n")
    blocks = body.removesuffix(b"\n\n").split(b"\n\n")
    found = []
    for block in blocks:
        if block == b": keep-alive":
            continue
        assert block.startswith(b"data: "), block
        data = block.removeprefix(b"data: ")
        assert b"\n" not in data
        assert b"\r" not in data
        found.append(data)
    return found


def chunks(answer: httpx.Response) -> list[Any]:
    """Return the JSON of a successful stream's events, without `[DONE]`."""
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert_identified(answer)
    *datas, last = events(answer.content)
    assert last == b"[DONE]"
    found = [json.loads(data) for data in datas]
    assert all(isinstance(chunk, dict) for chunk in found)
    assert not any("error" in chunk for chunk in found)
    return found


def texts(chunks: list[Any]) -> dict[int, str]:
    """Return the concatenated text of each choice of a completion's stream, by index."""
    found: dict[int, str] = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            found[choice["index"]] = found.get(choice["index"], "") + choice["text"]
    return found


def contents(chunks: list[Any]) -> dict[int, str]:
    """Return the concatenated content of each choice of a chat stream, by index."""
    found: dict[int, str] = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            content = choice["delta"].get("content") or ""
            found[choice["index"]] = found.get(choice["index"], "") + content
    return found

"""The OpenAPI document as tests read it: what it promises of an answer, checked."""

import json
from copy import deepcopy
from typing import Any

import httpx
from jsonschema import Draft202012Validator

from tera.contract.openapi import openapi_document
from tera.contract.openapi_schemas import answer_schemas

Schema = dict[str, Any]

DOCUMENT = openapi_document()
COMPONENTS: dict[str, Any] = DOCUMENT["components"]
OPERATIONS: dict[tuple[str, str], Schema] = {
    (method.upper(), path): operation
    for path, operations in DOCUMENT["paths"].items()
    for method, operation in operations.items()
}
"""By method and path template."""


def resolved(value: Schema) -> Schema:
    """Return what a `$ref` of the document stands for, or the value itself."""
    while "$ref" in value:
        found: Any = DOCUMENT
        for part in value["$ref"].removeprefix("#/").split("/"):
            found = found[part]
        value = found
    return value


def _closed() -> dict[str, Any]:
    """Return the components with answers that may have no member beside the described ones.

    The document leaves answers open, for clients that meet a newer Tera; our own are exact.
    """
    components = deepcopy(COMPONENTS)
    for name in answer_schemas():
        components["schemas"][name].setdefault("additionalProperties", False)
    return components


_CLOSED = _closed()


def assert_fits(value: Any, schema: Schema) -> None:
    """Fail, naming each place, unless the value fits a schema of the document, exactly."""
    validator = Draft202012Validator({**schema, "components": _CLOSED})
    faults = [f"{error.json_path}: {error.message}" for error in validator.iter_errors(value)]
    assert not faults, faults


def assert_described(answer: httpx.Response, method: str, path: str) -> None:
    """Fail unless an answer is one that the document describes for this operation."""
    responses = OPERATIONS[method, path]["responses"]
    assert str(answer.status_code) in responses, (answer.status_code, answer.text)
    response = resolved(responses[str(answer.status_code)])
    _assert_headers(answer, response["headers"])
    media_type = answer.headers["content-type"].partition(";")[0]
    schema = response["content"][media_type]["schema"]
    if media_type == "text/event-stream":
        for event in events(answer.text):
            assert_fits(event, schema)
    else:
        assert_fits(answer.json() if media_type == "application/json" else answer.text, schema)
    if answer.status_code >= 400 and path != "/readyz":
        assert answer.json()["error"]["code"] in codes(response)


def _assert_headers(answer: httpx.Response, headers: dict[str, Schema]) -> None:
    for name, reference in headers.items():
        header = resolved(reference)
        if name not in answer.headers:
            assert not header["required"], name
            continue
        text = answer.headers[name]
        assert_fits(int(text) if header["schema"].get("type") == "integer" else text, header)


def codes(response: Schema) -> set[str]:
    """Return the error codes of which a response has examples."""
    examples = response["content"]["application/json"]["examples"].values()
    return {example["value"]["error"]["code"] for example in examples}


def events(stream: str) -> list[Any]:
    """Return the events of a stream, which ended as S-1 and S-6 allow."""
    *blocks, end = stream.split("\n\n")
    assert end == ""
    found = [block.removeprefix("data: ") for block in blocks if not block.startswith(":")]
    if found[-1] == "[DONE]":
        return [json.loads(event) for event in found[:-1]]
    *_, last = decoded = [json.loads(event) for event in found]
    assert "error" in last
    return decoded

"""Requests made from the OpenAPI document, right ones and wrong ones, and what they must get."""

import re
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import httpx
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from tests.contract.document import DOCUMENT, OPERATIONS, assert_described

Send = Callable[[str, str, dict[str, Any]], httpx.Response]
"""Sends a method to a path, with `json` or `content` and headers, and a key that is valid."""

ANOTHER_MATTER = {"invalid_value", "unsupported_parameter", "context_length_exceeded"}
"""Codes that a request may get although each of its fields is as the document says: fields can
forbid one another, and models differ."""

DEMANDED = re.compile(r"messages\[\d+\]\.(content|tool_call_id)|response_format\.json_schema")
"""What a request may lack although it need not be there beside other values than it has."""

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]

FUZZED = [
    (method, path, mode)
    for method, path in OPERATIONS
    for mode in GenerationMode
    # A request without body or parameters has no wrong form.
    if mode is GenerationMode.POSITIVE or method == "POST"
]


def fuzz(
    send: Send,
    model_id: str,
    operation: tuple[str, str, GenerationMode],
    *,
    examples: int,
    max_tokens: int | None = None,
) -> None:
    """Send that many requests of one operation and check every answer.

    Args:
        send: the way to a gateway.
        model_id: the one model that right requests name.
        operation: method, path and whether requests are right or wrong.
        examples: number of requests.
        max_tokens: every right request bounds its completion by this.
    """
    method, path, mode = operation
    # A wrong request is never generated for, and wrong only by the document as it is.
    bound = max_tokens if mode is GenerationMode.POSITIVE else None
    schema = schemathesis.openapi.from_dict(_narrowed(model_id, bound))

    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))
    @given(schema[path][method].as_strategy(generation_mode=mode))
    def answers_as_described(case: Case[Any]) -> None:
        arguments = case.as_transport_kwargs()
        body = {"content": arguments["data"]} if "data" in arguments else {}
        if "json" in arguments:
            body = {"json": arguments["json"]}
        answer = send(method, arguments["url"], body)
        # To schemathesis, the schema of a stream is that of events with their field names, as
        # OpenAPI 3.2 has it. Ours, as OpenAI's, is that of their `data`.
        streamed = answer.headers["content-type"].startswith("text/event-stream")
        excluded = [response_schema_conformance] if streamed else []
        case.validate_response(answer, checks=CHECKS, excluded_checks=excluded)
        assert_described(answer, method, path)
        if mode is GenerationMode.NEGATIVE:
            assert 400 <= answer.status_code < 500, answer.text
        elif answer.status_code != 200:
            error = answer.json()["error"]
            if error["code"] == "missing_required_parameter":
                assert DEMANDED.fullmatch(error["param"]), answer.text
            else:
                assert error["code"] in ANOTHER_MATTER, answer.text

    answers_as_described()


def _narrowed(model_id: str, max_tokens: int | None) -> dict[str, Any]:
    """Return the document for one model; keys are the sender's matter."""
    document = deepcopy(DOCUMENT)
    del document["security"]
    (parameter,) = document["paths"]["/v1/models/{id}"]["get"]["parameters"]
    parameter["schema"] = {"const": model_id}
    for name in ("CompletionRequest", "ChatRequest"):
        schema = document["components"]["schemas"][name]
        fields = schema["properties"]
        fields["model"] = {"type": "string", "const": model_id}
        if max_tokens is not None:
            fields.pop("max_completion_tokens", None)
            fields["max_tokens"] = {"type": "integer", "minimum": 1, "maximum": max_tokens}
            fields["n"]["maximum"] = 4
            schema["required"] = [*schema["required"], "max_tokens"]
    return document

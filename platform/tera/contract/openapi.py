"""The API as one OpenAPI 3.1 document.

Ranges, defaults and field names come from the types that parse and write requests and answers
(`openapi_schemas`); this module adds what no type says: paths, statuses and headers.
"""

from collections.abc import Mapping
from functools import cache
from typing import Any

import msgspec

from tera.contract import openapi_examples as examples
from tera.contract.openapi_examples import error_bodies
from tera.contract.openapi_schemas import Schema, answer_schemas, request_schemas

STATUSES = {
    "BadRequest": "400",
    "Unauthorized": "401",
    "NotFound": "404",
    "MethodNotAllowed": "405",
    "RequestTooLarge": "413",
    "RateLimited": "429",
    "ServerError": "500",
}
"""The error responses, by their name in the document."""

_LIMIT_HEADERS = tuple(
    f"x-ratelimit-{figure}-{unit}"
    for unit in ("requests", "tokens")
    for figure in ("limit", "remaining", "reset")
)

_OBJECT: Schema = {"type": "object"}


@cache
def openapi_json() -> bytes:
    """Return the document as it is served."""
    return msgspec.json.encode(openapi_document())


def openapi_document() -> dict[str, Any]:
    """Return the document as JSON values."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Tera API",
            "version": "1.0.0",
            "description": "OpenAI-compatible inference API. Existing OpenAI SDKs work without "
            "modification: point them at this server's `/v1` with a Tera API key. HEAD is "
            "answered where GET is.",
        },
        # Relative, so that the document is right wherever it is served.
        "servers": [{"url": "/", "description": "The server that this document comes from"}],
        "security": [{"bearerAuth": []}],
        "tags": [
            {"name": "chat", "description": "Chat completions"},
            {"name": "completions", "description": "Text completions"},
            {"name": "models", "description": "Model catalog"},
            {"name": "document", "description": "This document"},
            {"name": "operations", "description": "For operators, only inside the platform"},
        ],
        "paths": {
            "/v1/completions": {"post": _completions()},
            "/v1/chat/completions": {"post": _chat_completions()},
            "/v1/models": {"get": _models()},
            "/v1/models/{id}": {"get": _model()},
            "/openapi.json": {"get": _document()},
            **_operations(),
        },
        "components": {
            "schemas": {**request_schemas(), **answer_schemas()},
            "responses": _error_responses(),
            "headers": _headers(),
            "securitySchemes": {
                "bearerAuth": {"type": "http", "scheme": "bearer", "bearerFormat": "sk-tera-..."}
            },
        },
    }


def _ref(kind: str, name: str) -> Schema:
    return {"$ref": f"#/components/{kind}/{name}"}


def _completions() -> Schema:
    return {
        "tags": ["completions"],
        "summary": "Create a text completion",
        "description": "OpenAI-compatible legacy completions endpoint. Prefer chat completions "
        "for new code.",
        "operationId": "createCompletion",
        "requestBody": _body("CompletionRequest", examples.COMPLETION_REQUESTS),
        "responses": {
            "200": _generated(
                "A text completion", "CompletionResponse", "CompletionChunk", examples.COMPLETION
            ),
            **_errors(*STATUSES),
        },
    }


def _chat_completions() -> Schema:
    return {
        "tags": ["chat"],
        "summary": "Create a chat completion",
        "operationId": "createChatCompletion",
        "requestBody": _body("ChatRequest", examples.CHAT_REQUESTS),
        "responses": {
            "200": _generated(
                "A chat completion", "ChatCompletion", "ChatChunk", examples.CHAT_COMPLETION
            ),
            **_errors(*STATUSES),
        },
    }


def _models() -> Schema:
    return {
        "tags": ["models"],
        "summary": "List the models that the key may use",
        "operationId": "listModels",
        "responses": {
            "200": _answer(
                "The models, in the catalog's order.",
                _ref("schemas", "ModelList"),
                examples.MODEL_LIST,
            ),
            **_errors("Unauthorized", "MethodNotAllowed", "ServerError"),
        },
    }


def _model() -> Schema:
    model_id = {
        "name": "id",
        "in": "path",
        "required": True,
        "description": "Slashes in it may be sent as they are or as `%2F`.",
        "schema": {"type": "string", "minLength": 1},
        "example": examples.MODEL,
    }
    return {
        "tags": ["models"],
        "summary": "Retrieve one model",
        "operationId": "retrieveModel",
        "parameters": [model_id],
        "responses": {
            "200": _answer("The model.", _ref("schemas", "ModelCard"), examples.MODEL_CARD),
            **_errors("Unauthorized", "NotFound", "MethodNotAllowed", "ServerError"),
        },
    }


def _document() -> Schema:
    return {
        "tags": ["document"],
        "summary": "Retrieve this document",
        "description": "A deployment can turn it off; then the path is unknown.",
        "operationId": "retrieveDocument",
        "responses": {
            "200": _answer("The document.", _OBJECT),
            **_errors("Unauthorized", "NotFound", "MethodNotAllowed", "ServerError"),
        },
    }


def _operations() -> dict[str, Any]:
    """Return the routes that need no key."""
    text = {"text/plain": {"schema": {"type": "string"}}}
    whole = {"description": "Prometheus text.", "headers": _own_headers(), "content": text}
    refused = _errors("MethodNotAllowed", "ServerError")
    return {
        path: {
            "get": {
                "tags": ["operations"],
                "summary": summary,
                "operationId": name,
                "security": [],
                "responses": {**answers, **{s: r for s, r in refused.items() if s not in answers}},
            }
        }
        for path, name, summary, answers in (
            (
                "/healthz",
                "health",
                "Whether the process answers",
                {"200": _answer("It does.", _OBJECT)},
            ),
            (
                "/readyz",
                "readiness",
                "Whether this gateway replica can serve",
                {
                    "200": _answer("It can.", _OBJECT),
                    "500": _answer("It cannot yet; the body says what is missing.", _OBJECT),
                },
            ),
            ("/metrics", "metrics", "Metrics of this gateway replica", {"200": whole}),
            ("/metrics/all", "allMetrics", "Metrics of all processes", {"200": whole}),
        )
    }


def _body(schema: str, values: Mapping[str, Any]) -> Schema:
    return {
        "required": True,
        "content": {
            "application/json": {"schema": _ref("schemas", schema), "examples": _named(values)}
        },
    }


def _named(values: Mapping[str, Any]) -> Schema:
    return {name: {"value": value} for name, value in values.items()}


def _answer(description: str, schema: Schema, example: Any = None) -> Schema:
    content = {"schema": schema}
    if example is not None:
        content["example"] = example
    return {
        "description": description,
        "headers": _own_headers(),
        "content": {"application/json": content},
    }


def _generated(what: str, whole: str, chunk: str, example: Any) -> Schema:
    """Return the 200 response of a route that answers at once or, with `stream`, as events."""
    answer = _answer(
        f"{what} (or an SSE stream when `stream: true`). The schema of `text/event-stream` is "
        "that of each event's `data`; the last event is `[DONE]`, or, when the generation "
        "fails after the first event, an error and nothing more.",
        _ref("schemas", whole),
        example,
    )
    answer["headers"] = _own_headers(*_LIMIT_HEADERS)
    answer["content"]["text/event-stream"] = {
        "schema": {"anyOf": [_ref("schemas", chunk), _ref("schemas", "ErrorResponse")]}
    }
    return answer


def _errors(*names: str) -> Schema:
    return {STATUSES[name]: _ref("responses", name) for name in names}


def _error_responses() -> dict[str, Any]:
    return {
        name: {
            "description": description,
            "headers": _own_headers(*headers),
            "content": {
                "application/json": {
                    "schema": _ref("schemas", "ErrorResponse"),
                    "examples": _named(error_bodies(name)),
                }
            },
        }
        for name, description, headers in (
            ("BadRequest", "Malformed request.", ()),
            ("Unauthorized", "Missing or invalid API key.", ("www-authenticate",)),
            ("NotFound", "Model not found or not deployed.", ()),
            ("MethodNotAllowed", "The path exists, but not with this method.", ("allow",)),
            ("RequestTooLarge", "The body is larger than this deployment accepts.", ()),
            (
                "RateLimited",
                "Too many requests.",
                ("retry-after", "retry-after-ms", "x-should-retry", *_LIMIT_HEADERS),
            ),
            ("ServerError", "Backend failure after retries.", ()),
        )
    }


def _own_headers(*names: str) -> Schema:
    return {name: _ref("headers", name) for name in ("x-request-id", *names)}


def _headers() -> dict[str, Any]:
    whole = {"type": "integer", "minimum": 0}
    text = {"type": "string"}
    headers = {
        "x-request-id": _header(
            "Identifies the request in our logs; quote it when you report a problem.",
            {"type": "string", "pattern": "^req_[0-9a-f]{32}$"},
            required=True,
        ),
        "www-authenticate": _header("The scheme to use.", {"const": "Bearer"}, required=True),
        "allow": _header("The methods that the path supports.", text, required=True),
        "retry-after": _header("Seconds to wait.", {"type": "integer", "minimum": 1}),
        "retry-after-ms": _header("Milliseconds to wait.", whole),
        "x-should-retry": _header("`false` if waiting does not help.", {"const": "false"}),
    }
    for name in _LIMIT_HEADERS:
        _, _, figure, unit = name.split("-")
        what = {
            "limit": f"Allowed {unit} per minute; absent if there is no limit.",
            "remaining": f"How many {unit} are left now.",
            "reset": f"Time until all {unit} are back, such as `6m0s`, `1.2s` or `20ms`.",
        }[figure]
        headers[name] = _header(what, text if figure == "reset" else whole)
    return headers


def _header(description: str, schema: Schema, *, required: bool = False) -> Schema:
    return {"description": description, "required": required, "schema": schema}

"""The API as one OpenAPI 3.1 document, made from the types that parse and answer requests.

Ranges, defaults and field names have their only source in those types; what this module adds
is what no type says: paths, statuses, headers and examples. All that it describes beside
`/v1/completions` is our own; that path is as the document that Tera was built from has it.
"""

from collections.abc import Mapping
from functools import cache
from typing import Any

import msgspec
from pydantic.json_schema import models_json_schema

from tera.contract.chat import ChatChunk, ChatCompletion, ChatRequest
from tera.contract.common import (
    ErrorBody,
    ErrorEnvelope,
    ModelCard,
    ModelList,
    error_envelope,
)
from tera.contract.completions import Completion, CompletionChunk, CompletionRequest
from tera.errors import (
    BackendFailureError,
    ContextLengthError,
    InternalError,
    InvalidApiKeyError,
    InvalidJsonError,
    InvalidTypeError,
    InvalidValueError,
    MethodNotAllowedError,
    MissingApiKeyError,
    MissingParameterError,
    ModelNotFoundError,
    RequestTooLargeError,
    TeraError,
    UnsupportedContentTypeError,
    UnsupportedParameterError,
)

Schema = dict[str, Any]

REQUESTS = (CompletionRequest, ChatRequest)
ANSWERS = (Completion, CompletionChunk, ChatCompletion, ChatChunk, ModelCard, ModelList)

PUBLIC_NAMES = {"Completion": "CompletionResponse", "ErrorEnvelope": "ErrorResponse"}
"""Types whose name in the document is another: it was public before the type was written."""

FINISH_REASONS = {
    "CompletionChoice": ["stop", "length"],
    "ChatChoice": ["stop", "length", "tool_calls"],
}
"""Values that the types do not list: they come from the engine, a layer above."""

_BOUNDS = {
    "ge": "minimum",
    "gt": "exclusiveMinimum",
    "le": "maximum",
    "lt": "exclusiveMaximum",
}
"""JSON schema's words for what pydantic leaves in its own behind a validator."""

_REF = "#/components/schemas/"
_MODEL = "Qwen/Qwen2.5-7B-Instruct"


@cache
def openapi_document() -> dict[str, Any]:
    """Return the document as JSON values; it is shared, so whoever changes it copies it first."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Tera API",
            "version": "1.0.0",
            "description": "OpenAI-compatible inference API. Existing OpenAI SDKs work without "
            "modification: point them at this server's `/v1` with a Tera API key.",
        },
        # Relative: the document is right wherever it is served.
        "servers": [{"url": "/", "description": "The server that this document comes from"}],
        "security": [{"bearerAuth": []}],
        "tags": [
            {"name": "chat", "description": "Chat completions"},
            {"name": "completions", "description": "Text completions"},
            {"name": "models", "description": "Model catalog"},
        ],
        "paths": _paths(),
        "components": {
            "schemas": {**_request_schemas(), **_answer_schemas()},
            "responses": _error_responses(),
            "headers": _headers(),
            "securitySchemes": {
                "bearerAuth": {"type": "http", "scheme": "bearer", "bearerFormat": "sk-tera-..."}
            },
        },
    }


def _ref(kind: str, name: str) -> Schema:
    return {"$ref": f"#/components/{kind}/{name}"}


def _paths() -> dict[str, Any]:
    model_id = {
        "name": "id",
        "in": "path",
        "required": True,
        "description": "Its slashes may be sent as they are or as `%2F`.",
        "schema": {"type": "string", "minLength": 1},
        "example": _MODEL,
    }
    return {
        "/v1/completions": {"post": _completions()},
        "/v1/chat/completions": {"post": _chat_completions()},
        "/v1/models": {
            "get": {
                "tags": ["models"],
                "summary": "List the models that the key may use",
                "operationId": "listModels",
                "responses": {
                    "200": _answer("The models, in the catalog's order.", "ModelList", _LIST),
                    **_errors("Unauthorized", "MethodNotAllowed", "ServerError"),
                },
            }
        },
        "/v1/models/{id}": {
            "get": {
                "tags": ["models"],
                "summary": "Retrieve one model",
                "operationId": "retrieveModel",
                "parameters": [model_id],
                "responses": {
                    "200": _answer("The model.", "ModelCard", _CARD),
                    **_errors("Unauthorized", "NotFound", "MethodNotAllowed", "ServerError"),
                },
            }
        },
    }


def _completions() -> Schema:
    return {
        "tags": ["completions"],
        "summary": "Create a text completion",
        "description": "OpenAI-compatible legacy completions endpoint. Prefer chat completions "
        "for new code.",
        "operationId": "createCompletion",
        "requestBody": _body(
            "CompletionRequest",
            {
                "text": {
                    "model": _MODEL,
                    "prompt": "Once upon a time",
                    "max_tokens": 64,
                    "stop": ["\n\n"],
                },
                "stream": {
                    "model": _MODEL,
                    "prompt": "Once upon a time",
                    "stream": True,
                    "stream_options": {"include_usage": True},
                },
                "batch": {"model": _MODEL, "prompt": ["One", "Two"], "n": 2, "seed": 7},
            },
        ),
        "responses": {
            "200": _generated("A text completion", "CompletionResponse", "CompletionChunk", _TEXT),
            **_errors(*_ERRORS),
        },
    }


def _chat_completions() -> Schema:
    weather = {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
    return {
        "tags": ["chat"],
        "summary": "Create a chat completion",
        "operationId": "createChatCompletion",
        "requestBody": _body(
            "ChatRequest",
            {
                "question": {
                    "model": _MODEL,
                    "messages": [
                        {"role": "system", "content": "Answer in one sentence."},
                        {"role": "user", "content": "Why is the sky blue?"},
                    ],
                    "max_completion_tokens": 64,
                },
                "tools": {
                    "model": _MODEL,
                    "messages": [{"role": "user", "content": "How warm is it in Rome?"}],
                    "tools": [weather],
                    "tool_choice": "auto",
                },
            },
        ),
        "responses": {
            "200": _generated("A chat completion", "ChatCompletion", "ChatChunk", _CHAT),
            **_errors(*_ERRORS),
        },
    }


def _body(schema: str, examples: Mapping[str, Any]) -> Schema:
    return {
        "required": True,
        "content": {
            "application/json": {
                "schema": _ref("schemas", schema),
                "examples": {name: {"value": value} for name, value in examples.items()},
            }
        },
    }


def _answer(description: str, schema: str, example: Any) -> Schema:
    return {
        "description": description,
        "headers": _own_headers(),
        "content": {"application/json": {"schema": _ref("schemas", schema), "example": example}},
    }


def _generated(what: str, whole: str, chunk: str, example: Any) -> Schema:
    """Return the 200 of a route that answers whole or, with `stream`, as events."""
    answer = _answer(
        f"{what} (or an SSE stream when `stream: true`). The schema of `text/event-stream` is "
        "that of each event's `data`; the last event is `[DONE]`, or, when the generation "
        "fails after the first event, an error and nothing more.",
        whole,
        example,
    )
    answer["headers"] = _own_headers(*_LIMIT_HEADERS)
    answer["content"]["text/event-stream"] = {
        "schema": {"anyOf": [_ref("schemas", chunk), _ref("schemas", "ErrorResponse")]}
    }
    return answer


_STATUSES = {
    "BadRequest": "400",
    "Unauthorized": "401",
    "NotFound": "404",
    "MethodNotAllowed": "405",
    "RequestTooLarge": "413",
    "RateLimited": "429",
    "ServerError": "500",
}
_ERRORS = tuple(_STATUSES)


def _errors(*names: str) -> Schema:
    return {_STATUSES[name]: _ref("responses", name) for name in names}


def _error_responses() -> dict[str, Any]:
    return {
        "BadRequest": _failure(
            "Malformed request.",
            InvalidJsonError("The request body must be a JSON object."),
            UnsupportedContentTypeError(
                "The content-type 'text/plain' is not supported; send application/json."
            ),
            MissingParameterError("Missing required parameter: 'prompt'.", param="prompt"),
            InvalidTypeError(
                "Invalid type for 'stop[0]': expected a string, but got 1 instead.",
                param="stop[0]",
            ),
            InvalidValueError(
                "Invalid 'temperature': must be at most 2, but 3.0 was given.",
                param="temperature",
            ),
            UnsupportedParameterError(
                "'best_of' is only supported when it equals 'n'.", param="best_of"
            ),
            ContextLengthError(
                "This model's context holds 8192 tokens, but the request asks for 9000: 1000 of "
                "the prompt and 8000 of max_tokens. Shorten the prompt or lower max_tokens.",
                param="max_tokens",
            ),
        ),
        "Unauthorized": _failure(
            "Missing or invalid API key.",
            MissingApiKeyError("You did not provide an API key."),
            InvalidApiKeyError("The API key is not valid."),
            headers=("www-authenticate",),
        ),
        "NotFound": _failure(
            "Model not found or not deployed.",
            ModelNotFoundError(
                "The model `gpt-9` does not exist or is not deployed, or you do not have access "
                "to it.",
                param="model",
            ),
        ),
        "MethodNotAllowed": _failure(
            "The path exists, with other methods.",
            MethodNotAllowedError("PUT is not allowed here; use POST."),
            headers=("allow",),
        ),
        "RequestTooLarge": _failure(
            "The body is larger than this deployment accepts.",
            RequestTooLargeError("The request body is larger than 10485760 bytes."),
        ),
        "RateLimited": _rate_limited(),
        "ServerError": _failure(
            "Backend failure after retries.",
            BackendFailureError("The model's engines failed repeatedly on this request."),
            InternalError("The server failed on this request."),
        ),
    }


def _failure(description: str, *errors: TeraError, headers: tuple[str, ...] = ()) -> Schema:
    examples = {error.code: msgspec.json.decode(error_envelope(error)) for error in errors}
    return _envelope(description, examples, headers)


def _rate_limited() -> Schema:
    bodies = {
        "requests_per_minute": ErrorBody(
            "The limit of 60 requests per minute is reached; try again in 2 s.",
            "requests",
            None,
            "rate_limit_exceeded",
        ),
        "tokens_per_minute": ErrorBody(
            "The limit of 10000 tokens per minute is reached; try again in 9 s.",
            "tokens",
            None,
            "rate_limit_exceeded",
        ),
        "concurrency_limit_exceeded": ErrorBody(
            "8 requests are in flight, and no more may be.",
            "requests",
            None,
            "concurrency_limit_exceeded",
        ),
        "insufficient_quota": ErrorBody(
            "The token budget is spent.", "insufficient_quota", None, "insufficient_quota"
        ),
        "engine_overloaded": ErrorBody(
            "The model's queues are full; try again in 1 s.",
            "overloaded",
            None,
            "engine_overloaded",
        ),
    }
    examples = {name: msgspec.to_builtins(ErrorEnvelope(body)) for name, body in bodies.items()}
    headers = ("retry-after", "retry-after-ms", "x-should-retry", *_LIMIT_HEADERS)
    return _envelope("Too many requests.", examples, headers)


def _envelope(description: str, examples: Mapping[str, Any], headers: tuple[str, ...]) -> Schema:
    return {
        "description": description,
        "headers": _own_headers(*headers),
        "content": {
            "application/json": {
                "schema": _ref("schemas", "ErrorResponse"),
                "examples": {name: {"value": value} for name, value in examples.items()},
            }
        },
    }


_LIMIT_HEADERS = tuple(
    f"x-ratelimit-{figure}-{unit}"
    for unit in ("requests", "tokens")
    for figure in ("limit", "remaining", "reset")
)


def _own_headers(*names: str) -> Schema:
    return {name: _ref("headers", name) for name in ("x-request-id", *names)}


def _headers() -> dict[str, Any]:
    whole = {"type": "integer", "minimum": 0}
    text = {"type": "string"}
    headers = {
        "x-request-id": _header(
            "Names the request in our logs; send it along with a question.",
            {"type": "string", "pattern": "^req_[0-9a-f]{32}$"},
            required=True,
        ),
        "www-authenticate": _header("The scheme to use.", {"const": "Bearer"}, required=True),
        "allow": _header("The methods that the path has.", text, required=True),
        "retry-after": _header("Seconds to wait.", {"type": "integer", "minimum": 1}),
        "retry-after-ms": _header("Milliseconds to wait.", whole),
        "x-should-retry": _header("`false` where waiting does not help.", {"const": "false"}),
    }
    for name in _LIMIT_HEADERS:
        _, _, figure, unit = name.split("-")
        what = {
            "limit": f"Most {unit} per minute; absent where there is no limit.",
            "remaining": f"How many {unit} are left now.",
            "reset": f"When all {unit} are back, such as `6m0s`, `1.2s` or `20ms`.",
        }[figure]
        headers[name] = _header(what, text if figure == "reset" else whole)
    return headers


def _header(description: str, schema: Schema, *, required: bool = False) -> Schema:
    return {"description": description, "required": required, "schema": schema}


def _request_schemas() -> dict[str, Schema]:
    """Return the schemas of request bodies, in the forms that clients may send."""
    _, definitions = models_json_schema(
        [(request, "validation") for request in REQUESTS], ref_template=_REF + "{model}"
    )
    schemas: dict[str, Schema] = {
        name: _plain(schema) for name, schema in definitions["$defs"].items()
    }
    for schema in schemas.values():
        required = schema.get("required", ())
        schema["properties"] = {
            name: field if name in required else _nullable(field)
            for name, field in schema["properties"].items()
        }
    return schemas


def _plain(schema: Any) -> Any:
    """Return a schema without pydantic's titles, with JSON schema's words for bounds."""
    if isinstance(schema, list):
        return [_plain(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        # Below `properties` the keys are our fields' names.
        _BOUNDS.get(key, key): {name: _plain(field) for name, field in value.items()}
        if key == "properties"
        else _plain(value)
        for key, value in schema.items()
        if key != "title"
    }


def _nullable(field: Schema) -> Schema:
    """Return the schema of a field that may be left out: null means the same."""
    if "anyOf" in field:
        forms = [form for form in field["anyOf"] if form != {"type": "null"}]
        rest = {key: value for key, value in field.items() if key != "anyOf"}
        field = {**forms[0], **rest} if len(forms) == 1 else {"anyOf": forms, **rest}
    if field.get("default", ...) is None:
        field = {key: value for key, value in field.items() if key != "default"}
    if isinstance(field.get("type"), str) and not field.keys() & {"enum", "const"}:
        return {**field, "type": [field["type"], "null"]}
    outside = {
        key: field.pop(key) for key in ("default", "description", "examples") if key in field
    }
    forms = field["anyOf"] if set(field) == {"anyOf"} else [field]
    return {"anyOf": [*forms, {"type": "null"}], **outside}


def _answer_schemas() -> dict[str, Schema]:
    """Return the schemas of answers, events and errors."""
    _, schemas = msgspec.json.schema_components(
        [*ANSWERS, ErrorEnvelope], ref_template=_REF + "{name}"
    )
    answers = {name: _sent(schema) for name, schema in schemas.items()}
    _set_finish_reasons(answers)
    for name, public in PUBLIC_NAMES.items():
        answers[public] = answers.pop(name)
    return answers


_SOMETIMES_SENT = {
    "AnswerMessage": {"tool_calls", "reasoning_content"},
    "CompletionChunk": {"usage"},
    "ChatChunk": {"usage"},
    "MessageDelta": {"role", "content", "reasoning_content", "tool_calls"},
    "ToolCallDelta": {"id", "type", "function"},
    "FunctionCallDelta": {"name", "arguments"},
}
"""Members that are left out where they have nothing to say; all others are always sent."""


def _sent(schema: Schema) -> Schema:
    """Return what msgspec writes about a type as what a client can rely on."""
    maybe = _SOMETIMES_SENT.get(schema.pop("title"), set())
    for member in schema["properties"].values():
        member.pop("default", None)
        if "enum" in member:
            member["type"] = "string"
    schema["required"] = [name for name in schema["properties"] if name not in maybe]
    return schema


def _set_finish_reasons(answers: dict[str, Schema]) -> None:
    """List the reasons: a whole answer always has one, an event only at a choice's end."""
    # One type serves both here, so the event's schema is made from the answer's.
    whole = answers["CompletionChoice"]
    answers["CompletionChunkChoice"] = {**whole, "properties": {**whole["properties"]}}
    answers["CompletionChunk"]["properties"]["choices"]["items"] = _ref(
        "schemas", "CompletionChunkChoice"
    )
    for name, reasons in FINISH_REASONS.items():
        answers[name]["properties"]["finish_reason"] = {"type": "string", "enum": reasons}
        event = answers[name.replace("Choice", "ChunkChoice")]
        event["properties"]["finish_reason"] = {
            "type": ["string", "null"],
            "enum": [*reasons, None],
        }


_USAGE = {
    "prompt_tokens": 4,
    "completion_tokens": 5,
    "total_tokens": 9,
    "prompt_tokens_details": {"cached_tokens": 0},
}
_TEXT = {
    "id": "cmpl-5d7c1e6f0a924b8c83e2f4b1d9076a3c",
    "object": "text_completion",
    "created": 1767225600,
    "model": _MODEL,
    "choices": [
        {"text": " there was a fox.", "index": 0, "finish_reason": "stop", "logprobs": None}
    ],
    "usage": _USAGE,
}
_CHAT = {
    "id": "chatcmpl-5d7c1e6f0a924b8c83e2f4b1d9076a3c",
    "object": "chat.completion",
    "created": 1767225600,
    "model": _MODEL,
    "choices": [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "It scatters light.", "refusal": None},
            "finish_reason": "stop",
            "logprobs": None,
        }
    ],
    "usage": _USAGE,
}
_CARD = {
    "id": _MODEL,
    "object": "model",
    "created": 1767225600,
    "owned_by": "tera",
    "context_length": 32768,
    "capabilities": ["completions", "chat"],
    "status": "ready",
}
_LIST = {"object": "list", "data": [_CARD]}

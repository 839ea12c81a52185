"""Examples for the OpenAPI document: requests, answers, and one error of every code."""

from collections.abc import Mapping
from typing import Any

import msgspec

from tera.contract.common import ErrorBody, ErrorEnvelope
from tera.errors import (
    BackendFailureError,
    ConcurrencyLimitError,
    ContextLengthError,
    EngineOverloadedError,
    InternalError,
    InvalidApiKeyError,
    InvalidJsonError,
    InvalidTypeError,
    InvalidValueError,
    MethodNotAllowedError,
    MissingApiKeyError,
    MissingParameterError,
    ModelNotFoundError,
    QuotaError,
    RequestRateLimitError,
    RequestTooLargeError,
    TeraError,
    TokenRateLimitError,
    UnknownUrlError,
    UnsupportedContentTypeError,
    UnsupportedParameterError,
)

Json = dict[str, Any]

MODEL = "Qwen/Qwen2.5-7B-Instruct"

COMPLETION_REQUESTS: Mapping[str, Json] = {
    "text": {
        "model": MODEL,
        "prompt": "Once upon a time",
        "max_tokens": 64,
        "stop": ["\n\n"],
    },
    "stream": {
        "model": MODEL,
        "prompt": "Once upon a time",
        "stream": True,
        "stream_options": {"include_usage": True},
    },
    "batch": {"model": MODEL, "prompt": ["One", "Two"], "n": 2, "seed": 7},
}

CHAT_REQUESTS: Mapping[str, Json] = {
    "question": {
        "model": MODEL,
        "messages": [
            {"role": "system", "content": "Answer in one sentence."},
            {"role": "user", "content": "Why is the sky blue?"},
        ],
        "max_completion_tokens": 64,
    },
    "tools": {
        "model": MODEL,
        "messages": [{"role": "user", "content": "How warm is it in Rome?"}],
        "tools": [
            {
                "type": "function",
                "function": {
                    "name": "weather",
                    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
                },
            }
        ],
        "tool_choice": "auto",
    },
}

_USAGE = {
    "prompt_tokens": 4,
    "completion_tokens": 5,
    "total_tokens": 9,
    "prompt_tokens_details": {"cached_tokens": 0},
}

COMPLETION: Json = {
    "id": "cmpl-5d7c1e6f0a924b8c83e2f4b1d9076a3c",
    "object": "text_completion",
    "created": 1767225600,
    "model": MODEL,
    "choices": [
        {"text": " there was a fox.", "index": 0, "finish_reason": "stop", "logprobs": None}
    ],
    "usage": _USAGE,
}

CHAT_COMPLETION: Json = {
    "id": "chatcmpl-5d7c1e6f0a924b8c83e2f4b1d9076a3c",
    "object": "chat.completion",
    "created": 1767225600,
    "model": MODEL,
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

MODEL_CARD: Json = {
    "id": MODEL,
    "object": "model",
    "created": 1767225600,
    "owned_by": "tera",
    "context_length": 32768,
    "capabilities": ["completions", "chat"],
    "status": "ready",
}

MODEL_LIST: Json = {"object": "list", "data": [MODEL_CARD]}

ERRORS: Mapping[str, tuple[TeraError, ...]] = {
    "BadRequest": (
        InvalidJsonError("The request body must be a JSON object."),
        UnsupportedContentTypeError(
            "The content-type 'text/plain' is not supported; send application/json."
        ),
        MissingParameterError("Missing required parameter: 'prompt'.", param="prompt"),
        InvalidTypeError(
            "Invalid type for 'stop[0]': expected a string, but got 1 instead.", param="stop[0]"
        ),
        InvalidValueError(
            "Invalid 'temperature': must be at most 2, but 3.0 was given.", param="temperature"
        ),
        UnsupportedParameterError(
            "'best_of' is only supported when it equals 'n'.", param="best_of"
        ),
        ContextLengthError(
            "This model's context holds 8192 tokens, but the request asks for 9000: 1000 of the "
            "prompt and 8000 of max_tokens. Shorten the prompt or lower max_tokens.",
            param="max_tokens",
        ),
    ),
    "Unauthorized": (
        MissingApiKeyError(
            "You did not provide an API key. Send it in the header "
            "`Authorization: Bearer sk-tera-...`."
        ),
        InvalidApiKeyError(
            "The API key is not valid. Check the header `Authorization: Bearer sk-tera-...`, "
            "or ask your administrator for a new key."
        ),
    ),
    "NotFound": (
        ModelNotFoundError(
            "The model `gpt-9` does not exist or is not deployed, or you do not have access to it.",
            param="model",
        ),
        UnknownUrlError("Unknown URL: GET /v1/models/."),
    ),
    "MethodNotAllowed": (MethodNotAllowedError("PUT is not allowed here; use POST."),),
    "RequestTooLarge": (RequestTooLargeError("The request body is larger than 10485760 bytes."),),
    "ServerError": (
        BackendFailureError("The model's engines failed repeatedly on this request."),
        InternalError("The server failed on this request."),
    ),
}
"""Example errors, by the name of the response in the document."""

_RATE_LIMITED: Mapping[str, TeraError] = {
    "requests_per_minute": RequestRateLimitError(
        "Your organisation has reached its limit of 60 requests per minute. Try again in 2 s."
    ),
    "tokens_per_minute": TokenRateLimitError(
        "Your organisation has reached its limit of 10,000 tokens per minute. Try again in 9 s."
    ),
    "concurrency_limit_exceeded": ConcurrencyLimitError(
        "This API key has reached its limit of 8 concurrent requests. Try again in 1 s."
    ),
    "insufficient_quota": QuotaError(
        "Your organisation has too little left of its budget of 1,000,000 tokens per month for "
        "the 1,200 tokens that this request may use."
    ),
    "engine_overloaded": EngineOverloadedError(
        "The model is overloaded: 256 requests wait for it here. Try again in 4 s."
    ),
}


def error_bodies(response: str) -> dict[str, Json]:
    """Return the named example bodies of an error response."""
    if response == "RateLimited":
        errors = _RATE_LIMITED
    else:
        errors = {error.code: error for error in ERRORS[response]}
    bodies = {
        name: ErrorBody(error.message, error.type, error.param, error.code)
        for name, error in errors.items()
    }
    return {name: msgspec.to_builtins(ErrorEnvelope(body)) for name, body in bodies.items()}

"""Shared by every endpoint: strict types, the error envelope, usage, model cards."""

import json
from typing import Annotated, Any, Literal, Never, TypeVar

import msgspec
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    StringConstraints,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from tera.errors import (
    FOR_OPERATORS,
    InvalidRequestError,
    InvalidTypeError,
    InvalidValueError,
    MissingParameterError,
    TeraError,
    UnsupportedParameterError,
)

MAX_SHOWN_CHARACTERS = 256
"""How much of a client's own text an error message repeats: enough to recognise it."""


class Request(BaseModel):
    """Base of request bodies: strict types, null means absent, unknown fields are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, values: Any) -> Any:
        if isinstance(values, dict) and None in values.values():
            return {name: value for name, value in values.items() if value is not None}
        return values


def _integer(value: Any) -> Any:
    """Accept `1.0` as an integer, as JSON Schema does, but no other number that is not one."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def _number(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise PydanticCustomError("float_type", "a number")
    return float(value) if abs(value) < 2**1023 else float("inf")


Integer = Annotated[int, BeforeValidator(_integer)]
"""A JSON integer of any size; `true` is not one, `1.0` is."""

Number = Annotated[float, BeforeValidator(_number)]
"""A JSON number; an integer is one."""


def unsupported(reason: str, at: str = "") -> Never:
    """In a validator, refuse what this deployment does not support; `at` as in `invalid`."""
    context = {"reason": reason, "at": at}
    raise PydanticCustomError("unsupported_parameter", "{reason}", context)


def invalid(reason: str, at: str = "") -> Never:
    """In a validator, refuse a value; `at` is the path within the field, such as `[2]`."""
    raise PydanticCustomError("invalid_value", "{reason}", {"reason": reason, "at": at})


def missing(at: str = "") -> Never:
    """In a validator, say that a member is required; `at` as in `invalid`."""
    raise PydanticCustomError("missing_member", "is required", {"at": at})


def wrong_type(expected: str, value: Any, at: str = "") -> Never:
    """In a validator, refuse a JSON type; `at` is the path within the field."""
    context = {"expected": expected, "received": shown(value), "at": at}
    raise PydanticCustomError("wrong_type", "{expected}", context)


NonEmpty = Annotated[str, StringConstraints(min_length=1)]

T = TypeVar("T", bound=Request)


def parse_request(kind: type[T], body: dict[str, Any]) -> T:
    """Return the request in a parsed JSON object.

    Raises:
        InvalidRequestError: of the kind that fits the first wrong field, in the order in which
            fields are declared; `param` is its path, such as `prompt[2]`.
    """
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        # Arrays fail at their first wrong entry; otherwise a long one could have an error for each.
        order = {name: position for position, name in enumerate(kind.model_fields)}
        faults = error.errors(include_url=False)
        first = min(faults, key=lambda fault: order.get(str(fault["loc"][0]), -1))
        raise _field_error(first) from error


def _field_error(fault: ErrorDetails) -> InvalidRequestError:
    kind, context = fault["type"], fault.get("ctx") or {}
    if kind == "literal_error" and not isinstance(fault["input"], str):
        kind, context = "string_type", {}  # all allowed values are strings
    if kind == "string_too_short":
        kind, context = "invalid_value", {"reason": "must not be empty"}  # no string has another
    param = path_of(fault["loc"]) + context.get("at", "")
    if kind in ("missing", "missing_member"):
        return MissingParameterError(f"Missing required parameter: '{param}'.", param=param)
    if kind == "unsupported_parameter":
        return UnsupportedParameterError(f"'{param}' {context['reason']}.", param=param)
    if kind == "invalid_value":
        return InvalidValueError(f"Invalid '{param}': {context['reason']}.", param=param)
    received = context.get("received") or shown(fault["input"])
    if bounds := _bounds(kind, context):
        return InvalidValueError(
            f"Invalid '{param}': must be {bounds}, but {received} was given.", param=param
        )
    wanted = context.get("expected") or _WANTED.get(kind, "another type")
    return InvalidTypeError(
        f"Invalid type for '{param}': expected {wanted}, but got {received} instead.", param=param
    )


_WANTED = {
    "string_type": "a string",
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "bool_type": "a boolean",
    "list_type": "an array",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
    "finite_number": "a finite number",
}


def _bounds(kind: str, context: dict[str, Any]) -> str:
    """Return the range that a range error mentions; empty for other errors."""
    if kind == "string_too_long":
        return f"at most {context['max_length']} characters"
    if kind == "string_pattern_mismatch":
        return f"a string that matches {context['pattern']}"
    if kind == "literal_error":
        return f"one of {context['expected']}"
    return ""


def shown(value: Any) -> str:
    """Return a received value as JSON, shortened: enough to recognise, never a whole prompt."""
    if isinstance(value, str):
        return "a string"
    if isinstance(value, list | dict):
        return "an array" if isinstance(value, list) else "an object"
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def cut(text: str) -> str:
    """Shorten a client's own text to what an error may repeat: a few lines at most."""
    return text if len(text) <= MAX_SHOWN_CHARACTERS else f"{text[:MAX_SHOWN_CHARACTERS]}…"


def path_of(location: tuple[int | str, ...]) -> str:
    """Return a location as `prompt[2]` or `stream_options.include_usage`."""
    path = ""
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else str(part)
    return path


class ErrorBody(msgspec.Struct, frozen=True):
    """The content of the envelope: exactly these four members."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorEnvelope(msgspec.Struct, frozen=True):
    """The body of every error answer."""

    error: ErrorBody


def error_envelope(error: TeraError) -> bytes:
    """Return the JSON body of an error answer.

    Clients are not told what is wrong with the configuration or with a part of the platform.
    """
    inside = isinstance(error, FOR_OPERATORS)
    message = "The server failed on this request." if inside else error.message
    body = ErrorBody(message, error.type, None if inside else error.param, error.code)
    return msgspec.json.encode(ErrorEnvelope(body))


class PromptTokensDetails(msgspec.Struct, frozen=True):
    """Where prompt tokens came from."""

    cached_tokens: int


class Usage(msgspec.Struct, frozen=True):
    """What a request used: each prompt counts once, completions are summed."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


def usage_of(prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> Usage:
    """Return the usage object of these counts."""
    return Usage(
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        total_tokens=prompt_tokens + completion_tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens),
    )


StreamUsage = Usage | msgspec.UnsetType | None
"""A chunk's `usage`: absent, or null in all chunks but the last."""

ModelStatus = Literal["ready", "scaled_to_zero", "starting", "failed"]


class ModelCard(msgspec.Struct, frozen=True):
    """One entry of the model list."""

    id: str
    created: int
    owned_by: str
    context_length: int | None
    """None until the model could be loaded."""
    capabilities: tuple[str, ...]
    status: ModelStatus
    object: Literal["model"] = "model"


class ModelList(msgspec.Struct, frozen=True):
    """The answer of `GET /v1/models`."""

    data: list[ModelCard]
    object: Literal["list"] = "list"

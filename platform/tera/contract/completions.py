"""`POST /v1/completions`: request, response and stream chunk (contract C and S)."""

from typing import Annotated, Any, Literal

import msgspec
from pydantic import BeforeValidator, Field, StringConstraints, ValidationInfo, field_validator

from tera.contract.common import (
    Integer,
    NonEmpty,
    Number,
    Request,
    Usage,
    invalid,
    unsupported,
    wrong_type,
)

MAX_CHOICES = 128
MAX_STOP_STRINGS = 4

Prompt = str | list[int]
"""Text, or token ids of the model's vocabulary."""


def _prompts(value: Any) -> list[Prompt]:
    """Return the four forms of `prompt` as one: a list of prompts."""
    if isinstance(value, str):
        return [_text(value, "")]
    if not isinstance(value, list):
        wrong_type("a string or an array", value)
    if not value:
        invalid("must not be an empty array")
    if _is_token(value[0]):
        return [_tokens(value, "")]
    if len(value) > MAX_CHOICES:
        invalid(f"must have at most {MAX_CHOICES} prompts, but has {len(value)}")
    one = _text if isinstance(value[0], str) else _tokens
    return [one(prompt, f"[{position}]") for position, prompt in enumerate(value)]


def _is_token(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _text(value: Any, at: str) -> str:
    if not isinstance(value, str):
        wrong_type("a string", value, at)
    if not value:
        invalid("must not be empty", at)
    return value


def _tokens(value: Any, at: str) -> list[int]:
    if not isinstance(value, list):
        wrong_type("a string or an array of token ids", value, at)
    if not value:
        invalid("must not be an empty array", at)
    for position, token in enumerate(value):
        whole = _is_token(token) and (isinstance(token, int) or token.is_integer())
        if not whole:
            wrong_type("a token id", token, f"{at}[{position}]")
    return [int(token) for token in value]


def _stops(value: Any) -> list[str]:
    """Return the two forms of `stop` as one: a list of stop strings."""
    if isinstance(value, str):
        return [_text(value, "")]
    if not isinstance(value, list):
        wrong_type("a string or an array of strings", value)
    if len(value) > MAX_STOP_STRINGS:
        invalid(f"must have at most {MAX_STOP_STRINGS} entries, but has {len(value)}")
    return [_text(stop, f"[{position}]") for position, stop in enumerate(value)]


def _biases(value: Any) -> dict[int, float]:
    """Return `logit_bias` with token ids as numbers."""
    if not isinstance(value, dict):
        wrong_type("an object", value)
    biases: dict[int, float] = {}
    for key, bias in value.items():
        if not (key.isascii() and key.isdigit() and len(key) <= 10):
            invalid(f"the key {key[:32]!r} is no token id")
        if not _is_token(bias):
            wrong_type("a number", bias, f".{key}")
        if not -100 <= bias <= 100:
            invalid("must be between -100 and 100", f".{key}")
        biases[int(key)] = float(bias)
    return biases


Stops = Annotated[list[str], BeforeValidator(_stops)]
LogitBias = Annotated[dict[int, float], BeforeValidator(_biases)]
Seed = Annotated[Integer, Field(ge=-(2**63), le=2**63 - 1)]
User = Annotated[str, StringConstraints(max_length=512)]


class StreamOptions(Request):
    """What a stream holds beside the text."""

    include_usage: bool = False


class CompletionRequest(Request):
    """A request; fields in the contract's order, which is the order of reported faults."""

    model: NonEmpty
    prompt: Annotated[list[Prompt], BeforeValidator(_prompts)]
    max_tokens: Annotated[Integer, Field(ge=1)] = 16
    temperature: Annotated[Number, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[Number, Field(ge=0, le=1)] = 1.0
    top_k: Annotated[Integer, Field(ge=-1, le=2**31 - 1)] = -1
    min_p: Annotated[Number, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[Number, Field(gt=0, le=2)] = 1.0
    stop: Stops = Field(default_factory=list)
    seed: Seed | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Annotated[Integer, Field(ge=1, le=MAX_CHOICES)] = 1
    best_of: Integer | None = None
    logprobs: Annotated[Integer, Field(ge=0, le=5)] | None = None
    echo: bool = False
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] = 0.0
    logit_bias: LogitBias | None = None
    suffix: str | None = None
    user: User | None = None

    @field_validator("stream_options")
    @classmethod
    def _only_with_stream(
        cls, value: StreamOptions | None, info: ValidationInfo
    ) -> StreamOptions | None:
        if value is not None and info.data.get("stream") is False:
            invalid("is only allowed together with 'stream': true")
        return value

    @field_validator("n")
    @classmethod
    def _bounded_choices(cls, value: int, info: ValidationInfo) -> int:
        prompts = len(info.data.get("prompt", ()))
        if prompts * value > MAX_CHOICES:
            invalid(f"prompts × n must be at most {MAX_CHOICES}, but {prompts} × {value} was given")
        return value

    @field_validator("best_of")
    @classmethod
    def _best_of_is_n(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and "n" in info.data and value != info.data["n"]:
            unsupported("is only supported when it equals 'n'")
        return value

    @field_validator("suffix")
    @classmethod
    def _no_suffix(cls, value: str | None) -> str | None:
        if value is not None:
            unsupported("is not supported: no model here declares fill-in-the-middle")
        return value

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a usage chunk."""
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionLogprobs(msgspec.Struct, frozen=True):
    """OpenAI's legacy form: four lists, one entry per token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(msgspec.Struct, frozen=True):
    """One completion, or a piece of it in a stream."""

    text: str
    index: int
    finish_reason: str | None = None
    logprobs: CompletionLogprobs | None = None


class Completion(msgspec.Struct, frozen=True):
    """The answer without `stream`."""

    id: str
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage
    object: Literal["text_completion"] = "text_completion"


class CompletionChunk(msgspec.Struct, frozen=True):
    """One event of a stream; `usage` is there only with `include_usage`."""

    id: str
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | msgspec.UnsetType | None = msgspec.UNSET
    object: Literal["text_completion"] = "text_completion"

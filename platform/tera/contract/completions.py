"""`POST /v1/completions`: request, response and stream chunk (contract C and S)."""

from typing import Annotated, Any, Literal

import msgspec
from pydantic import (
    BeforeValidator,
    Field,
    SkipValidation,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
)

from tera.contract.common import (
    Integer,
    Request,
    StreamUsage,
    Usage,
    invalid,
    unsupported,
    wrong_type,
)
from tera.contract.fields import (
    MAX_CHOICES,
    Choices,
    LogitBias,
    MaxTokens,
    MinP,
    ModelId,
    Penalty,
    Range,
    RepetitionPenalty,
    Seed,
    Stops,
    Streamed,
    StreamOptions,
    Temperature,
    TopK,
    TopP,
    User,
    is_number,
    only_with_stream,
    text_at,
)

Prompt = str | list[int]
"""Text, or token ids of the model's vocabulary."""


MAX_TOKEN_IDS = 1_048_576
"""Most token ids in all prompts of a request: as many as the longest contexts can hold."""


_PASS = 65_536
"""Token ids that are looked at in one go."""


class PromptArray(list[Prompt]):
    """Prompts that were sent in an array, so that errors name their index."""


def _prompts(value: Any) -> list[Prompt]:
    """Convert the four forms of `prompt` to one: a list of prompts."""
    if isinstance(value, str):
        return [text_at(value, "")]
    if not isinstance(value, list):
        wrong_type("a string or an array", value)
    if not value:
        invalid("must not be an empty array")
    if is_number(value[0]):
        _check_token_count(len(value))
        return [_tokens(value, "")]
    if len(value) > MAX_CHOICES:
        invalid(f"must have at most {MAX_CHOICES} prompts, but has {len(value)}")
    if isinstance(value[0], str):
        return PromptArray(text_at(text, f"[{at}]") for at, text in enumerate(value))
    _check_token_count(sum(len(ids) for ids in value if isinstance(ids, list)))
    return PromptArray(_tokens(ids, f"[{at}]") for at, ids in enumerate(value))


def _check_token_count(token_ids: int) -> None:
    if token_ids > MAX_TOKEN_IDS:
        invalid(f"must have at most {MAX_TOKEN_IDS} token ids, but has {token_ids}")


def _tokens(value: Any, at: str) -> list[int]:
    if not isinstance(value, list):
        wrong_type("a string or an array of token ids", value, at)
    if not value:
        invalid("must not be an empty array", at)
    whole: list[int] = []
    # There may be a million, so valid ids are recognised in a few passes over long pieces of the
    # list. They are not passes over all of it, each of which would hold the GIL for 30 ms.
    for start in range(0, len(value), _PASS):
        piece = value[start : start + _PASS]
        types = set(map(type, piece))
        if types == {int}:
            whole += piece
        elif types <= {int, float} and (integers := list(map(int, piece))) == piece:
            whole += integers
        else:
            break
    else:
        return whole
    place, wrong = next(
        (place, token)
        for place, token in enumerate(value)
        if not is_number(token) or token != int(token)
    )
    wrong_type("a token id", wrong, f"{at}[{place}]")


_TEXT = {"type": "string", "minLength": 1}
_TOKENS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}

Prompts = Annotated[
    list[Prompt],
    SkipValidation,  # a copy would not be a `PromptArray`, and nothing is left to check
    BeforeValidator(_prompts),
    WithJsonSchema(
        {
            "oneOf": [
                _TEXT,
                {"type": "array", "items": _TEXT, "minItems": 1, "maxItems": MAX_CHOICES},
                _TOKENS,
                {"type": "array", "items": _TOKENS, "minItems": 1, "maxItems": MAX_CHOICES},
            ],
            "description": "One prompt or several of one kind: text, or ids of the model's tokens.",
            "examples": ["Once upon a time", ["One", "Two"], [1, 2, 3], [[1, 2], [3]]],
        }
    ),
]


class CompletionRequest(Request):
    """A request; faults are reported in the order of the fields, which is the contract's."""

    model: ModelId
    prompt: Prompts
    max_tokens: MaxTokens = 16
    temperature: Temperature = 1.0
    top_p: TopP = 1.0
    top_k: TopK = -1
    min_p: MinP = 0.0
    repetition_penalty: RepetitionPenalty = 1.0
    stop: Stops = Field(default_factory=list)
    seed: Seed | None = None
    stream: Streamed = False
    stream_options: StreamOptions | None = None
    n: Choices = 1
    best_of: Annotated[Integer, Field(description="Only accepted when it equals `n`.")] | None = (
        None
    )
    logprobs: (
        Annotated[
            Integer,
            Range(ge=0, le=5),
            Field(description="Likeliest tokens to report at each position."),
        ]
        | None
    ) = None
    echo: Annotated[bool, Field(description="Begin the text with the prompt.")] = False
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    logit_bias: LogitBias | None = None
    suffix: (
        Annotated[str, Field(description="Refused by models without fill-in-the-middle.")] | None
    ) = None
    user: User | None = None

    @field_validator("stream_options")
    @classmethod
    def _only_with_stream(
        cls, value: StreamOptions | None, info: ValidationInfo
    ) -> StreamOptions | None:
        return only_with_stream(value, info)

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
    """OpenAI's legacy form: four lists, one entry per token.

    They are JSON where a whole answer has had them encoded as they came.
    """

    tokens: list[str] | msgspec.Raw
    token_logprobs: list[float | None] | msgspec.Raw
    top_logprobs: list[dict[str, float] | None] | msgspec.Raw
    text_offset: list[int] | msgspec.Raw


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
    """One event of a stream; it has `usage` only with `include_usage`."""

    id: str
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: StreamUsage = msgspec.UNSET
    object: Literal["text_completion"] = "text_completion"

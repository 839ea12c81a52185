"""Fields that completions and chat share: each type is written once, with its range."""

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import (
    BeforeValidator,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    StringConstraints,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    WithJsonSchema,
)
from pydantic_core import CoreSchema, core_schema

from tera.contract.common import Integer, NonEmpty, Number, Request, invalid, shown, wrong_type

MAX_CHOICES = 128
MAX_STOP_STRINGS = 4

MAX_BIASES = 1024
"""What vLLM's GPU model runner has room for (`MAX_NUM_LOGIT_BIAS_TOKENS`); one more ends its
engine."""


@dataclass(frozen=True, slots=True)
class Range:
    """In a field's annotation: the range of its number, which errors name in full."""

    ge: int | None = None
    gt: int | None = None
    le: int | None = None

    def __str__(self) -> str:
        if self.le is None:
            return f"at least {self.ge}" if self.gt is None else f"above {self.gt}"
        if self.gt is not None:
            return f"above {self.gt} and at most {self.le}"
        return f"at most {self.le}" if self.ge is None else f"from {self.ge} to {self.le}"

    def __contains__(self, number: float) -> bool:
        return (
            (self.ge is None or number >= self.ge)
            and (self.gt is None or number > self.gt)
            and (self.le is None or number <= self.le)
        )

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.no_info_wrap_validator_function(self._checked, handler(source))

    def _checked(self, value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
        number = validate(value)
        if number not in self:
            invalid(f"must be {self}, but {shown(value)} was given")
        return number

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        bounds = {"minimum": self.ge, "exclusiveMinimum": self.gt, "maximum": self.le}
        given = {word: bound for word, bound in bounds.items() if bound is not None}
        return {**handler(schema), **given}


@dataclass(frozen=True, slots=True)
class Entries:
    """In a field's annotation: how long its array may be; checked before any entry.

    Only the first wrong entry is reported: a long array could have an error for each.
    """

    least: int
    most: int

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        array: Any = handler(source)
        assert array["type"] == "list"
        array["fail_fast"] = True
        return core_schema.no_info_before_validator_function(self._checked, array)

    def _checked(self, value: Any) -> Any:
        if isinstance(value, list) and not self.least <= len(value) <= self.most:
            bounds = f"from {self.least} to {self.most}" if self.least else f"at most {self.most}"
            invalid(f"must have {bounds} entries, but has {len(value)}")
        return value

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        least = {"minItems": self.least} if self.least else {}
        return {**handler(schema), **least, "maxItems": self.most}


def is_number(value: Any) -> bool:
    """Return whether a JSON value is a number; `true` is not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def text_at(value: Any, at: str) -> str:
    """Return a string that is not empty, at the path `at` within its field."""
    if not isinstance(value, str):
        wrong_type("a string", value, at)
    if not value:
        invalid("must not be empty", at)
    return value


def _stops(value: Any) -> list[str]:
    """Convert the two forms of `stop` to one: a list of stop strings."""
    if isinstance(value, str):
        return [text_at(value, "")]
    if not isinstance(value, list):
        wrong_type("a string or an array of strings", value)
    if len(value) > MAX_STOP_STRINGS:
        invalid(f"must have at most {MAX_STOP_STRINGS} entries, but has {len(value)}")
    return [text_at(stop, f"[{position}]") for position, stop in enumerate(value)]


def _biases(value: Any) -> dict[int, float]:
    """Return `logit_bias` with token ids as numbers."""
    if not isinstance(value, dict):
        wrong_type("an object", value)
    if len(value) > MAX_BIASES:
        invalid(f"must have at most {MAX_BIASES} entries, but has {len(value)}")
    biases: dict[int, float] = {}
    for key, bias in value.items():
        if not (key.isascii() and key.isdigit() and len(key) <= 10):
            invalid(f"the key {key[:32]!r} is not a token id")
        if not is_number(bias):
            wrong_type("a number", bias, f".{key}")
        if not -100 <= bias <= 100:
            invalid(f"must be from -100 to 100, but {shown(bias)} was given", f".{key}")
        biases[int(key)] = float(bias)
    return biases


ModelId = Annotated[
    NonEmpty,
    Field(
        description="Id or alias of a model, as in the model list; case-sensitive.",
        examples=["Qwen/Qwen2.5-7B-Instruct"],
    ),
]
MaxTokens = Annotated[
    Integer,
    Range(ge=1),
    Field(
        description="Most tokens to generate for one completion; prompt and completion must fit "
        "the context.",
        examples=[64],
    ),
]
Temperature = Annotated[
    Number, Range(ge=0, le=2), Field(description="0 always takes the most likely token.")
]
TopP = Annotated[
    Number,
    Range(ge=0, le=1),
    Field(
        description="Sample among the likeliest tokens with this total probability; 0 means "
        "the single likeliest.",
    ),
]
TopK = Annotated[
    Integer,
    Range(ge=-1, le=2**31 - 1),
    Field(
        description="Sample among this many likeliest tokens; -1 and 0 mean all.",
    ),
]
MinP = Annotated[
    Number,
    Range(ge=0, le=1),
    Field(description="Exclude tokens less likely than this fraction of the likeliest."),
]
RepetitionPenalty = Annotated[
    Number,
    Range(gt=0, le=2),
    Field(description="Values above 1 make tokens of the prompt and the text less likely."),
]
Penalty = Annotated[
    Number,
    Range(ge=-2, le=2),
    Field(description="Values above 0 make tokens that are already in the text less likely."),
]
Choices = Annotated[
    Integer,
    Range(ge=1, le=MAX_CHOICES),
    Field(
        description=f"Completions per prompt; prompts × n is at most {MAX_CHOICES}.",
    ),
]
Seed = Annotated[
    Integer,
    Range(ge=-(2**63), le=2**63 - 1),
    Field(
        description="Repeating a request with the same seed gives the same text.",
    ),
]
Stops = Annotated[
    list[str],
    BeforeValidator(_stops),
    WithJsonSchema(
        {
            "oneOf": [
                {"type": "string", "minLength": 1},
                {
                    "type": "array",
                    "items": {"type": "string", "minLength": 1},
                    "maxItems": MAX_STOP_STRINGS,
                },
            ],
            "description": "The text ends before the first of these.",
            "examples": ["\n\n", ["END", "###"]],
        }
    ),
]
LogitBias = Annotated[
    dict[int, float],
    BeforeValidator(_biases),
    WithJsonSchema(
        {
            "type": "object",
            "propertyNames": {"pattern": "^[0-9]{1,10}$"},
            "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
            "maxProperties": MAX_BIASES,
            "description": "Maps token ids to a bias that is added to their log-probabilities.",
            "examples": [{"50256": -100}],
        }
    ),
]
User = Annotated[
    str,
    StringConstraints(max_length=512),
    Field(description="A name for the end user, kept in the usage records."),
]
Streamed = Annotated[bool, Field(description="Answer with server-sent events.")]


class StreamOptions(Request):
    """What a stream contains besides the text."""

    include_usage: Annotated[
        bool, Field(description="One more event before the end, with `usage` and no choices.")
    ] = False


def only_with_stream(value: StreamOptions | None, info: ValidationInfo) -> StreamOptions | None:
    """Refuse `stream_options` in a request without `stream`."""
    if value is not None and info.data.get("stream") is False:
        invalid("is only allowed together with 'stream': true")
    return value

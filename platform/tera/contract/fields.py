"""Fields that completions and chat share: each type is written once, with its range."""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, StringConstraints, ValidationInfo, WithJsonSchema

from tera.contract.common import Integer, NonEmpty, Number, Request, invalid, wrong_type

MAX_CHOICES = 128
MAX_STOP_STRINGS = 4


def is_number(value: Any) -> bool:
    """Return whether a JSON value is a number; `true` is none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def text_at(value: Any, at: str) -> str:
    """Return a string that is not empty, at the path `at` within its field."""
    if not isinstance(value, str):
        wrong_type("a string", value, at)
    if not value:
        invalid("must not be empty", at)
    return value


def _stops(value: Any) -> list[str]:
    """Return the two forms of `stop` as one: a list of stop strings."""
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
    biases: dict[int, float] = {}
    for key, bias in value.items():
        if not (key.isascii() and key.isdigit() and len(key) <= 10):
            invalid(f"the key {key[:32]!r} is no token id")
        if not is_number(bias):
            wrong_type("a number", bias, f".{key}")
        if not -100 <= bias <= 100:
            invalid("must be between -100 and 100", f".{key}")
        biases[int(key)] = float(bias)
    return biases


ModelId = Annotated[
    NonEmpty,
    Field(
        description="Id or alias of a model, as in the model list. Upper and lower case differ.",
        examples=["Qwen/Qwen2.5-7B-Instruct"],
    ),
]
MaxTokens = Annotated[
    Integer,
    Field(
        ge=1,
        description="Most tokens of one completion; with the prompt it must fit the context.",
        examples=[64],
    ),
]
Temperature = Annotated[
    Number, Field(ge=0, le=2, description="0 always takes the most likely token.")
]
TopP = Annotated[
    Number,
    Field(
        ge=0,
        le=1,
        description="Sample among the likeliest tokens of this total probability; 0 is the "
        "single likeliest.",
    ),
]
TopK = Annotated[
    Integer,
    Field(
        ge=-1,
        le=2**31 - 1,
        description="Sample among this many likeliest tokens; -1 and 0 are all.",
    ),
]
MinP = Annotated[
    Number,
    Field(ge=0, le=1, description="Leave out tokens less likely than this share of the likeliest."),
]
RepetitionPenalty = Annotated[
    Number,
    Field(gt=0, le=2, description="Above 1 holds back tokens of the prompt and of the text."),
]
Penalty = Annotated[
    Number, Field(ge=-2, le=2, description="Above 0 holds back tokens that the text has already.")
]
Choices = Annotated[
    Integer,
    Field(
        ge=1,
        le=MAX_CHOICES,
        description=f"Completions of each prompt; prompts × n is at most {MAX_CHOICES}.",
    ),
]
Seed = Annotated[
    Integer,
    Field(
        ge=-(2**63),
        le=2**63 - 1,
        description="The same request with the same seed gives the same text.",
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
            "description": "Token ids to what is added to their log-probabilities.",
            "examples": [{"50256": -100}],
        }
    ),
]
User = Annotated[
    str,
    StringConstraints(max_length=512),
    Field(description="A name of the end user, for the usage records."),
]
Streamed = Annotated[bool, Field(description="Answer with server-sent events.")]


class StreamOptions(Request):
    """What a stream holds beside the text."""

    include_usage: Annotated[
        bool, Field(description="One more event before the end, with `usage` and no choices.")
    ] = False


def only_with_stream(value: StreamOptions | None, info: ValidationInfo) -> StreamOptions | None:
    """Refuse `stream_options` of a request that is no stream."""
    if value is not None and info.data.get("stream") is False:
        invalid("is only allowed together with 'stream': true")
    return value

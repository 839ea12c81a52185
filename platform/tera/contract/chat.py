"""`POST /v1/chat/completions`: request, response and stream chunk (contract T)."""

from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    StringConstraints,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
)
from pydantic.json_schema import SkipJsonSchema

from tera.contract.common import (
    Integer,
    NonEmpty,
    Request,
    invalid,
    missing,
    shown,
    unsupported,
    wrong_type,
)
from tera.contract.fields import (
    Choices,
    Entries,
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
    only_with_stream,
)
from tera.contract.schemas import JsonSchema, check_schemas

MAX_MESSAGES = 2048
"""Most messages of a conversation. Each is an object here, in the template and in vLLM's checks,
which spend some 50 µs on it before its first character is read."""

MAX_PARTS = 2048
"""Most content parts of a message: parts with text, as many as there may be messages."""

MAX_TOOLS = 128
"""Most tools; OpenAI's bound."""

MAX_TOOL_CALLS = 128
"""Most tool calls of a message; OpenAI's bound too, and enough for one call of each tool."""

MAX_MODALITIES = 8
"""More modalities than exist."""

Role = Literal["system", "developer", "user", "assistant", "tool"]
FunctionName = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]


def _content(value: Any) -> str:
    """Return string content or text parts as one text; no model here reads other parts."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        wrong_type("a string or an array of content parts", value)
    if len(value) > MAX_PARTS:
        invalid(f"must have at most {MAX_PARTS} parts, but has {len(value)}")
    return "\n".join(_part_text(part, f"[{position}]") for position, part in enumerate(value))


def _part_text(part: Any, at: str) -> str:
    if not isinstance(part, dict):
        wrong_type("an object", part, at)
    kind = part.get("type")
    if kind is None:
        missing(f"{at}.type")
    if kind in ("image_url", "input_audio", "file", "video_url"):
        unsupported(f"holds a part of type {kind!r}, and no model here reads it", at)
    if kind not in ("text", "refusal"):
        invalid("must be 'text'", f"{at}.type")
    text = part.get(kind)
    if text is None:
        missing(f"{at}.{kind}")
    if not isinstance(text, str):
        wrong_type("a string", text, f"{at}.{kind}")
    return text


def _part(kind: str) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {"type": {"type": "string", "const": kind}, kind: {"type": "string"}},
        "required": ["type", kind],
    }


Content = Annotated[
    str,
    BeforeValidator(_content),
    WithJsonSchema(
        {
            "oneOf": [
                {"type": "string"},
                {
                    "type": "array",
                    "items": {"oneOf": [_part("text"), _part("refusal")]},
                    "maxItems": MAX_PARTS,
                },
            ],
            "description": "Text, or parts that are joined by line breaks. Only an assistant's "
            "message may omit it.",
            "examples": ["Hello!", [{"type": "text", "text": "Hello!"}]],
        }
    ),
]


class FunctionCall(Request):
    """A call that the assistant made; `arguments` is JSON as text."""

    name: NonEmpty
    arguments: str


class ToolCall(Request):
    """One tool call of an earlier assistant message."""

    id: NonEmpty
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Request):
    """One message of the conversation."""

    role: Role
    content: Content | None = Field(default=None, validate_default=True)
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], Entries(0, MAX_TOOL_CALLS)] | None = None
    tool_call_id: str | None = Field(
        default=None,
        validate_default=True,
        description="The id of the call that this answers; required with role `tool`.",
    )

    @field_validator("content")
    @classmethod
    def _present(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is None and info.data.get("role") not in (None, "assistant"):
            missing()
        return value

    @field_validator("tool_call_id")
    @classmethod
    def _answers_a_call(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is None and info.data.get("role") == "tool":
            missing()
        return value


class FunctionDefinition(Request):
    """A function that the model may call; `parameters` is a JSON schema."""

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool = False


class Tool(Request):
    """A tool; only functions exist."""

    type: Literal["function"]
    function: FunctionDefinition


class NamedFunction(Request):
    """The name of a function."""

    name: NonEmpty


class NamedToolChoice(Request):
    """The one function that the model must call."""

    type: Literal["function"]
    function: NamedFunction


def _tool_choice(value: Any) -> Any:
    if isinstance(value, str) and value not in ("none", "auto", "required"):
        invalid("must be 'none', 'auto', 'required' or an object that names a function")
    if not isinstance(value, str | dict):
        wrong_type("a string or an object", value)
    return NamedToolChoice.model_validate(value) if isinstance(value, dict) else value


class JsonSchemaFormat(Request):
    """The schema that the answer must match."""

    name: FunctionName
    description: str | None = None
    schema_: JsonSchema = Field(alias="schema")
    strict: bool = False


class ResponseFormat(Request):
    """The format that the answer must have."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = Field(default=None, validate_default=True)

    @field_validator("json_schema")
    @classmethod
    def _schema_for_its_type(
        cls, value: JsonSchemaFormat | None, info: ValidationInfo
    ) -> JsonSchemaFormat | None:
        if value is None and info.data.get("type") == "json_schema":
            missing()
        return value


class ChatRequest(Request):
    """A request; faults are reported in the order of the fields."""

    model: ModelId
    messages: Annotated[
        list[Message],
        Entries(1, MAX_MESSAGES),
        Field(examples=[[{"role": "user", "content": "Say hello."}]]),
    ]
    max_completion_tokens: MaxTokens | None = None
    max_tokens: MaxTokens | None = Field(
        default=None, description="Older name of `max_completion_tokens`."
    )
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
    logprobs: Annotated[bool, Field(description="Report the log-probability of each token.")] = (
        False
    )
    top_logprobs: (
        Annotated[
            Integer,
            Range(ge=0, le=20),
            Field(
                description="Likeliest tokens to report at each position; only with `logprobs`.",
            ),
        ]
        | None
    ) = None
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    logit_bias: LogitBias | None = None
    response_format: ResponseFormat | None = None
    tools: (
        Annotated[
            list[Tool],
            Entries(1, MAX_TOOLS),
            Field(description="Refused by models without a tool parser."),
        ]
        | None
    ) = None
    tool_choice: (
        Annotated[
            Literal["none", "auto", "required"] | NamedToolChoice, BeforeValidator(_tool_choice)
        ]
        | None
    ) = None
    parallel_tool_calls: bool = True
    chat_template_kwargs: (
        Annotated[dict[str, Any], Field(description="Variables of the model's chat template.")]
        | None
    ) = None
    reasoning_effort: (
        Annotated[
            Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"],
            Field(description="Refused by models without a reasoning parser."),
        ]
        | None
    ) = None
    modalities: (
        Annotated[
            list[str],
            Entries(0, MAX_MODALITIES),
            WithJsonSchema({"type": "array", "const": ["text"], "description": "Only text."}),
        ]
        | None
    ) = None
    # Always refused, whatever their value, so the OpenAPI document does not list them.
    functions: SkipJsonSchema[Any] = None
    function_call: SkipJsonSchema[Any] = None
    audio: SkipJsonSchema[Any] = None
    web_search_options: SkipJsonSchema[Any] = None
    user: User | None = None

    @field_validator("max_tokens")
    @classmethod
    def _one_bound(cls, value: int | None, info: ValidationInfo) -> int | None:
        other = info.data.get("max_completion_tokens")
        if value is not None and other is not None and value != other:
            invalid(f"differs from 'max_completion_tokens' ({shown(other)}); give one of them")
        return value

    @field_validator("stream_options")
    @classmethod
    def _only_with_stream(
        cls, value: StreamOptions | None, info: ValidationInfo
    ) -> StreamOptions | None:
        return only_with_stream(value, info)

    @field_validator("top_logprobs")
    @classmethod
    def _only_with_logprobs(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and info.data.get("logprobs") is False:
            invalid("is only allowed together with 'logprobs': true")
        return value

    @field_validator("tools")
    @classmethod
    def _bounded_parameters(cls, value: list[Tool] | None) -> list[Tool] | None:
        check_schemas(
            (f"[{position}].function.parameters", tool.function.parameters)
            for position, tool in enumerate(value or ())
            if tool.function.parameters is not None
        )
        return value

    @field_validator("tool_choice")
    @classmethod
    def _choice_of_a_tool(cls, value: Any, info: ValidationInfo) -> Any:
        tools = info.data.get("tools")
        if value is not None and value != "none" and not tools and "tools" in info.data:
            invalid("is only allowed together with 'tools'")
        if isinstance(value, NamedToolChoice) and tools:
            names = [tool.function.name for tool in tools]
            if value.function.name not in names:
                invalid(f"names no function of 'tools'; there are {', '.join(names)[:200]}")
        return value

    @field_validator("modalities")
    @classmethod
    def _text_only(cls, value: list[str] | None) -> list[str] | None:
        if value is not None and value != ["text"]:
            unsupported("must be ['text']: models here answer in text")
        return value

    @field_validator("functions", "function_call", "audio", "web_search_options")
    @classmethod
    def _not_here(cls, value: Any) -> Any:
        if value is not None:
            unsupported("is not supported; use 'tools' for functions")
        return value

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a usage chunk."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def completion_bound(self) -> int | None:
        """The requested bound on completion tokens; None means what the context leaves."""
        return self.max_completion_tokens or self.max_tokens

"""JSON schemas of requests, answers and events, made from the types that parse and write them."""

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import msgspec
from pydantic.json_schema import models_json_schema

from tera.contract import chat, chat_answers, common, completions

Schema = dict[str, Any]

REF = "#/components/schemas/"

REQUESTS = (completions.CompletionRequest, chat.ChatRequest)
ANSWERS = (
    completions.Completion,
    completions.CompletionChunk,
    chat_answers.ChatCompletion,
    chat_answers.ChatChunk,
    common.ModelCard,
    common.ModelList,
    common.ErrorEnvelope,
)

PUBLIC_NAMES = {"Completion": "CompletionResponse", "ErrorEnvelope": "ErrorResponse"}
"""Types that have another name in the document, which was public before the type existed."""

FINISH_REASONS = {
    "CompletionChoice": ["stop", "length"],
    "ChatChoice": ["stop", "length", "tool_calls"],
}
"""Values that the types do not list, since they come from the engine, a layer above."""

_NULL: Schema = {"type": "null"}


def request_schemas() -> dict[str, Schema]:
    """Return the schemas of request bodies, by name, in all forms that clients may send."""
    _, definitions = models_json_schema(
        [(request, "validation") for request in REQUESTS], ref_template=REF + "{model}"
    )
    schemas: dict[str, Schema] = {
        name: _plain(schema) for name, schema in definitions["$defs"].items()
    }
    for schema in schemas.values():
        required = schema.get("required", ())
        schema["properties"] = {
            name: field if name in required else _optional(field)
            for name, field in schema["properties"].items()
        }
    return schemas


def _plain(schema: Any) -> Any:
    """Return a schema without pydantic's titles."""
    if isinstance(schema, list):
        return [_plain(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        # Below `properties`, the keys are names of our fields.
        key: {name: _plain(field) for name, field in value.items()}
        if key == "properties"
        else _plain(value)
        for key, value in schema.items()
        if key != "title"
    }


def _optional(field: Schema) -> Schema:
    """Return the schema of an optional field: null means the same as leaving it out."""
    if field.get("default", ...) is None:
        field = {key: value for key, value in field.items() if key != "default"}
    return _nullable(_not_null(field))


def _not_null(schema: Schema) -> Schema:
    """Return the schema of the same values without null."""
    if "anyOf" not in schema:
        return schema
    rest = {key: value for key, value in schema.items() if key != "anyOf"}
    forms = [form for form in schema["anyOf"] if form != _NULL]
    return {**forms[0], **rest} if len(forms) == 1 else {"anyOf": forms, **rest}


def _nullable(schema: Schema) -> Schema:
    """Return the schema of the same values and null."""
    if isinstance(schema.get("type"), str) and not schema.keys() & {"enum", "const"}:
        return {**schema, "type": [schema["type"], "null"]}
    for union in ("anyOf", "oneOf"):
        if union in schema:
            return {**schema, union: [*schema[union], _NULL]}
    beside = {"default", "description", "examples"}
    inside = {key: value for key, value in schema.items() if key not in beside}
    outside = {key: value for key, value in schema.items() if key in beside}
    return {"anyOf": [inside, _NULL], **outside}


def answer_schemas() -> dict[str, Schema]:
    """Return the schemas of answers, events and errors, by name."""
    _, schemas = msgspec.json.schema_components(ANSWERS, ref_template=REF + "{name}")
    kinds = {
        kind.__name__: kind
        for module in (chat, chat_answers, common, completions)
        for kind in _in(module)
    }
    answers = {name: _sent(kinds[name], schema) for name, schema in schemas.items()}
    _set_finish_reasons(answers)
    # These are promised to have no other members; all other answers may gain some.
    for name in ("ErrorEnvelope", "ErrorBody"):
        answers[name]["additionalProperties"] = False
    for name, public in PUBLIC_NAMES.items():
        answers[public] = answers.pop(name)
    return answers


def _in(module: ModuleType) -> Iterator[type[msgspec.Struct]]:
    for value in vars(module).values():
        if isinstance(value, type) and issubclass(value, msgspec.Struct):
            yield value


def _sent(kind: type[msgspec.Struct], schema: Schema) -> Schema:
    """Turn msgspec's schema of a type into what a client can rely on."""
    omits_defaults = kind.__struct_config__.omit_defaults
    required = []
    properties = {}
    for field in msgspec.structs.fields(kind):
        member = dict(schema["properties"][field.encode_name])
        member.pop("default", None)
        if "enum" in member:
            member["type"] = "string"
        omitted = omits_defaults and not field.required
        if omitted:
            member = _not_null(member)
        elif _NULL in member.get("anyOf", ()):
            member = _nullable(_not_null(member))
        if not omitted and field.default is not msgspec.UNSET:
            required.append(field.encode_name)
        properties[field.encode_name] = member
    sent = {"type": "object", "description": schema["description"], "properties": properties}
    return {**sent, "required": required} if required else sent


def _set_finish_reasons(answers: dict[str, Schema]) -> None:
    """List the finish reasons: a whole answer always has one, an event only at a choice's end."""
    # One type serves both, so the event's schema is derived from the answer's.
    whole = answers["CompletionChoice"]
    answers["CompletionChunkChoice"] = {**whole, "properties": {**whole["properties"]}}
    choices = answers["CompletionChunk"]["properties"]["choices"]
    choices["items"] = {"$ref": REF + "CompletionChunkChoice"}
    for name, reasons in FINISH_REASONS.items():
        answers[name]["properties"]["finish_reason"] = {"type": "string", "enum": reasons}
        event = answers[name.replace("Choice", "ChunkChoice")]
        event["properties"]["finish_reason"] = {
            "type": ["string", "null"],
            "enum": [*reasons, None],
        }

"""Schemas that took a worker, an engine's backend or a process along, as a tenant can send them."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tera.contract.chat import ChatRequest
from tera.contract.common import parse_request
from tera.contract.schemas import MAX_SCHEMA_PROPERTIES
from tera.errors import InvalidRequestError, InvalidValueError, UnsupportedParameterError
from tera.gateway.dialects.chat import ChatQuestion
from tera.gateway.grammars import Grammars
from tera.gateway.request import Conversation
from tera.gateway.vllm_text import VllmTextModel
from tera.upstream.xgrammar import unsupported

FORMAT = "response_format.json_schema.schema"
HELLO = [{"role": "user", "content": "Hello"}]


def over_vllm(test: Any) -> Any:
    """Mark a test that loads a model's text side with vLLM."""
    # What vLLM and torch warn themselves of, and leave unclosed, is not ours.
    quiet = pytest.mark.filterwarnings("ignore::Warning")
    for mark in (
        quiet,
        pytest.mark.slow,
        pytest.mark.vllm,
        pytest.mark.asyncio(loop_scope="module"),
    ):
        test = mark(test)
    return test


def optional(count: int) -> dict[str, Any]:
    return {"type": "object", "properties": {f"p{n}": {"type": "string"} for n in range(count)}}


def body(schema: Any) -> dict[str, Any]:
    wanted = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    return {"model": "m", "messages": HELLO, "response_format": wanted}


@pytest.mark.parametrize(
    "schema", [optional(3000), {"type": "object", "description": "x" * 8 * 1024 * 1024}]
)
def test_x2_what_took_minutes_or_stalled_a_replica_is_refused_unread(schema: Any) -> None:
    with pytest.raises(InvalidValueError, match="at most") as refused:
        parse_request(ChatRequest, body(schema))
    assert refused.value.param == FORMAT


UNENFORCED: list[tuple[dict[str, Any], str]] = [
    (
        {"type": "object", "patternProperties": {"^a$": {"type": "integer", "multipleOf": 2}}},
        ".patternProperties.^a$.multipleOf",
    ),
    ({"properties": {"a": {"not": {"type": "string"}}}}, ".properties.a.not"),
    ({"items": {"if": {}, "then": {}}}, ".items.if"),
    ({"dependentRequired": {"a": ["b"]}}, ".dependentRequired"),
    ({"type": "array", "uniqueItems": True}, ".uniqueItems"),
    ({"type": "array", "contains": {}}, ".contains"),
    ({"anyOf": [{}, {"allOf": [{}, {}]}]}, ".anyOf[1].allOf"),
    ({"$defs": {"a": {"$ref": "https://example.com/a"}}}, ".$defs.a.$ref"),
    ({"type": "string", "pattern": "^a$", "maxLength": 3}, ".maxLength"),
    ({"type": "string", "format": "uri", "minLength": 3}, ".minLength"),
    ({"type": ["string", "null"], "format": "binary"}, ".format"),
    ({"type": "string", "pattern": "^(?!a)b$"}, ".pattern"),
    ({"properties": {"a": {}}, "patternProperties": {"b": {}}}, ".patternProperties"),
    ({"patternProperties": {"a": {}, "b": {}}}, ".patternProperties"),
    ({"properties": {"a": {}}, "propertyNames": {"maxLength": 3}}, ".propertyNames"),
    ({"propertyNames": {"pattern": "a", "maxLength": 3}}, ".propertyNames"),
]


@pytest.mark.parametrize(("schema", "at"), UNENFORCED, ids=lambda it: str(it)[:60])
def test_x2_what_would_not_be_enforced_is_found_with_its_place(
    schema: dict[str, Any], at: str
) -> None:
    assert [fault.at for fault in unsupported("", schema)] == [at]


ENFORCED: list[dict[str, Any]] = [
    {"properties": {"not": {"type": "integer"}, "multipleOf": {"type": "string"}}},
    {"$defs": {"if": {"type": "string"}}, "$ref": "#/$defs/if"},
    {"enum": [{"not": 1}], "default": {"contains": 1}, "examples": [{"uniqueItems": True}]},
    {"type": "array", "uniqueItems": False, "allOf": [{"type": "array"}]},
    {"type": "string", "pattern": r"^\(\?!$"},
    {"type": "object", "propertyNames": {"pattern": "^a"}},
    {"type": "object", "additionalProperties": False, "unevaluatedProperties": False},
]


@pytest.mark.parametrize("schema", ENFORCED, ids=str)
def test_what_can_be_enforced_is_left_alone(schema: dict[str, Any]) -> None:
    assert list(unsupported("", schema)) == []


@pytest.fixture(scope="module")
def grammars() -> Iterator[Grammars]:
    grammars = Grammars()
    yield grammars
    grammars.close()


@pytest.fixture(scope="module")
def model(grammars: Grammars, demo_model: Path) -> Iterator[VllmTextModel]:
    args: dict[str, Any] = {
        "max_model_len": 2048,
        "dtype": "float32",
        "tool_call_parser": "hermes",
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield VllmTextModel.load(str(demo_model), args, grammars)


async def ask(model: VllmTextModel, asked: dict[str, Any], tenant: str = "acme") -> None:
    """Go a request's way up to where an engine would be asked."""
    content = ChatQuestion(asked).request.content
    assert isinstance(content, Conversation)
    rendered = await model.render_chat(content)
    assert rendered.structured is not None
    await model.check_structured(tenant, len(json.dumps(asked)), rendered)


def tool(parameters: dict[str, Any], **others: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", "parameters": parameters, **others}}


@pytest.mark.parametrize(
    "asked",
    [
        body(optional(10)),
        {**body({}), "response_format": {"type": "json_object"}},
        {"model": "m", "messages": HELLO, "tools": [tool(optional(10))], "tool_choice": "required"},
        {"model": "m", "messages": HELLO, "tools": [tool(optional(10), strict=True)]},
        {**body(optional(10)), "tools": [tool(optional(10), strict=True)]},
    ],
    ids=["format", "object", "forced", "strict", "both"],
)
@over_vllm
async def test_t1_what_compiles_goes_to_an_engine(model: VllmTextModel, asked: Any) -> None:
    await ask(model, asked)


@over_vllm
async def test_x1_a_schema_is_looked_through_where_its_conversation_is_rendered(
    model: VllmTextModel,
) -> None:
    schema, at = UNENFORCED[0]
    content = ChatQuestion(body(schema)).request.content
    assert isinstance(content, Conversation)
    # Rendering a long request has a turn in the text pool; what comes after it is not to be long.
    with pytest.raises(UnsupportedParameterError) as refused:
        await model.render_chat(content)
    assert refused.value.param == FORMAT + at


DEAR = {"anyOf": [{"type": "string", "maxLength": 10**5 + n} for n in range(900)]}
REFUSED: list[tuple[dict[str, Any], type[InvalidRequestError], str]] = [
    (optional(MAX_SCHEMA_PROPERTIES), InvalidValueError, "5 s"),
    (DEAR, InvalidValueError, "5 s"),
    ({"$ref": "#"}, InvalidValueError, "no text fits"),
    ({"$ref": "#/nowhere"}, InvalidValueError, "nowhere"),
    ({"type": "nothing"}, InvalidValueError, "nothing"),
    ({"type": "string", "pattern": r"^(a)\1$"}, UnsupportedParameterError, "Backreference"),
    ({"type": "string", "pattern": "a$b"}, UnsupportedParameterError, "ignored"),
]


@pytest.mark.parametrize(("schema", "kind", "reason"), REFUSED, ids=lambda it: str(it)[:40])
@over_vllm
async def test_x2_what_does_not_compile_in_time_is_refused(
    model: VllmTextModel, schema: dict[str, Any], kind: type[InvalidRequestError], reason: str
) -> None:
    with pytest.raises(kind, match=reason) as refused:
        await ask(model, body(schema))
    assert refused.value.param == FORMAT
    assert "/" not in refused.value.message.replace("#/nowhere", "")
    await ask(model, body({"type": "object", "title": json.dumps(schema)[:99]}))


@over_vllm
async def test_x2_a_grammar_that_ends_its_process_ends_nothing_else(
    model: VllmTextModel, grammars: Grammars
) -> None:
    await ask(model, body({"type": "object"}))
    deep = json.dumps({"type": "string", "pattern": "(" * 10**5 + "a" + ")" * 10**5})
    vocabulary = model._structured._vocabulary
    slow = asyncio.create_task(ask(model, body(optional(600)), "other"))
    fault = await grammars.check("acme", vocabulary, "json", deep)
    assert fault is not None
    assert not fault.unsupported
    await slow
    await ask(model, body({"type": "array"}))

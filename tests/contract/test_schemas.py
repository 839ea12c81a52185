"""How large the schemas of a request may be."""

from typing import Any

import pytest

from tera.contract.chat import ChatRequest
from tera.contract.common import parse_request
from tera.contract.schemas import (
    MAX_ENUM_VALUES,
    MAX_PATTERN_CHARACTERS,
    MAX_SCHEMA_BYTES,
    MAX_SCHEMA_DEPTH,
    MAX_SCHEMA_PROPERTIES,
)
from tera.errors import InvalidValueError, MissingParameterError

FORMAT = "response_format.json_schema.schema"


def properties(count: int) -> dict[str, Any]:
    return {"type": "object", "properties": {f"p{n}": {"type": "string"} for n in range(count)}}


def nested(depth: int) -> dict[str, Any]:
    """Return a schema of so many objects inside each other."""
    schema: dict[str, Any] = {"type": "object"}
    for _ in range(depth - 1):
        schema = {"not": schema}
    return schema


def ask(schema: dict[str, Any]) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    parse_request(ChatRequest, {**BODY, "response_format": wanted})


def ask_with_tools(*schemas: dict[str, Any]) -> None:
    functions = [{"name": "f", "parameters": schema} for schema in schemas]
    tools = [{"type": "function", "function": function} for function in functions]
    parse_request(ChatRequest, {**BODY, "tools": tools})


BODY = {"model": "m", "messages": [{"role": "user", "content": "Hello"}]}

LARGEST = [
    pytest.param(properties(MAX_SCHEMA_PROPERTIES), id="properties"),
    pytest.param({"enum": list(range(MAX_ENUM_VALUES))}, id="enum"),
    pytest.param(nested(MAX_SCHEMA_DEPTH), id="depth"),
    pytest.param({"pattern": "a" * MAX_PATTERN_CHARACTERS}, id="pattern"),
    pytest.param({"title": "a" * (MAX_SCHEMA_BYTES - len('{"title":""}'))}, id="bytes"),
]


@pytest.mark.parametrize("schema", LARGEST)
def test_x2_a_schema_may_be_as_large_as_the_bounds(schema: dict[str, Any]) -> None:
    ask(schema)
    ask_with_tools(schema)


DEEP = ".not" * MAX_SCHEMA_DEPTH
TOO_LARGE = [
    pytest.param(properties(MAX_SCHEMA_PROPERTIES + 1), "", "2000 properties", id="properties"),
    pytest.param({"enum": list(range(MAX_ENUM_VALUES + 1))}, "", "1000 values", id="enum"),
    pytest.param(nested(MAX_SCHEMA_DEPTH + 1), DEEP, "32 deep", id="depth"),
    pytest.param(
        {"properties": {"a": {"pattern": "a" * (MAX_PATTERN_CHARACTERS + 1)}}},
        ".properties.a.pattern",
        "1000 characters",
        id="pattern",
    ),
    pytest.param(
        {"patternProperties": {"a" * (MAX_PATTERN_CHARACTERS + 1): {}}},
        ".patternProperties",
        "1000 characters",
        id="pattern of names",
    ),
    pytest.param({"title": "a" * MAX_SCHEMA_BYTES}, "", "262144 bytes", id="bytes"),
    pytest.param({"a": {"b": properties(2001)}}, "", "2000 properties", id="where a $ref points"),
]


@pytest.mark.parametrize(("schema", "at", "bound"), TOO_LARGE)
def test_x2_a_schema_over_a_bound_is_refused_with_it(
    schema: dict[str, Any], at: str, bound: str
) -> None:
    with pytest.raises(InvalidValueError, match=bound) as refused:
        ask(schema)
    assert refused.value.param == FORMAT + at
    with pytest.raises(InvalidValueError, match=bound) as refused:
        ask_with_tools({}, schema)
    assert refused.value.param == ("tools[1].function.parameters" + at if at else "tools")


def test_t9_a_format_without_its_schema_lacks_a_member() -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "answer"}}
    with pytest.raises(MissingParameterError) as refused:
        parse_request(ChatRequest, {**BODY, "response_format": wanted})
    assert refused.value.param == FORMAT


def test_x2_all_tools_together_are_bounded() -> None:
    ask_with_tools(properties(1000), properties(1000))
    with pytest.raises(InvalidValueError, match="has 2001") as refused:
        ask_with_tools(properties(1000), properties(1001))
    assert refused.value.param == "tools"


def test_h9_a_place_in_a_schema_is_named_in_few_words() -> None:
    schema: dict[str, Any] = {"pattern": "a" * (MAX_PATTERN_CHARACTERS + 1)}
    for _ in range(10):
        schema = {"properties": {"confidential " * 100: schema}}
    with pytest.raises(InvalidValueError) as refused:
        ask(schema)
    assert len(refused.value.message) < 500
    assert len(refused.value.param or "") < 300

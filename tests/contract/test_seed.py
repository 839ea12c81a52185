"""The document is a superset of the seed: the one that existed before Tera did."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.contract.document import COMPONENTS, DOCUMENT, resolved

from tera.generation import FinishReason

SEED: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("seed-openapi.yaml").read_text())
SEED_OPERATION: dict[str, Any] = SEED["paths"]["/v1/completions"]["post"]
OPERATION: dict[str, Any] = DOCUMENT["paths"]["/v1/completions"]["post"]


def test_seed_operation_keeps_its_names() -> None:
    for name in ("operationId", "tags", "summary"):
        assert OPERATION[name] == SEED_OPERATION[name]
    assert OPERATION["requestBody"]["required"] is SEED_OPERATION["requestBody"]["required"]
    assert (DOCUMENT["info"]["title"], DOCUMENT["info"]["version"]) == ("Tera API", "1.0.0")


def test_seed_references_keep_their_names() -> None:
    def content(body: dict[str, Any]) -> Any:
        return body["content"]["application/json"]["schema"]

    assert content(OPERATION["requestBody"]) == content(SEED_OPERATION["requestBody"])
    ours, theirs = OPERATION["responses"], SEED_OPERATION["responses"]
    assert content(ours["200"]) == content(theirs["200"])
    assert ours["200"]["description"].startswith(theirs["200"]["description"].removesuffix("."))
    for status in theirs.keys() - {"200"}:
        assert ours[status] == theirs[status]


@pytest.mark.parametrize("name", SEED["components"]["responses"])
def test_seed_responses_keep_their_meaning_and_body(name: str) -> None:
    ours, theirs = COMPONENTS["responses"][name], SEED["components"]["responses"][name]
    assert ours["description"] == theirs["description"]
    for media_type, content in theirs["content"].items():
        assert ours["content"][media_type]["schema"] == content["schema"]


def test_seed_security_is_unchanged() -> None:
    assert DOCUMENT["security"] == SEED["security"]
    assert "security" not in OPERATION
    assert COMPONENTS["securitySchemes"] == SEED["components"]["securitySchemes"]


def _leaves(schema: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, str]]:
    """Yield every place in a schema with a JSON type that it allows there."""
    schema = resolved(dict(schema))
    for union in ("oneOf", "anyOf"):
        for form in schema.get(union, ()):
            yield from _leaves(form, path)
    types = schema.get("type", [])
    for kind in [types] if isinstance(types, str) else types:
        yield path, kind
    if "items" in schema:
        yield from _leaves(schema["items"], f"{path}[]")
    for name, member in schema.get("properties", {}).items():
        yield from _leaves(member, f"{path}.{name}")


def test_every_request_of_the_seed_is_still_one() -> None:
    ours, theirs = (
        document["components"]["schemas"]["CompletionRequest"] for document in (DOCUMENT, SEED)
    )
    assert set(_leaves(ours)) >= set(_leaves(theirs))
    assert ours["required"] == theirs["required"]
    assert ours["properties"]["stream"]["default"] is theirs["properties"]["stream"]["default"]
    for name, field in theirs["properties"].items():
        if "example" in field:
            assert field["example"] in ours["properties"][name]["examples"]


@pytest.mark.parametrize("name", ["CompletionResponse", "ErrorResponse"])
def test_every_answer_fits_the_seed(name: str) -> None:
    ours, theirs = dict(_leaves(COMPONENTS["schemas"][name])), SEED["components"]["schemas"][name]
    for path, kind in _leaves(theirs):
        assert ours[path] == kind


def test_finish_reasons_are_those_of_the_seed_and_of_the_engines() -> None:
    seed = SEED["components"]["schemas"]["CompletionResponse"]["properties"]["choices"]["items"]
    ours = COMPONENTS["schemas"]["CompletionChoice"]["properties"]["finish_reason"]
    assert ours["enum"] == seed["properties"]["finish_reason"]["enum"]
    assert set(ours["enum"]) == set(FinishReason)
    chat = COMPONENTS["schemas"]["ChatChoice"]["properties"]["finish_reason"]
    assert set(chat["enum"]) == {*FinishReason, "tool_calls"}

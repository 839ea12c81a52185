"""Checks what a conversation asks structured output to enforce, before an engine is asked."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from tera.errors import InvalidRequestError, InvalidValueError, UnsupportedParameterError
from tera.gateway.grammars import Fault, Grammars, Vocabulary
from tera.gateway.request import Conversation
from tera.upstream.xgrammar import unsupported

FORMAT_PATH = "response_format.json_schema.schema"


class _Given(NamedTuple):
    """A client's schema that becomes part of the grammar, and its path in the request."""

    path: str
    schema: dict[str, Any]


class _Grammar(NamedTuple):
    """A grammar as the engine compiles it."""

    kind: str
    text: str


class StructuredOutputs:
    """Refuses what one model's engines would not enforce or could not compile."""

    def __init__(self, grammars: Grammars, vocabulary: Vocabulary) -> None:
        self._grammars = grammars
        self._vocabulary = vocabulary

    async def check(
        self, tenant: str, conversation: Conversation, structured: dict[str, Any]
    ) -> None:
        """Return if the engines can enforce `structured`, which rendering has produced.

        Raises:
            UnsupportedParameterError: a part of a schema would not be enforced.
            InvalidValueError: it is not a schema, or takes too long to compile.
            InternalError: there is no process to compile it.
        """
        given = list(_given(conversation))
        grammar = await asyncio.to_thread(_prepared, given, structured)
        if grammar is None:
            return
        fault = await self._grammars.check(tenant, self._vocabulary, *grammar)
        if fault is not None:
            raise _refusal(given[0].path if len(given) == 1 else _field(given), fault)


def _given(conversation: Conversation) -> Iterator[_Given]:
    choice = conversation.tool_choice
    named = choice["function"]["name"] if isinstance(choice, dict) else None
    for position, tool in enumerate(conversation.tools or ()):
        function = tool["function"]
        forced = choice == "required" or function["name"] == named
        if (forced or function.get("strict")) and function.get("parameters") is not None:
            yield _Given(f"tools[{position}].function.parameters", function["parameters"])
    wanted = (conversation.response_format or {}).get("json_schema") or {}
    if wanted.get("schema") is not None:
        yield _Given(FORMAT_PATH, wanted["schema"])


def _prepared(given: list[_Given], structured: dict[str, Any]) -> _Grammar | None:
    """Return the grammar that the engine compiles; None if it is the same for every request.

    Raises:
        UnsupportedParameterError: see `unsupported`.
    """
    for path, schema in given:
        for fault in unsupported(path, schema):
            raise UnsupportedParameterError(f"'{fault.at}' {fault.reason}.", param=fault.at)
    ((kind, spec),) = structured.items()
    if kind == "json_object":
        return None
    # As in vLLM's `get_structured_output_key`; the answer's properties come in the schema's order.
    return _Grammar(kind, spec if isinstance(spec, str) else json.dumps(spec))


def _field(given: list[_Given]) -> str:
    return "tools" if any(each.path.startswith("tools") for each in given) else "response_format"


def _refusal(path: str, fault: Fault) -> InvalidRequestError:
    if fault.unsupported:
        return UnsupportedParameterError(
            f"'{path}' cannot be enforced: {fault.reason}.", param=path
        )
    return InvalidValueError(f"Invalid '{path}': {fault.reason}.", param=path)

"""Checks what a conversation asks structured output to enforce, before an engine is asked."""

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


class Grammar(NamedTuple):
    """What a conversation asks structured output to enforce, as the engine compiles it."""

    kind: str
    text: str
    path: str
    """What error messages are about: the client's schema, if there is just one."""


class StructuredOutputs:
    """Refuses what one model's engines could not compile."""

    def __init__(self, grammars: Grammars, vocabulary: Vocabulary) -> None:
        self._grammars = grammars
        self._vocabulary = vocabulary

    async def check(self, tenant: str, size_bytes: int, grammar: Grammar) -> None:
        """Return if the engines can enforce a grammar in a request of `size_bytes`.

        Raises:
            UnsupportedParameterError: a part of it would not be enforced.
            InvalidValueError: it is not valid, or takes too long to compile.
            EngineOverloadedError: too many grammars are waiting already.
            InternalError: there is no process to compile it.
        """
        kind, text, path = grammar
        fault = await self._grammars.check(tenant, self._vocabulary, kind, text, size_bytes)
        if fault is not None:
            raise _refusal(path, fault)


def grammar_of(conversation: Conversation, structured: dict[str, Any]) -> Grammar | None:
    """Return the grammar that an engine compiles; None if it is the same for every request.

    It goes through whole schemas: large ones are not for the event loop.

    Args:
        conversation: of the client.
        structured: what rendering it has produced; see `RenderedChat`.

    Raises:
        UnsupportedParameterError: a part of a schema would not be enforced; see `unsupported`.
    """
    given = list(_given(conversation))
    for path, schema in given:
        for fault in unsupported(path, schema):
            raise UnsupportedParameterError(f"'{fault.at}' {fault.reason}.", param=fault.at)
    ((kind, spec),) = structured.items()
    if kind == "json_object":
        return None
    # As in vLLM's `get_structured_output_key`; the answer's properties come in the schema's order.
    text = spec if isinstance(spec, str) else json.dumps(spec)
    return Grammar(kind, text, given[0].path if len(given) == 1 else _field(given))


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


def _field(given: list[_Given]) -> str:
    return "tools" if any(each.path.startswith("tools") for each in given) else "response_format"


def _refusal(path: str, fault: Fault) -> InvalidRequestError:
    if fault.unsupported:
        return UnsupportedParameterError(
            f"'{path}' cannot be enforced: {fault.reason}.", param=path
        )
    return InvalidValueError(f"Invalid '{path}': {fault.reason}.", param=path)

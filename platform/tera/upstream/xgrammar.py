"""xgrammar, the only backend of structured output: what it cannot enforce, and a model's tokens.

By default vLLM chooses a backend for the first structured request and keeps it for all others. Tera
always uses this one, so that a gateway knows in advance what an engine will do with a schema.
"""

import re
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, Final, NamedTuple

from tera.contract.schemas import step
from tera.upstream.symbols import Symbol, check

BACKEND: Final = "xgrammar"

_MODULE = "vllm.v1.structured_output.backend_xgrammar"
_TYPES = "vllm.v1.structured_output.backend_types"

NEEDS = (
    *(
        Symbol(module, name, "a gateway compiles with the tokens as the engine does")
        for module, name in (
            (_MODULE, "XgrammarBackend.__post_init__"),
            (_MODULE, "XgrammarBackend.compiler"),
            (_TYPES, "StructuredOutputBackend.vllm_config"),
            (_TYPES, "StructuredOutputBackend.tokenizer"),
            (_TYPES, "StructuredOutputBackend.vocab_size"),
        )
    ),
    Symbol(
        _MODULE,
        "validate_xgrammar_grammar",
        "ours takes its place: it would compile on the event loop what a gateway has compiled",
        exact="sampling_params",
    ),
    Symbol(_MODULE, "STRING_SUPPORTED_FORMATS", "ours are the same"),
    Symbol("vllm.config.structured_outputs", "StructuredOutputsConfig.backend", "it is pinned"),
)

FORMATS = frozenset(
    {
        *("email", "date", "time", "date-time", "duration", "ipv4", "ipv6", "hostname", "uuid"),
        *("uri", "uri-reference", "uri-template", "json-pointer", "relative-json-pointer"),
    }
)

_IGNORED = {
    *("not", "if", "dependentRequired", "dependentSchemas", "dependencies", "multipleOf"),
    *("contains", "minContains", "maxContains", "$dynamicRef", "$recursiveRef"),
}
"""Keywords that xgrammar ignores or enforces only in part."""

_SCHEMAS_BY_NAME = ("properties", "patternProperties", "$defs", "definitions")
_SCHEMA = ("items", "additionalProperties", "unevaluatedProperties", "unevaluatedItems")
_SCHEMA_LISTS = ("prefixItems", "anyOf", "oneOf", "allOf")

_LOOKAROUND = re.compile(r"(?<!\\)(?:\\\\)*\(\?<?[=!]")


class Unsupported(NamedTuple):
    """Something in a schema that xgrammar would not enforce."""

    at: str
    """Its path, after the path of the schema."""
    reason: str


def serialised_vocabulary(model_config: Any, tokenizer: Any) -> str:
    """Return a model's tokens as JSON, exactly as its engine passes them to xgrammar.

    Takes a second of CPU.
    """
    check(NEEDS)
    from vllm.config.structured_outputs import StructuredOutputsConfig
    from vllm.v1.structured_output.backend_xgrammar import XgrammarBackend

    config: Any = SimpleNamespace(
        model_config=model_config,
        structured_outputs_config=StructuredOutputsConfig(backend=BACKEND),
        speculative_config=None,
    )
    backend = XgrammarBackend(config, tokenizer, vocab_size=model_config.get_vocab_size())
    # A compiler does not expose its tokens, but a grammar does.
    serialised: str = backend.compiler.compile_grammar(
        'root ::= "a"'
    ).tokenizer_info.serialize_json()
    return serialised


def unsupported(at: str, schema: Any) -> Iterator[Unsupported]:
    """Yield what xgrammar would not enforce of a schema.

    This covers what vLLM refuses and what xgrammar warns of, without saying where, and more.
    """
    left = [(at, schema)]
    while left:
        place, found = left.pop()
        if not isinstance(found, dict):
            continue
        yield from _of_one(place, found)
        left += [(step(place, key), found[key]) for key in _SCHEMA if key in found]
        for key in (*_SCHEMAS_BY_NAME, *_SCHEMA_LISTS):
            inside = found.get(key)
            if isinstance(inside, dict) and key in _SCHEMAS_BY_NAME:
                left += [(step(step(place, key), name), each) for name, each in inside.items()]
            elif isinstance(inside, list) and key in _SCHEMA_LISTS:
                left += [(step(step(place, key), n), each) for n, each in enumerate(inside)]


def _of_one(at: str, schema: dict[str, Any]) -> Iterator[Unsupported]:
    """Yield what is not enforced of a schema itself, without those inside of it."""
    for keyword in _IGNORED & schema.keys():
        yield Unsupported(step(at, keyword), "is not supported")
    if schema.get("uniqueItems"):
        yield Unsupported(step(at, "uniqueItems"), "is not supported")
    if isinstance(schema.get("allOf"), list) and len(schema["allOf"]) > 1:
        yield Unsupported(step(at, "allOf"), "is supported with one schema only")
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference != "#" and not reference.startswith("#/"):
        yield Unsupported(step(at, "$ref"), "is supported within the schema only, as '#/…'")
    yield from _of_a_string(at, schema)
    yield from _of_an_object(at, schema)


def _of_a_string(at: str, schema: dict[str, Any]) -> Iterator[Unsupported]:
    shape = next((word for word in ("pattern", "format") if isinstance(schema.get(word), str)), "")
    for bound in ("minLength", "maxLength"):
        if shape and bound in schema:
            yield Unsupported(step(at, bound), f"is not supported together with '{shape}'")
    known = schema.get("format")
    if isinstance(known, str) and known not in FORMATS and "string" in _types(schema):
        yield Unsupported(step(at, "format"), f"must be one of {', '.join(sorted(FORMATS))}")
    pattern = schema.get("pattern")
    if isinstance(pattern, str) and _LOOKAROUND.search(pattern):
        yield Unsupported(step(at, "pattern"), "looks around, which is not supported")


def _of_an_object(at: str, schema: dict[str, Any]) -> Iterator[Unsupported]:
    if "patternProperties" in schema:
        others = schema["patternProperties"]
        if "properties" in schema or (isinstance(others, dict) and len(others) > 1):
            yield Unsupported(
                step(at, "patternProperties"),
                "is supported with one pattern, and without 'properties' beside it",
            )
    if "propertyNames" in schema and (
        {"properties", "patternProperties"} & schema.keys()
        or schema.get("unevaluatedProperties", True) is not True
        or list(_of_a_string("", _as_string(schema["propertyNames"])))
    ):
        yield Unsupported(
            step(at, "propertyNames"), "is supported alone, with a pattern or a range of lengths"
        )


def _types(schema: dict[str, Any]) -> list[Any]:
    kind = schema.get("type")
    return kind if isinstance(kind, list) else [kind]


def _as_string(schema: Any) -> dict[str, Any]:
    return {**schema, "type": "string"} if isinstance(schema, dict) else {}

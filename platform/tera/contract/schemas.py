"""Bounds on the JSON schemas in a request, checked before anything else is done with them.

Within them, the time to compile a schema still varies by a factor of a thousand, so a gateway also
bounds that time (`gateway/grammars.py`).
"""

from collections.abc import Iterable, Iterator
from typing import Annotated, Any, NamedTuple

import msgspec
from pydantic import AfterValidator, WithJsonSchema

from tera.contract.common import invalid

MAX_SCHEMA_BYTES = 262_144
"""As JSON, descriptions included. Passing that much on takes a few milliseconds of a replica's
event loop."""

MAX_SCHEMA_DEPTH = 32
"""Of objects and arrays: two or three for each level of the data that a schema describes."""

MAX_SCHEMA_PROPERTIES = 2000
"""So many required properties compile in 2 s. Optional ones in one object take quadratic time: some
700 of them take the 5 s that a schema may take."""

MAX_ENUM_VALUES = 1000
"""OpenAI's bound too. With a hundred characters each they compile in 1.4 s."""

MAX_PATTERN_CHARACTERS = 1000
"""Of one regular expression."""

MAX_PATH_CHARACTERS = 200
"""Of a path inside a schema in an error message, whose parts the client chose."""


class Place(NamedTuple):
    """An object or array inside a schema."""

    at: str
    """Its path, such as `.properties.name`."""
    depth: int
    value: Any


def step(at: str, key: str | int) -> str:
    """Return the path of the entry `key` of what is at a path, cut off if it gets too long."""
    path = f"{at}[{key}]" if isinstance(key, int) else f"{at}.{key[:64]}"
    return path if len(path) <= MAX_PATH_CHARACTERS else f"{path[: MAX_PATH_CHARACTERS - 1]}…"


def check_schemas(schemas: Iterable[tuple[str, dict[str, Any]]]) -> None:
    """Refuse, inside a validator, schemas of one field that are too large together.

    Args:
        schemas: each with its path within the field.
    """
    size = properties = enum_values = 0
    for at, schema in schemas:
        size += len(msgspec.json.encode(schema))
        _check(size, MAX_SCHEMA_BYTES, "bytes of JSON schema")
        for place in _places(at, schema):
            if isinstance(place.value, dict):
                _check_pattern(place)
                properties += len(_under(place, "properties", dict))
                properties += len(_under(place, "patternProperties", dict))
                enum_values += len(_under(place, "enum", list))
    _check(properties, MAX_SCHEMA_PROPERTIES, "properties in its schemas")
    _check(enum_values, MAX_ENUM_VALUES, "values of enums in its schemas")


def _places(at: str, schema: dict[str, Any]) -> Iterator[Place]:
    """Yield every object and array, even outside of subschemas: a `$ref` can point anywhere."""
    left = [Place(at, 1, schema)]
    while left:
        place = left.pop()
        yield place
        children = place.value.items() if isinstance(place.value, dict) else enumerate(place.value)
        inside = [(key, value) for key, value in children if type(value) in (dict, list)]
        if inside and place.depth == MAX_SCHEMA_DEPTH:
            invalid(
                f"must nest objects and arrays at most {MAX_SCHEMA_DEPTH} deep",
                step(place.at, inside[0][0]),
            )
        left += [Place(step(place.at, key), place.depth + 1, value) for key, value in inside]


def _under(place: Place, key: str, kind: type) -> Any:
    value = place.value.get(key)
    return value if isinstance(value, kind) else ()


def _check_pattern(place: Place) -> None:
    patterns = [(".pattern", place.value.get("pattern"))]
    patterns += [(".patternProperties", key) for key in _under(place, "patternProperties", dict)]
    for at, pattern in patterns:
        if isinstance(pattern, str) and len(pattern) > MAX_PATTERN_CHARACTERS:
            invalid(
                f"must have at most {MAX_PATTERN_CHARACTERS} characters, but has {len(pattern)}",
                place.at + at,
            )


def _check(found: int, most: int, what: str) -> None:
    if found > most:
        invalid(f"must have at most {most} {what}, but has {found}")


def _bounded(schema: dict[str, Any]) -> dict[str, Any]:
    check_schemas([("", schema)])
    return schema


JsonSchema = Annotated[
    dict[str, Any],
    AfterValidator(_bounded),
    WithJsonSchema(
        {
            "type": "object",
            "additionalProperties": True,
            "description": f"A JSON schema of at most {MAX_SCHEMA_BYTES} bytes, "
            f"{MAX_SCHEMA_PROPERTIES} properties, {MAX_ENUM_VALUES} values of enums and "
            f"{MAX_SCHEMA_DEPTH} objects and arrays inside each other. What cannot be enforced, "
            "or takes too long to compile, is refused.",
        }
    ),
]
"""A schema that an answer must match."""

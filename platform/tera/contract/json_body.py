"""Parses a body as a JSON object: only what all parsers read alike, and at a bounded cost.

The cost of a body does not depend on its size alone: ten megabytes of text are one string, ten
megabytes of `{},` are three million objects. So the values in a body are counted before any object
is created.
"""

import json
from collections import Counter
from collections.abc import Iterator
from itertools import accumulate
from typing import Any, NamedTuple

import msgspec

from tera.errors import InvalidJsonError, InvalidValueError

MAX_JSON_DEPTH = 64

MAX_JSON_VALUES = 1_200_000
"""Most values in a body: as many as a prompt may have token ids, plus 150,000. Each takes up to 80
bytes and 0.2 µs."""

MAX_JSON_CONTAINERS = 16_384
"""Most arrays and objects in a body: eight per possible message, such as three tool calls. Each
takes up to 200 bytes and 0.5 µs, most of that in the garbage collector."""

MAX_JSON_MEMBERS = 65_536
"""Most members of all objects in a body: four per possible object. Each takes up to 0.5 µs."""

_NAMED_BYTES = 65_536
"""In larger bodies a duplicate key is not named: finding it takes a second, slower parser."""


def parse_json_object(body: bytes) -> dict[str, Any]:
    """Return the JSON object in a request body.

    Refuses what parsers disagree about, so that no two parts of a platform can read a body
    differently: duplicate keys, NaN and Infinity, numbers beyond a double, lone surrogates.

    Raises:
        InvalidJsonError: the body is not such an object, or nests deeper than 64.
        InvalidValueError: it has too many values.
    """
    counts = _counts(body)
    value = _decoded(body)
    if not isinstance(value, dict):
        raise InvalidJsonError("The request body must be a JSON object.")
    members = sum(sum(map(len, level.objects)) for level in _levels(value, counts.containers))
    if members != counts.members:  # of two members with the same name, the decoder keeps the last
        raise _key_twice(body)
    # msgspec refuses other numbers beyond a double; an integer may exceed one from 309 digits on.
    if _MANY_DIGITS in body.translate(_EACH_DIGIT_AS_ZERO) and _holds_huge_integer(value):
        raise InvalidJsonError(_TOO_LARGE)
    return value


_TOO_LARGE = "The request body holds a number beyond the range of a double."

_BELOW_A_DOUBLE = -(2**1024)
_MANY_DIGITS = b"0" * 309
_EACH_DIGIT_AS_ZERO = bytes.maketrans(b"123456789", b"0" * 9)


class _Counts(NamedTuple):
    """Numbers of values in a JSON text."""

    containers: int
    members: int


def _counts(body: bytes) -> _Counts:
    """Count the values in a JSON text without parsing it.

    If the text is not JSON, the counts are right up to the place where a parser would stop.

    Raises:
        InvalidJsonError: it nests too deeply, or closes a bracket that is not open.
        InvalidValueError: there are too many values.
    """
    depth = containers = members = commas = 0
    for structure in _structure(body):
        depths = list(
            accumulate(map(_STEPS.__getitem__, structure.translate(None, b",:")), initial=depth)
        )
        depth = depths[-1]
        if min(depths) < 0:
            raise InvalidJsonError("The request body closes a bracket that is not open.")
        if max(depths) > MAX_JSON_DEPTH:
            raise InvalidJsonError(f"The request body nests deeper than {MAX_JSON_DEPTH} levels.")
        containers += structure.count(b"[") + structure.count(b"{")
        members += structure.count(b":")
        commas += structure.count(b",")
        _check_count(containers, MAX_JSON_CONTAINERS, "arrays and objects")
        _check_count(members, MAX_JSON_MEMBERS, "members of objects")
        # An array or object has one more value than it has commas, or is empty.
        _check_count(containers + commas, MAX_JSON_VALUES, "values")
    return _Counts(containers, members)


def _check_count(found: int, most: int, what: str) -> None:
    if found > most:
        raise InvalidValueError(f"The request body has more than {most} {what}.")


_SLICE_BYTES = 65_536
"""Bytes examined at a time: half a millisecond, and little memory."""

_NO_STRUCTURE = bytes(set(range(256)) - set(b'"[]{}:,'))

_STEPS = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}
"""How each bracket changes the depth."""


def _structure(body: bytes) -> Iterator[bytes]:
    """Yield the brackets, colons and commas outside strings, slice by slice.

    It uses operations on whole byte strings, since a Python loop over ten million bytes would
    itself be the attack that it guards against.
    """
    start, in_string = 0, False
    while start < len(body):
        end = start + _SLICE_BYTES
        backslashes = len(body[start:end]) - len(body[start:end].rstrip(b"\\"))
        end += backslashes % 2  # an escaped character stays with its backslash
        # In this order: in `\\"` the quote ends the string. Then every quote delimits a string.
        plain = body[start:end].replace(rb"\\", b"").replace(rb"\"", b"")
        # Most strings are empty by then; between two strings there is a comma or a colon.
        kept = plain.translate(None, _NO_STRUCTURE).replace(b'""', b"")
        parts = kept.split(b'"')
        yield b"".join(parts[in_string::2])
        in_string ^= len(parts) % 2 == 0
        start = end


def _decoded(body: bytes) -> Any:
    try:
        return msgspec.json.decode(body)
    except UnicodeDecodeError:
        raise InvalidJsonError("The request body is not valid UTF-8.") from None
    except msgspec.ValidationError:  # without a type to fit, only numbers are validated
        raise InvalidJsonError(_TOO_LARGE) from None
    except msgspec.DecodeError as error:
        reason = str(error).removeprefix("JSON is malformed: ")
        raise InvalidJsonError(f"The request body is not valid JSON: {reason}.") from None


class _Level(NamedTuple):
    """The arrays and objects at one depth of a JSON value."""

    arrays: list[list[Any]]
    objects: list[dict[str, Any]]


def _levels(value: dict[str, Any], containers: int) -> Iterator[_Level]:
    """Yield the arrays and objects at each depth, outermost first, until all `containers` came."""
    level = _Level([], [value])
    while level.arrays or level.objects:
        yield level
        containers -= len(level.arrays) + len(level.objects)
        if not containers:  # no need to search a million token ids for more
            return
        inside = [each for array in level.arrays for each in array if type(each) in _CONTAINERS]
        inside += [
            each for found in level.objects for each in found.values() if type(each) in _CONTAINERS
        ]
        arrays = [each for each in inside if type(each) is list]
        level = _Level(arrays, [each for each in inside if type(each) is dict])


_CONTAINERS = frozenset({dict, list})


def _holds_huge_integer(value: dict[str, Any]) -> bool:
    for level in _levels(value, MAX_JSON_CONTAINERS):
        for children in (*level.arrays, *(found.values() for found in level.objects)):
            integers = [each for each in children if type(each) is int]
            if integers and not _BELOW_A_DOUBLE < min(integers) <= max(integers) < -_BELOW_A_DOUBLE:
                return True
    return False


def _key_twice(body: bytes) -> InvalidJsonError:
    """Return the error for a body in which an object has a duplicate key."""
    found: list[str] = []

    def look(pairs: list[tuple[str, Any]]) -> None:
        counts = Counter(key for key, _ in pairs)
        found.extend(key for key, times in counts.items() if times > 1)

    if len(body) <= _NAMED_BYTES:
        json.loads(body, object_pairs_hook=look)
    named = f"the key {found[0][:64]!r}" if found else "a key"
    return InvalidJsonError(f"The request body has {named} twice in one object.")

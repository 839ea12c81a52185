"""A request's body as a JSON object: only what all parsers read alike, and at a bounded cost.

What a body costs is not a matter of its bytes: ten megabytes of text are one string, ten
megabytes of `{},` are three million objects. So a body is measured before anything is built
of it.
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
"""Of a body: the most token ids that a prompt may have, and 150,000 more. One takes up to 80 bytes
and 0.2 µs."""

MAX_JSON_CONTAINERS = 16_384
"""Arrays and objects of a body: eight for each message that there may be, such as three tool calls.
One takes up to 200 bytes and 0.5 µs, most of it the garbage collector's."""

MAX_JSON_MEMBERS = 65_536
"""Of all objects of a body, four for each that there may be. One takes up to 0.5 µs."""

_NAMED_BYTES = 65_536
"""Of larger bodies a key that comes twice is not named: it takes another parser to find it."""


def parse_json_object(body: bytes) -> dict[str, Any]:
    """Return the JSON object in a request body.

    Refuses what parsers disagree about, so that no two parts of a platform can read one body
    in two ways: duplicate keys, NaN and Infinity, numbers beyond a double, lone surrogates.

    Raises:
        InvalidJsonError: the body is none of that kind, or nests deeper than 64.
        InvalidValueError: it has more values than are read.
    """
    counts = _counts(body)
    value = _decoded(body)
    if not isinstance(value, dict):
        raise InvalidJsonError("The request body must be a JSON object.")
    members = sum(sum(map(len, level.objects)) for level in _levels(value, counts.containers))
    if members != counts.members:  # the decoder keeps the last of two with one name
        raise _key_twice(body)
    # msgspec refuses other numbers beyond a double; an integer is beyond one from 309 digits on.
    if _MANY_DIGITS in body.translate(_EACH_DIGIT_AS_ZERO) and _holds_huge_integer(value):
        raise InvalidJsonError(_TOO_LARGE)
    return value


_TOO_LARGE = "The request body holds a number beyond the range of a double."

_BELOW_A_DOUBLE = -(2**1024)
_MANY_DIGITS = b"0" * 309
_EACH_DIGIT_AS_ZERO = bytes.maketrans(b"123456789", b"0" * 9)


class _Counts(NamedTuple):
    """Of the values in a JSON text."""

    containers: int
    members: int


def _counts(body: bytes) -> _Counts:
    """Return how many values a JSON text has, without parsing it.

    Of what is no JSON, the counts are right up to the place where a parser stops.

    Raises:
        InvalidJsonError: it nests too deep, or closes what is not open.
        InvalidValueError: there are more values than are read.
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
        # An array or object has one value more than commas, or none.
        _check_count(containers + commas, MAX_JSON_VALUES, "values")
    return _Counts(containers, members)


def _check_count(found: int, most: int, what: str) -> None:
    if found > most:
        raise InvalidValueError(f"The request body has more than {most} {what}.")


_SLICE_BYTES = 65_536
"""What is looked at in one go: half a millisecond, and memory that does not add up."""

_NO_STRUCTURE = bytes(set(range(256)) - set(b'"[]{}:,'))

_STEPS = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}
"""How each bracket changes the depth."""


def _structure(body: bytes) -> Iterator[bytes]:
    """Yield what is outside of strings of brackets, colons and commas, slice by slice.

    All is done by operations on whole byte strings, since a loop in Python over ten million
    bytes would itself be what it guards against.
    """
    start, in_string = 0, False
    while start < len(body):
        end = start + _SLICE_BYTES
        backslashes = len(body[start:end]) - len(body[start:end].rstrip(b"\\"))
        end += backslashes % 2  # an escaped character stays with its backslash
        # In this order: of `\\"` the quote ends the string. Then each quote bounds a string.
        plain = body[start:end].replace(rb"\\", b"").replace(rb"\"", b"")
        # Most strings are empty then; of two neighbours a comma or a colon is between.
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
    """What is at one depth of a JSON value."""

    arrays: list[list[Any]]
    objects: list[dict[str, Any]]


def _levels(value: dict[str, Any], containers: int) -> Iterator[_Level]:
    """Yield the arrays and objects at each depth, from the outermost to the last of that many."""
    level = _Level([], [value])
    while level.arrays or level.objects:
        yield level
        containers -= len(level.arrays) + len(level.objects)
        if not containers:  # a million token ids need not be looked through for more
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
    """Return the error of a body with a key twice in one object."""
    found: list[str] = []

    def look(pairs: list[tuple[str, Any]]) -> None:
        counts = Counter(key for key, _ in pairs)
        found.extend(key for key, times in counts.items() if times > 1)

    if len(body) <= _NAMED_BYTES:
        json.loads(body, object_pairs_hook=look)
    named = f"the key {found[0][:64]!r}" if found else "a key"
    return InvalidJsonError(f"The request body has {named} twice in one object.")

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

from tera.contract.json_slices import SLICE_BYTES, TOO_LARGE, Cut, decoded, slices, still_open
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
    value = decoded(body, counts.cuts)
    if not isinstance(value, dict):
        raise InvalidJsonError("The request body must be a JSON object.")
    members = sum(sum(map(len, level.objects)) for level in _levels(value, counts.containers))
    if members != counts.members:  # of two members with the same name, the decoder keeps the last
        raise _key_twice(body)
    if _may_hold_huge_number(body) and _holds_huge_number(value):
        raise InvalidJsonError(TOO_LARGE)
    return value


_TOO_HUGE = 2**1024
"""The least integer beyond a double."""
_EACH_DIGIT_AS_ZERO = bytes.maketrans(b"123456789", b"0" * 9)
_MANY_DIGITS = b"0" * 309
_SIGNS_OF_HUGE = (_MANY_DIGITS, b"0e", b"0E")
"""Of which a number has one if it is beyond a double."""


class _Counts(NamedTuple):
    """Numbers of values in a JSON text."""

    containers: int
    members: int
    cuts: list[Cut]
    """Where the text can be cut, so that it is decoded in parts."""


def _counts(body: bytes) -> _Counts:
    """Count the values in a JSON text without parsing it.

    If the text is not JSON, the counts are right up to the place where a parser would stop.

    Raises:
        InvalidJsonError: it nests too deeply, or closes a bracket that is not open.
        InvalidValueError: there are too many values.
    """
    depth = containers = members = commas = 0
    cuts: list[Cut] = []
    open_ = b""
    for end, structure, ends_after_comma in slices(body):
        brackets = structure.translate(None, b",:")
        depths = list(accumulate(map(_STEPS.__getitem__, brackets), initial=depth))
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
        open_ = still_open(open_ + brackets)
        # What closes another bracket than is open is left to the decoder, which stops there.
        if ends_after_comma and len(open_) == depth > 0:
            cuts.append(Cut(end, open_))
    return _Counts(containers, members, cuts)


def _check_count(found: int, most: int, what: str) -> None:
    if found > most:
        raise InvalidValueError(f"The request body has more than {most} {what}.")


_STEPS = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}
"""How each bracket changes the depth."""


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


def _may_hold_huge_number(body: bytes) -> bool:
    """Return whether there is a sign of one, which may be in a string; most bodies have none."""
    for start in range(0, len(body), SLICE_BYTES):
        # A sign may lie across the end of a slice.
        zeros = body[start : start + SLICE_BYTES + len(_MANY_DIGITS)].translate(_EACH_DIGIT_AS_ZERO)
        if any(sign in zeros for sign in _SIGNS_OF_HUGE):
            return True
    return False


def _holds_huge_number(value: dict[str, Any]) -> bool:
    for level in _levels(value, MAX_JSON_CONTAINERS):
        for children in (*level.arrays, *(list(found.values()) for found in level.objects)):
            # Not all of a million at once: finding the least holds the GIL.
            for start in range(0, len(children), _PASS):
                piece = children[start : start + _PASS]
                numbers = [each for each in piece if type(each) in _NUMBERS]
                if numbers and not -_TOO_HUGE < min(numbers) <= max(numbers) < _TOO_HUGE:
                    return True
    return False


_PASS = 65_536
"""Values that are looked at in one go."""

_NUMBERS = frozenset({int, float})


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

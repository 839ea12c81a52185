"""Looks at a long JSON text in slices, and decodes it in parts.

A decoder holds the GIL, and with it the event loop, from the first byte to the last: 0.15 s for ten
megabytes of numbers. So a long text is cut at commas outside strings. Each part is made a text of
its own, by closing the brackets that are open at its end and opening them again for the next one,
and what the parts decode to is put together again.
"""

import re
import secrets
from collections.abc import Iterator, Sequence
from typing import Any, Final, NamedTuple

import msgspec

from tera.errors import InvalidJsonError

SLICE_BYTES = 65_536
"""Bytes of a slice, so of most parts: some milliseconds to decode, and little memory."""

_NO_STRUCTURE: Final = bytes(set(range(256)) - set(b'"[]{}:,'))
_CLOSING: Final = bytes.maketrans(b"[{", b"]}")
_SPACE: Final = b" \t\n\r"

_MOST_STRINGS_SEARCHED: Final = 512
"""How many strings a comma is looked for between. In 64 levels, JSON has one between fewer."""

TOO_LARGE: Final = "The request body holds a number beyond the range of a double."

_BYTE: Final = re.compile(r"\(byte (\d+)\)$")

# msgspec's own conversion takes 12 µs for a number such as 1.5e300, Python's 0.2 µs. Python's makes
# infinity of what is beyond a double, which `json_body` looks for.
_decoder = msgspec.json.Decoder(float_hook=float)


class Slice(NamedTuple):
    """A slice of a JSON text."""

    end: int
    """Where it ends in the text."""
    structure: bytes
    """Its brackets, colons and commas outside strings."""
    ends_after_comma: bool
    """Whether that is just after a comma outside strings, so that the text can be cut there."""


class Cut(NamedTuple):
    """A place where a text can be cut: after a comma."""

    at: int
    open: bytes
    """The brackets that are open there, outermost first."""


def slices(text: bytes) -> Iterator[Slice]:
    """Yield the slices of a JSON text.

    It uses operations on whole byte strings, since a Python loop over ten million bytes would
    itself be the attack that it guards against.
    """
    start, in_string = 0, False
    while start < len(text):
        end = start + SLICE_BYTES
        backslashes = len(text[start:end]) - len(text[start:end].rstrip(b"\\"))
        end = min(end + backslashes % 2, len(text))  # an escaped character stays with its backslash
        # In this order: in `\\"` the quote ends the string. Then every quote delimits a string.
        plain = text[start:end].replace(rb"\\", b"__").replace(rb"\"", b"__")
        ends_in_string = in_string ^ (plain.count(b'"') % 2 == 1)
        comma = _last_comma(plain, ends_in_string) if end < len(text) else None
        if comma is not None:
            plain, end, ends_in_string = plain[: comma + 1], start + comma + 1, False
        # Most strings are empty by then; between two strings there is a comma or a colon.
        kept = plain.translate(None, _NO_STRUCTURE).replace(b'""', b"")
        structure = b"".join(kept.split(b'"')[in_string::2])
        yield Slice(end, structure, comma is not None)
        start, in_string = end, ends_in_string


def _last_comma(plain: bytes, ends_in_string: bool) -> int | None:
    """Return the place of the last comma outside strings; None if that is not near the end."""
    end, in_string = len(plain), ends_in_string
    for _ in range(2 * _MOST_STRINGS_SEARCHED):
        quote = plain.rfind(b'"', 0, end)
        if not in_string and (comma := plain.rfind(b",", quote + 1, end)) >= 0:
            return comma
        if quote < 0:
            return None
        end, in_string = quote, not in_string
    return None


def still_open(brackets: bytes) -> bytes:
    """Return the brackets that are not closed; a closing one among them fits none before it."""
    while (fewer := brackets.replace(b"[]", b"").replace(b"{}", b"")) != brackets:
        brackets = fewer
    return brackets


def decoded(text: bytes, cuts: Sequence[Cut]) -> Any:
    """Return the value of a JSON text, decoded part by part.

    Numbers beyond a double become infinite. Of members with the same name one is kept, or what they
    hold is mixed up: count them.

    Raises:
        InvalidJsonError: it is not JSON.
    """
    if not cuts:
        return _value(text, 0)
    link = secrets.token_hex(8)
    whole: Any = None
    start, opened = 0, b""
    for at, open_ in (*cuts, Cut(len(text) + 1, b"")):
        part = text[start : at - 1]  # without the comma, if it is not the last
        if _first(part) in _NO_FIRST or (open_ and _last(part) in _NO_LAST):
            raise InvalidJsonError(
                "The request body is not valid JSON: a value is missing at a comma."
            )
        before = _opening(opened, link)
        value = _value(before + part + open_.translate(_CLOSING)[::-1], start - len(before))
        if start:
            _join(whole, value, opened, link)
        else:
            whole = value
        start, opened = at, open_
    return whole


# With these a part could be JSON by itself, and the whole text is not.
_NO_FIRST: Final = (b"", b"]", b"}")
_NO_LAST: Final = (b"", b"[", b"{")


def _first(part: bytes) -> bytes:
    """Return the first byte that is not space."""
    starts = range(0, len(part), SLICE_BYTES)
    found = (part[start : start + SLICE_BYTES].lstrip(_SPACE)[:1] for start in starts)
    return next(filter(None, found), b"")


def _last(part: bytes) -> bytes:
    """Return the last byte that is not space."""
    ends = range(len(part), 0, -SLICE_BYTES)
    found = (part[max(0, end - SLICE_BYTES) : end].rstrip(_SPACE)[-1:] for end in ends)
    return next(filter(None, found), b"")


def _opening(brackets: bytes, link: str) -> bytes:
    """Return the beginning of a part within these brackets; in an object, `link` leads further."""
    linked = brackets[:-1].replace(b"{", b'{"%b":' % link.encode())
    return linked + brackets[-1:]


def _join(whole: Any, part: Any, opened: bytes, link: str) -> None:
    """Add what a part holds to the last one of each array or object that was open at its start."""
    for bracket in opened[:-1].decode():
        inner = part.pop(link if bracket == "{" else 0)
        last = whole[next(reversed(whole))] if bracket == "{" else whole[-1]
        _extend(whole, part)
        whole, part = last, inner
        if type(whole) is not type(part):  # a later member with a name that was there before
            return
    _extend(whole, part)


def _extend(whole: Any, part: Any) -> None:
    if isinstance(whole, dict):
        whole.update(part)
    else:
        whole += part


def _value(text: bytes, offset: int) -> Any:
    """Decode one part, which begins at `offset` of the whole text."""
    try:
        return _decoder.decode(text)
    except UnicodeDecodeError:
        raise InvalidJsonError("The request body is not valid UTF-8.") from None
    except msgspec.ValidationError:  # without a type to fit, only numbers are validated
        raise InvalidJsonError(TOO_LARGE) from None
    except msgspec.DecodeError as error:
        reason = str(error).removeprefix("JSON is malformed: ")
        reason = _BYTE.sub(lambda found: f"(byte {int(found[1]) + offset})", reason)
        raise InvalidJsonError(f"The request body is not valid JSON: {reason}.") from None

"""Parses request bodies, large ones off the event loop."""

import asyncio
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, TypeVar

from tera.contract.json_body import parse_json_object

INLINE_BYTES = 64 * 1024
"""At this size the costliest body, a conversation of nothing but tool calls, takes 10 to 16 ms; one
request may block the event loop for 20."""

SHARED_BYTES = 1024 * 1024
"""Larger bodies are parsed one at a time: two at once would need twice the memory (some 100 MB for
10 MiB) and, because of the GIL, would be no faster."""

R = TypeVar("R")


class RequestParser:
    """Parses bodies, large ones in a thread.

    A thread can still block the event loop, since it holds the GIL while inside C code. Counting
    the values in a body and validating them yield to the loop every 5 ms. Decoding does not: the
    loop stalls for 30 ms with 10 MiB of text, and for 0.15 s with a million numbers.
    """

    def __init__(self) -> None:
        self._one_at_a_time = asyncio.Semaphore(1)

    async def parse(self, read: Callable[[dict[str, Any]], R], body: bytes) -> R:
        """Return the result of `read`, an API's dialect, for the JSON object in a body.

        Raises:
            InvalidRequestError: it is not a valid request; see `parse_json_object`,
            `parse_request`.
        """
        if len(body) <= INLINE_BYTES:
            return _parsed(read, body)
        async with nullcontext() if len(body) <= SHARED_BYTES else self._one_at_a_time:
            return await asyncio.to_thread(_parsed, read, body)


def _parsed(read: Callable[[dict[str, Any]], R], body: bytes) -> R:
    return read(parse_json_object(body))

"""Parses request bodies, large ones off the event loop."""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from tera.contract.json_body import parse_json_object
from tera.gateway.text_pool import SHORT_BYTES, TextPool

R = TypeVar("R")


class RequestParser:
    """Parses bodies, large ones in a thread of the text pool.

    A thread can still block the event loop, since it holds the GIL while inside C code. So a body
    is counted, decoded and validated in pieces, after each of which the loop may run; it waits for
    some ten milliseconds. A string is not cut: ten megabytes of escapes in one take 50 ms.
    """

    def __init__(self, pool: TextPool) -> None:
        self._pool = pool

    async def parse(self, tenant: str, read: Callable[[dict[str, Any]], R], body: bytes) -> R:
        """Return the result of `read`, an API's dialect, for the JSON object in a tenant's body.

        Raises:
            InvalidRequestError: it is not a valid request; see `parse_json_object`,
            `parse_request`.
            EngineOverloadedError: too many long requests are waiting already.
        """
        if len(body) <= SHORT_BYTES:
            return _parsed(read, body)
        return await self._pool.run(tenant, len(body), partial(_parsed, read, body))


def _parsed(read: Callable[[dict[str, Any]], R], body: bytes) -> R:
    return read(parse_json_object(body))

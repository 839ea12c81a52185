"""Reads requests' bodies, bounded in size, in time, and in how many of a tenant arrive at once."""

import asyncio
from collections import Counter

from starlette.requests import Request

from tera.errors import (
    ConcurrencyLimitError,
    InvalidJsonError,
    RequestTooLargeError,
    UnsupportedContentTypeError,
)

TENANTS_BODIES = 16
"""How many bodies of the largest size a tenant may have arriving at once at a gateway replica. Most
bodies arrive in one piece and never count; the others count until they are complete."""


class BodyReader:
    """Reads bodies, and counts the bytes of those that are still arriving."""

    def __init__(self) -> None:
        self._held: Counter[str] = Counter()
        """Bytes by tenant, without tenants that have no body arriving."""

    async def read(
        self, request: Request, tenant: str, *, max_bytes: int, within_s: float
    ) -> bytes:
        """Return the body of a JSON request, never holding more than `max_bytes`.

        Raises:
            RequestTooLargeError: judged by content-length, or found while reading.
            UnsupportedContentTypeError: it is declared as something other than plain JSON.
            InvalidJsonError: the client hung up before the end of the body, or took longer than
                `within_s` seconds.
            ConcurrencyLimitError: the tenant is sending too many large bodies at once.
        """
        declared = request.headers.get("content-length", "")
        if declared.isdigit() and int(declared) > max_bytes:
            raise _too_large(max_bytes)
        try:
            async with asyncio.timeout(within_s):
                received = await self._whole(request, tenant, max_bytes)
        except TimeoutError:
            raise InvalidJsonError(
                f"The request body did not arrive whole within {within_s:g} seconds."
            ) from None
        _check_type(request)
        return received

    async def _whole(self, request: Request, tenant: str, max_bytes: int) -> bytes:
        received = bytearray()
        counted = 0
        try:
            while True:
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise InvalidJsonError("The request body ended early.")
                received += message.get("body", b"")
                if len(received) > max_bytes:
                    raise _too_large(max_bytes)
                if not message.get("more_body", False):
                    return bytes(received)
                self._held[tenant] += len(received) - counted
                counted = len(received)
                if self._held[tenant] > TENANTS_BODIES * max_bytes:
                    raise ConcurrencyLimitError(
                        "Too many large requests are being sent at once; send fewer at a time.",
                        retry_after_s=1.0,
                    )
        finally:
            if counted:
                self._held[tenant] -= counted
                if not self._held[tenant]:
                    del self._held[tenant]


def _check_type(request: Request) -> None:
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type not in ("", "application/json"):
        raise UnsupportedContentTypeError(
            f"The content-type {media_type[:64]!r} is not supported; send application/json."
        )
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise UnsupportedContentTypeError(
            f"The content-encoding {encoding[:64]!r} is not supported; send the body plain."
        )


def _too_large(max_bytes: int) -> RequestTooLargeError:
    return RequestTooLargeError(f"The request body is larger than {max_bytes} bytes.")

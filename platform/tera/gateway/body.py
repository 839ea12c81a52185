"""Reading a request's body: no more of it than it may have, and no longer."""

import asyncio

from starlette.requests import Request

from tera.errors import InvalidJsonError, RequestTooLargeError, UnsupportedContentTypeError


async def read_body(request: Request, max_bytes: int, within_s: float) -> bytes:
    """Return the body of a JSON request, never holding more than `max_bytes`.

    Raises:
        RequestTooLargeError: judged by content-length, or found while reading.
        UnsupportedContentTypeError: it is declared as something other than plain JSON.
        InvalidJsonError: the client hung up before its end, or took longer than `within_s`.
    """
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > max_bytes:
        raise _too_large(max_bytes)
    try:
        async with asyncio.timeout(within_s):
            received = await _whole(request, max_bytes)
    except TimeoutError:
        raise InvalidJsonError(
            f"The request body did not arrive whole within {within_s:g} seconds."
        ) from None
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
    return received


async def _whole(request: Request, max_bytes: int) -> bytes:
    received = bytearray()
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise InvalidJsonError("The request body ended early.")
        received += message.get("body", b"")
        if len(received) > max_bytes:
            raise _too_large(max_bytes)
        if not message.get("more_body", False):
            return bytes(received)


def _too_large(max_bytes: int) -> RequestTooLargeError:
    return RequestTooLargeError(f"The request body is larger than {max_bytes} bytes.")

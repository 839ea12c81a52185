"""Reads a request's body, up to the allowed size."""

from starlette.requests import Request

from tera.errors import InvalidJsonError, RequestTooLargeError, UnsupportedContentTypeError


async def read_body(request: Request, max_bytes: int) -> bytes:
    """Return the body of a JSON request, never holding more than `max_bytes`.

    Raises:
        RequestTooLargeError: judged by content-length, or found while reading.
        UnsupportedContentTypeError: it is declared as something other than plain JSON.
        InvalidJsonError: the client hung up before the end of the body.
    """
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > max_bytes:
        raise _too_large(max_bytes)
    received = bytearray()
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise InvalidJsonError("The request body ended early.")
        received += message.get("body", b"")
        if len(received) > max_bytes:
            raise _too_large(max_bytes)
        if not message.get("more_body", False):
            break
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
    return bytes(received)


def _too_large(max_bytes: int) -> RequestTooLargeError:
    return RequestTooLargeError(f"The request body is larger than {max_bytes} bytes.")

"""Turns an error into the answer that a client gets."""

from starlette.responses import Response

from tera.contract.common import error_envelope
from tera.errors import TeraError
from tera.gateway.limit_headers import retry_headers


def error_response(error: TeraError) -> Response:
    """Return an error as an HTTP response: status, envelope, and when to retry."""
    headers = {}
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    if error.status == 429:
        headers = retry_headers(error)
    return Response(error_envelope(error), error.status, headers, "application/json")

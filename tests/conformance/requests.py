"""Requests that several rules are held against."""

from typing import Any

from tests.conformance.gateways import Gateway

POSTS = ["/v1/completions", "/v1/chat/completions"]
ORIGIN = "https://chat.example.com"


PREFLIGHT = {
    "origin": ORIGIN,
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization, content-type, x-stainless-os",
}


def valid(gateway: Gateway, path: str, **fields: Any) -> dict[str, Any]:
    """Return a valid body of either route."""
    make = gateway.completion if path == "/v1/completions" else gateway.conversation
    return make(**fields)

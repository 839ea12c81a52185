"""The gateway's outermost layer: request ids, CORS, metrics, and errors nobody else handled."""

import asyncio
import logging
import secrets
import time
from collections.abc import Callable
from contextlib import suppress

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tera.config.gateway import CorsConfig, GatewayConfig
from tera.errors import InternalError
from tera.gateway import routes
from tera.gateway.error_answers import error_response
from tera.gateway.exchange import Exchange
from tera.gateway.limit_headers import LIMIT_HEADERS, limit_headers
from tera.gateway.relay import ClientGoneError
from tera.observability import Metrics

log = logging.getLogger(__name__)

EXPOSED_HEADERS = (
    *(b"x-request-id", b"retry-after", b"retry-after-ms", b"x-should-retry"),
    *LIMIT_HEADERS,
)
"""The response headers that a page of an allowed origin may read."""


LINGER_S = 10.0
"""How long a connection stays open after an answer that was sent before the request's end."""


class Edge:
    """Creates the exchange of each request, and answers if nothing inside could."""

    def __init__(self, app: ASGIApp, metrics: Metrics, config: Callable[[], GatewayConfig]) -> None:
        """`config` is called for each request."""
        self._app = app
        self._metrics = metrics
        self._config = config

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request: see that it is answered and counted."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = _exchange(scope, send, self._config())
        exchange.enter(scope)

        async def noted() -> Message:
            message = await receive()
            if not message.get("more_body"):  # the body's end, or the connection's
                exchange.body_is_read = True
            return message

        await self._answer(scope, noted, exchange)
        if exchange.lingers:
            await _linger(receive)
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _answer(self, scope: Scope, receive: Receive, exchange: Exchange) -> None:
        ongoing = self._metrics.ongoing_requests.labels(exchange.route)
        ongoing.inc()
        try:
            if _is_preflight(scope, exchange.route):
                await Response(status_code=204)(scope, receive, exchange.send)
            else:
                await self._app(scope, receive, exchange.send)
        except ClientGoneError:
            exchange.code = "client_gone"
        except Exception:
            log.exception("Request %s failed.", exchange.request_id)
            failure = InternalError("The server failed on this request.")
            exchange.code = failure.code
            if not exchange.status:
                await error_response(failure)(scope, receive, exchange.send)
        finally:
            ongoing.dec()
            self._observe(exchange)

    def _observe(self, exchange: Exchange) -> None:
        metrics, model = self._metrics, exchange.model
        status = str(exchange.status or 499)
        metrics.requests.labels(model, exchange.route, status, exchange.code).inc()
        if model:
            elapsed_s = time.monotonic() - exchange.arrived
            metrics.request_s.labels(model, exchange.route).observe(elapsed_s)
            metrics.prompt_tokens.labels(model).inc(exchange.prompt_tokens)
            metrics.cached_tokens.labels(model).inc(exchange.cached_tokens)
            metrics.completion_tokens.labels(model).inc(exchange.completion_tokens)
            metrics.replica_switches.labels(model).inc(exchange.replica_switches)


def _exchange(scope: Scope, send: Send, config: GatewayConfig) -> Exchange:
    """Return the exchange of a request; its `send` adds the headers that every answer has."""
    shared = _cors_headers(scope, config.cors)

    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            exchange.status = message["status"]
            message["headers"] = [
                *message.get("headers", ()),
                (b"x-request-id", exchange.request_id.encode()),
                *limit_headers(exchange.admission),
                *shared,
            ]
            if not exchange.body_is_read and _announces_body(scope):
                message["headers"].append((b"connection", b"close"))
                exchange.lingers = True
        elif exchange.lingers and not message.get("more_body"):
            message = {**message, "more_body": True}
        await send(message)

    exchange = Exchange(
        request_id=f"req_{secrets.token_hex(16)}",
        route=_label(scope["path"], config),
        arrived=time.monotonic(),
        started_s=time.time(),
        send=send_with_headers,
    )
    return exchange


def _header(scope: Scope, name: bytes) -> str | None:
    for header, value in scope["headers"]:
        if header == name:
            return str(value, "latin-1")
    return None


def _announces_body(scope: Scope) -> bool:
    """Return whether a request's head announces a body."""
    return any(
        name == b"transfer-encoding" or (name == b"content-length" and value != b"0")
        for name, value in scope["headers"]
    )


async def _linger(receive: Receive) -> None:
    """Discard the rest of a request that has its answer already, for a limited time.

    Many clients read an answer only after they have sent their whole request, and lose it if the
    connection closes before. The limit is for clients whose body never ends.
    """
    with suppress(TimeoutError):
        async with asyncio.timeout(LINGER_S):
            while (await receive()).get("more_body"):
                pass


def _is_preflight(scope: Scope, route: str) -> bool:
    """Return whether this is a browser's preflight, asking what another origin's page may do."""
    return (
        scope["method"] == "OPTIONS"
        and route != routes.OTHER
        and _header(scope, b"origin") is not None
        and _header(scope, b"access-control-request-method") is not None
    )


def _cors_headers(scope: Scope, cors: CorsConfig) -> list[tuple[bytes, bytes]]:
    """Return the headers that let a page of an allowed origin read the answer."""
    origin = _header(scope, b"origin") if cors.origins else None
    if origin is None or not {origin, "*"} & set(cors.origins):
        return []
    headers = [
        # Never "*": since the origin is named, pages of other origins cannot use a cached answer.
        (b"access-control-allow-origin", origin.encode("latin-1")),
        (b"vary", b"origin"),
        (b"access-control-expose-headers", b", ".join(EXPOSED_HEADERS)),
    ]
    if scope["method"] == "OPTIONS":
        requested = _header(scope, b"access-control-request-headers") or "authorization"
        headers += [
            (b"access-control-allow-methods", b"GET, HEAD, POST, OPTIONS"),
            # SDKs send headers of their own; none of them affects us.
            (b"access-control-allow-headers", requested.encode("latin-1")),
            (b"access-control-max-age", b"600"),
        ]
    return headers


def _label(path: str, config: GatewayConfig) -> str:
    """Return the label of a path's route; the document's path is unknown while it is turned off."""
    found = routes.label(path)
    return routes.OTHER if found == routes.DOCUMENT.path and not config.openapi else found

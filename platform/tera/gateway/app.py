"""The gateway's ASGI application: its routes, and the one place where errors become answers."""

import logging
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Protocol

import msgspec
from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from tera.config.gateway import GatewayConfig
from tera.contract.common import ModelList
from tera.contract.openapi import openapi_json
from tera.errors import (
    FOR_OPERATORS,
    InternalError,
    MethodNotAllowedError,
    TeraError,
    UnknownUrlError,
)
from tera.gateway import routes
from tera.gateway.body import BodyReader
from tera.gateway.dialects.base import Question
from tera.gateway.edge import Edge
from tera.gateway.error_answers import error_response
from tera.gateway.exchange import Exchange
from tera.gateway.pipeline import Pipeline
from tera.gateway.relay import ClientGoneError, EventStream, Outbox, StreamedAnswer, while_connected
from tera.gateway.routes import ApiRoute
from tera.gateway.text_pool import SHORT_BYTES
from tera.observability import EXPOSITION_TYPE, Metrics
from tera.tenancy.keys import ApiKey

log = logging.getLogger(__name__)

CLIENT_REQUEST_ID = "x-tera-client-request-id"
"""HAProxy moves a client's own `x-request-id` here, since Ray adds one to every request."""
CLIENT_REQUEST_ID_CHARACTERS = 128
"""How much of a client's own request id is logged."""


class Health(Protocol):
    """What the operators' routes report."""

    async def readiness(self) -> tuple[bool, dict[str, Any]]:
        """Return whether this replica can serve, with details."""
        ...

    def own_exposition(self) -> str:
        """Return this process's metrics as Prometheus text."""
        ...

    async def exposition(self) -> str:
        """Return the whole platform's metrics as Prometheus text."""
        ...


def build_app(
    pipeline: Pipeline,
    health: Health,
    metrics: Metrics,
    config: Callable[[], GatewayConfig],
) -> ASGIApp:
    """Return the gateway's ASGI application; `config` is called for each request."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    endpoints = _Endpoints(pipeline, health, config)
    # Plain routes: FastAPI's own resolve dependencies, which none of these has, and that costs a
    # tenth of a short request's CPU.
    app.router.routes.extend(_Route(route, endpoints.of(route), config) for route in routes.ROUTES)
    app.add_exception_handler(TeraError, _answer_tera_error)
    app.add_exception_handler(HTTPException, _answer_http_exception)
    app.add_exception_handler(Exception, _answer_defect)
    return Edge(app, metrics, config)


class _Route(Route):
    """A route of the table."""

    def __init__(
        self,
        route: ApiRoute,
        endpoint: Callable[[Request], Awaitable[Response]],
        config: Callable[[], GatewayConfig],
    ) -> None:
        # Ids contain slashes; encoded ones arrive decoded.
        super().__init__(route.path.replace("}", ":path}"), endpoint, methods=[route.method])
        self._route = route
        self._config = config

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """Return whether a request is for this route.

        A path without an id, or the document's path while it is turned off, counts as unknown.
        """
        if not self._route.matches(scope["path"]):
            return Match.NONE, {}
        if self._route is routes.DOCUMENT and not self._config().openapi:
            return Match.NONE, {}
        return super().matches(scope)


class _Endpoints:
    """The routes' handlers, by their names in the table."""

    def __init__(
        self,
        pipeline: Pipeline,
        health: Health,
        config: Callable[[], GatewayConfig],
    ) -> None:
        self._pipeline = pipeline
        self._health = health
        self._config = config
        self._outbox = Outbox()
        self._document = openapi_json()
        self._bodies = BodyReader()

    def of(self, route: ApiRoute) -> Callable[[Request], Awaitable[Response]]:
        """Return the function of a route."""
        endpoint: Callable[..., Awaitable[Response]] = getattr(self, route.endpoint)
        return endpoint if route.dialect is None else partial(endpoint, dialect=route.dialect)

    async def healthz(self, request: Request) -> Response:
        return _json_response({"status": "ok"})

    async def readyz(self, request: Request) -> Response:
        ready, details = await self._health.readiness()
        status = "ready" if ready else "not_ready"
        return _json_response({"status": status, **details}, 200 if ready else 500)

    async def metrics(self, request: Request) -> Response:
        return Response(self._health.own_exposition(), media_type=EXPOSITION_TYPE)

    async def all_metrics(self, request: Request) -> Response:
        return Response(await self._health.exposition(), media_type=EXPOSITION_TYPE)

    async def models(self, request: Request) -> Response:
        caller = self._authenticate(request)
        return _json_response(ModelList(self._pipeline.model_cards(caller)))

    async def model(self, request: Request) -> Response:
        caller = self._authenticate(request)
        return _json_response(self._pipeline.model_card(caller, request.path_params["id"]))

    async def document(self, request: Request) -> Response:
        self._authenticate(request)
        return Response(self._document, media_type="application/json")

    async def generate(
        self, request: Request, *, dialect: Callable[[dict[str, Any]], Question]
    ) -> Response:
        caller = self._authenticate(request)
        exchange = Exchange.of(request)
        question = await self._question(request, caller, dialect, exchange)

        async def make(answer: StreamedAnswer) -> None:
            await self._pipeline.generate(caller, question.request, exchange, answer)

        if question.stream:
            return EventStream(
                partial(question.streamed, exchange),
                make,
                exchange,
                self._outbox,
                self._config().requests.keep_alive_seconds,
            )
        answer = question.whole(exchange)
        async with while_connected(request.receive):
            await self._pipeline.generate(caller, question.request, exchange, answer)
        return Response(answer.body(), media_type="application/json")

    async def _question(
        self,
        request: Request,
        caller: ApiKey,
        dialect: Callable[[dict[str, Any]], Question],
        exchange: Exchange,
    ) -> Question:
        """Read and parse the body, which is not kept."""
        limits = self._config().requests
        body = await self._bodies.read(
            request,
            caller.tenant,
            max_bytes=limits.max_body_bytes,
            within_s=limits.body_deadline_seconds,
        )
        if len(body) <= SHORT_BYTES:
            return await self._pipeline.parse(caller, dialect, body, exchange)
        async with while_connected(request.receive):
            return await self._pipeline.parse(caller, dialect, body, exchange)

    def _authenticate(self, request: Request) -> ApiKey:
        caller = self._pipeline.authenticate(request.headers.get("authorization"))
        # Only now: nobody without a key can fill the log.
        chosen = request.headers.get(CLIENT_REQUEST_ID)
        if chosen is not None:
            # %a escapes everything except printable ASCII, since the client chose the text.
            log.info(
                "The client of request %s calls it %a.",
                Exchange.of(request).request_id,
                chosen[:CLIENT_REQUEST_ID_CHARACTERS],
            )
        return caller


_encode = msgspec.json.Encoder().encode


def _json_response(content: object, status: int = 200) -> Response:
    return Response(_encode(content), status, media_type="application/json")


async def _answer_tera_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, TeraError)
    exchange = Exchange.of(request)
    exchange.code = error.code
    if isinstance(error, FOR_OPERATORS):
        log.error("Request %s failed.", exchange.request_id, exc_info=error)
    return error_response(error)


async def _answer_http_exception(request: Request, error: Exception) -> Response:
    """Answer Starlette's own 404 and 405 in our envelope."""
    assert isinstance(error, HTTPException)
    failure: TeraError
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "")
        failure = MethodNotAllowedError(
            f"{request.method} is not allowed here; use {allowed or 'another method'}."
        )
        response = await _answer_tera_error(request, failure)
        response.headers["allow"] = allowed
        return response
    if error.status_code == 404:
        return await _answer_tera_error(request, _unknown_url(request))
    log.error("Starlette raised an unexpected %s", error.status_code)
    return await _answer_tera_error(request, InternalError("The server failed on this request."))


class _Nothing(Response):
    """No answer at all."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send nothing."""


async def _answer_defect(request: Request, error: Exception) -> Response:
    """Answer instead of Starlette, whose page is plain text; Starlette raises the error again."""
    # Streams are sent past Starlette, so it does not know that one has begun.
    if isinstance(error, ClientGoneError) or Exchange.of(request).status:
        return _Nothing()
    return error_response(InternalError("The server failed on this request."))


def _unknown_url(request: Request) -> UnknownUrlError:
    return UnknownUrlError(f"Unknown URL: {request.method} {request.url.path[:256]}.")

"""HTTP: routes, reading bodies, and the one place where errors become answers."""

import logging
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, Protocol, TypeVar

import msgspec
from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tera.config.gateway import CorsConfig, GatewayConfig
from tera.contract.chat import ChatRequest
from tera.contract.common import (
    ModelList,
    error_envelope,
    parse_json_object,
    parse_request,
)
from tera.contract.completions import CompletionRequest
from tera.contract.openapi import openapi_json
from tera.errors import (
    InternalError,
    InvalidJsonError,
    MethodNotAllowedError,
    RequestTooLargeError,
    TeraError,
    UnknownUrlError,
    UnsupportedContentTypeError,
)
from tera.gateway.answers import Answer, ChatAnswer, CompletionAnswer
from tera.gateway.call import Call
from tera.gateway.limit_headers import LIMIT_HEADERS, limit_headers, retry_headers
from tera.gateway.pipeline import Pipeline
from tera.gateway.relay import ClientGoneError, EventStream, answered
from tera.observability import EXPOSITION_TYPE, Metrics
from tera.tenancy.keys import ApiKey

log = logging.getLogger(__name__)

D = TypeVar("D")

KEYLESS_ROUTES = ("/healthz", "/readyz", "/metrics")
EXPOSED_HEADERS = (
    *(b"x-request-id", b"retry-after", b"retry-after-ms", b"x-should-retry"),
    *LIMIT_HEADERS,
)
"""What a page of an allowed origin may read of an answer."""
DOCUMENT_PATH = "/openapi.json"


class Health(Protocol):
    """What the keyless routes tell."""

    async def readiness(self) -> tuple[bool, dict[str, Any]]:
        """Return whether this replica can serve, and details."""
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
    """Return the gateway's ASGI application; `config` is asked at each request."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    endpoints = _Endpoints(pipeline, health, config)
    # Plain routes: FastAPI's own would resolve dependencies that none of these has, for a tenth
    # of a short request's CPU. The requests most often made come first.
    app.add_route("/v1/completions", endpoints.completions, methods=["POST"])
    app.add_route("/v1/chat/completions", endpoints.chat_completions, methods=["POST"])
    app.add_route("/v1/models", endpoints.models, methods=["GET"])
    app.router.routes.append(_ModelRoute(endpoints.model))
    app.router.routes.append(_DocumentRoute(endpoints.document, lambda: config().openapi))
    app.add_route("/healthz", endpoints.healthz, methods=["GET"])
    app.add_route("/readyz", endpoints.readyz, methods=["GET"])
    app.add_route("/metrics", endpoints.metrics, methods=["GET"])
    app.add_exception_handler(TeraError, _answer_tera_error)
    app.add_exception_handler(HTTPException, _answer_http_exception)
    app.add_exception_handler(Exception, _answer_defect)
    return _Edge(app, metrics, config)


class _ModelRoute(Route):
    """A model's route; without an id its path is as unknown as any other."""

    def __init__(self, endpoint: Callable[[Request], Awaitable[Response]]) -> None:
        # Ids hold slashes; an encoded one arrives decoded.
        super().__init__("/v1/models/{model_id:path}", endpoint, methods=["GET"])

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        match, child = super().matches(scope)
        if match is not Match.NONE and not child["path_params"]["model_id"]:
            return Match.NONE, {}
        return match, child


class _DocumentRoute(Route):
    """The OpenAPI document's route; while it is off, its path is as unknown as any other."""

    def __init__(
        self, endpoint: Callable[[Request], Awaitable[Response]], enabled: Callable[[], bool]
    ) -> None:
        super().__init__(DOCUMENT_PATH, endpoint, methods=["GET"])
        self._enabled = enabled

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        return super().matches(scope) if self._enabled() else (Match.NONE, {})


async def _whole(answer: Answer[D], deltas: AsyncGenerator[D]) -> Response:
    return _json_response(await answer.whole(deltas))


class _Endpoints:
    """The routes' functions."""

    def __init__(
        self,
        pipeline: Pipeline,
        health: Health,
        config: Callable[[], GatewayConfig],
    ) -> None:
        self._pipeline = pipeline
        self._health = health
        self._config = config
        self._document = openapi_json()

    async def healthz(self, request: Request) -> Response:
        return _json_response({"status": "ok"})

    async def readyz(self, request: Request) -> Response:
        ready, details = await self._health.readiness()
        status = "ready" if ready else "not_ready"
        return _json_response({"status": status, **details}, 200 if ready else 500)

    async def metrics(self, request: Request) -> Response:
        return Response(await self._health.exposition(), media_type=EXPOSITION_TYPE)

    async def models(self, request: Request) -> Response:
        caller = self._authenticate(request)
        return _json_response(ModelList(self._pipeline.model_cards(caller)))

    async def model(self, request: Request) -> Response:
        caller = self._authenticate(request)
        return _json_response(self._pipeline.model_card(caller, request.path_params["model_id"]))

    async def document(self, request: Request) -> Response:
        self._authenticate(request)
        return Response(self._document, media_type="application/json")

    async def completions(self, request: Request) -> Response:
        caller = self._authenticate(request)
        completion = parse_request(CompletionRequest, await self._body(request))
        call: Call = request.state.call
        answer = CompletionAnswer(completion, call)
        return await self._answered(
            request, completion.stream, answer, self._pipeline.complete(caller, completion, call)
        )

    async def chat_completions(self, request: Request) -> Response:
        caller = self._authenticate(request)
        chat = parse_request(ChatRequest, await self._body(request))
        call: Call = request.state.call
        answer = ChatAnswer(chat, call)
        return await self._answered(
            request, chat.stream, answer, self._pipeline.chat(caller, chat, call)
        )

    async def _body(self, request: Request) -> dict[str, Any]:
        return parse_json_object(await read_body(request, self._config().requests.max_body_bytes))

    async def _answered(
        self, request: Request, stream: bool, answer: Answer[D], deltas: AsyncGenerator[D]
    ) -> Response:
        if stream:
            return EventStream(
                answer.events(deltas),
                send=request.state.send,
                next_is_here=request.state.call.attempts.next_is_here,
                keep_alive_s=self._config().requests.keep_alive_seconds,
                on_error=request.state.fail,
            )
        return await answered(request.receive, _whole(answer, deltas))

    def _authenticate(self, request: Request) -> ApiKey:
        return self._pipeline.authenticate(request.headers.get("authorization"))


_encode = msgspec.json.Encoder().encode


def _json_response(content: object, status: int = 200) -> Response:
    return Response(_encode(content), status, media_type="application/json")


async def read_body(request: Request, max_bytes: int) -> bytes:
    """Return the body of a JSON request, never holding more than `max_bytes`.

    Raises:
        RequestTooLargeError: found from content-length, or while reading.
        UnsupportedContentTypeError: it is declared as something other than plain JSON.
        InvalidJsonError: the client hung up before its end.
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


def _error_response(error: TeraError) -> Response:
    headers = {}
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    if error.status == 429:
        headers = retry_headers(error)
    return Response(error_envelope(error), error.status, headers, "application/json")


async def _answer_tera_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, TeraError)
    request.state.fail(error)
    return _error_response(error)


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
    """Answer in Starlette's place, whose page is plain text; it raises the error again."""
    if isinstance(error, ClientGoneError):
        return _Nothing()
    return _error_response(InternalError("The server failed on this request."))


def _unknown_url(request: Request) -> UnknownUrlError:
    return UnknownUrlError(f"Unknown URL: {request.method} {request.url.path[:256]}.")


class _Edge:
    """Outermost layer: request ids, metrics of every answer, and the last word on errors."""

    def __init__(self, app: ASGIApp, metrics: Metrics, config: Callable[[], GatewayConfig]) -> None:
        self._app = app
        self._metrics = metrics
        self._config = config

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        config = self._config()
        route = _route(scope["path"], config)
        request_id = f"req_{secrets.token_hex(16)}"
        call = Call(request_id, route, time.monotonic(), time.time())
        status, code = 0, ""

        shared = _cors_headers(scope, config.cors)

        def fail(error: TeraError) -> None:
            nonlocal code
            code = error.code

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [
                    *message.get("headers", ()),
                    (b"x-request-id", call.request_id.encode()),
                    *limit_headers(call.admission),
                    *shared,
                ]
            await send(message)

        own = {"call": call, "fail": fail, "send": send_with_id}
        scope["state"] = {**scope.get("state", {}), **own}
        ongoing = self._metrics.ongoing_requests.labels(call.route)
        ongoing.inc()
        try:
            if _is_preflight(scope, call.route):
                await Response(status_code=204)(scope, receive, send_with_id)
            else:
                await self._app(scope, receive, send_with_id)
        except ClientGoneError:
            code = "client_gone"
        except Exception:
            log.exception("Request %s failed.", call.request_id)
            failure = InternalError("The server failed on this request.")
            code = failure.code
            if not status:
                await _error_response(failure)(scope, receive, send_with_id)
        finally:
            ongoing.dec()
            self._observe(call, status, code)

    def _observe(self, call: Call, status: int, code: str) -> None:
        metrics, model = self._metrics, call.model
        metrics.requests.labels(model, call.route, str(status or 499), code).inc()
        if model:
            elapsed_s = time.monotonic() - call.arrived
            metrics.request_s.labels(model, call.route).observe(elapsed_s)
            metrics.prompt_tokens.labels(model).inc(call.prompt_tokens)
            metrics.cached_tokens.labels(model).inc(call.cached_tokens)
            metrics.completion_tokens.labels(model).inc(call.completion_tokens)
            metrics.replica_switches.labels(model).inc(call.attempts.replica_switches)


def _header(scope: Scope, name: bytes) -> str | None:
    for header, value in scope["headers"]:
        if header == name:
            return str(value, "latin-1")
    return None


def _is_preflight(scope: Scope, route: str) -> bool:
    """Return whether a browser asks what a page of another origin may do."""
    return (
        scope["method"] == "OPTIONS"
        and route != "other"
        and _header(scope, b"origin") is not None
        and _header(scope, b"access-control-request-method") is not None
    )


def _cors_headers(scope: Scope, cors: CorsConfig) -> list[tuple[bytes, bytes]]:
    """Return what lets a page of an allowed origin read the answer."""
    origin = _header(scope, b"origin") if cors.origins else None
    if origin is None or not {origin, "*"} & set(cors.origins):
        return []
    headers = [
        # Never "*": with the origin named, a page of another one cannot use a cached answer.
        (b"access-control-allow-origin", origin.encode("latin-1")),
        (b"vary", b"origin"),
        (b"access-control-expose-headers", b", ".join(EXPOSED_HEADERS)),
    ]
    if scope["method"] == "OPTIONS":
        requested = _header(scope, b"access-control-request-headers") or "authorization"
        headers += [
            (b"access-control-allow-methods", b"GET, HEAD, POST, OPTIONS"),
            # SDKs send headers of their own; none of them means anything to us.
            (b"access-control-allow-headers", requested.encode("latin-1")),
            (b"access-control-max-age", b"600"),
        ]
    return headers


def _route(path: str, config: GatewayConfig) -> str:
    """Return a label of few values for a path that may be anything."""
    if path in (*KEYLESS_ROUTES, "/v1/completions", "/v1/chat/completions", "/v1/models"):
        return path
    if path == DOCUMENT_PATH and config.openapi:
        return path
    prefix = "/v1/models/"
    return "/v1/models/{id}" if path.startswith(prefix) and path != prefix else "other"

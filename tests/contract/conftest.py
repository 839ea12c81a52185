"""The whole gateway in this process: everything but Ray, HTTP and Redis is the real thing."""

import asyncio
from collections.abc import Iterator, Mapping
from contextlib import AsyncExitStack
from functools import partial
from typing import Any

import httpx
import pytest
from pydantic import JsonValue
from starlette.routing import Route
from tests.admitters import LocalAdmitter
from tests.routing.conftest import SECRET
from tests.routing.engines import EngineFleet

from tera.config.gateway import GatewayConfig, RequestLimits
from tera.config.model import Capability, EngineConfig, ModelConfig
from tera.contract.common import ModelStatus
from tera.engine.simulated import SimulatedEngine
from tera.engine.simulated_args import SimulatedArgs
from tera.errors import InvalidApiKeyError, MissingApiKeyError
from tera.gateway.app import build_app
from tera.gateway.catalog import Catalog, ServedModel
from tera.gateway.pipeline import Pipeline
from tera.gateway.simulated_text import SimulatedTextModel
from tera.observability import Metrics
from tera.routing.run import Dispatcher, DispatchLimits
from tera.tenancy.cache_salt import cache_salt
from tera.tenancy.keys import ApiKey

KEY = "sk-tera-of-these-tests"
MODEL = "sim/small"
BROKEN_MODEL = "sim/broken"
CHAT_MODEL = "sim/chat"
CONTEXT_TOKENS = 256

_LIMITS = DispatchLimits(
    deadline_s=60, first_token_deadline_s=60, cold_start_deadline_s=60, retries=0
)


class OneKey:
    """An `Authenticator` that knows `KEY` alone."""

    def authenticate(self, authorization: str | None) -> ApiKey:
        if authorization is None:
            raise MissingApiKeyError("You did not provide an API key.")
        if authorization != f"Bearer {KEY}":
            raise InvalidApiKeyError("The API key is not valid.")
        return ApiKey("key_1", "acme", "", "", None, 0.0)


class Gateway:
    """The ASGI application and a client of it; the tests are synchronous, so it has a loop."""

    def __init__(self) -> None:
        self.config = GatewayConfig(requests=RequestLimits(max_body_bytes=65536))
        self.ready = True
        self.metrics = Metrics()
        self.admitter = LocalAdmitter()
        self._runner = asyncio.Runner()
        self._catalog = Catalog()
        self._stack = AsyncExitStack()
        pipeline = Pipeline(self._catalog, OneKey(), self.admitter, self._status, self.metrics)
        self._app: Any = build_app(pipeline, self, self.metrics, lambda: self.config)
        self._runner.run(self._start())

    async def _start(self) -> None:
        self._catalog.replace(
            {
                "small": await self._model("small", MODEL, {}, ("completions", "chat")),
                "broken": await self._model(
                    "broken", BROKEN_MODEL, {"fail_after_tokens": 3}, ("completions", "chat")
                ),
                "chat": await self._model("chat", CHAT_MODEL, {}, ("chat",)),
            }
        )

    async def _model(
        self,
        name: str,
        model_id: str,
        faults: dict[str, JsonValue],
        capabilities: tuple[Capability, ...],
    ) -> ServedModel:
        profile: dict[str, JsonValue] = {
            "prefill_tokens_per_s": 0,
            "decode_step_s": 0,
            "context_tokens": CONTEXT_TOKENS,
        }
        args: dict[str, JsonValue] = {"profile": profile, "faults": faults}
        engine = SimulatedEngine(SimulatedArgs.parse(args), stall_s=60)
        self._stack.push_async_callback(engine.close)
        fleet = await self._stack.enter_async_context(EngineFleet(engine))
        config = ModelConfig(
            id=model_id,
            engine=EngineConfig(kind="simulated", args=args),
            capabilities=capabilities,
        )
        dispatcher = Dispatcher(fleet.fleet, fleet.links, _LIMITS)
        salt = partial(cache_salt, SECRET, config.cache_sharing)
        return ServedModel(name, config, SimulatedTextModel(args), dispatcher, salt)

    def _status(self, name: str) -> ModelStatus:
        return "ready"

    async def readiness(self) -> tuple[bool, dict[str, Any]]:
        return self.ready, {"models": {}, "redis": "ok"}

    def own_exposition(self) -> str:
        return self.metrics.exposition()

    async def exposition(self) -> str:
        return self.metrics.exposition()

    @property
    def routes(self) -> list[Route]:
        """Return the application's routes, which are below the layer at its edge."""
        routes: list[Route] = self._app._app.routes
        return routes

    def request(
        self,
        method: str,
        path: str,
        *,
        json: Any = None,
        content: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        key: str | None = KEY,
    ) -> httpx.Response:
        """Return the answer; a stream's is read to its end."""
        sent = dict(headers or {})
        if key is not None:
            sent.setdefault("authorization", f"Bearer {key}")
        return self._runner.run(self._request(method, path, json, content, sent))

    async def _request(
        self, method: str, path: str, json: Any, content: bytes | None, headers: Mapping[str, str]
    ) -> httpx.Response:
        transport = httpx.ASGITransport(self._app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
            return await client.request(method, path, json=json, content=content, headers=headers)

    def close(self) -> None:
        self._runner.run(self._stack.aclose())
        self._runner.close()


@pytest.fixture(scope="session")
def _gateway() -> Iterator[Gateway]:
    gateway = Gateway()
    yield gateway
    gateway.close()


@pytest.fixture
def gateway(_gateway: Gateway) -> Iterator[Gateway]:
    """A gateway with three simulated models, as configured by default whatever tests change."""
    config = _gateway.config
    yield _gateway
    _gateway.config, _gateway.ready = config, True

"""One gateway replica in this process: all of it but Ray and Redis, over a simulated engine."""

import asyncio
import json
from collections.abc import AsyncGenerator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import pytest_asyncio
from pydantic import JsonValue
from starlette.types import ASGIApp, Message
from tests.admitters import LocalAdmitter
from tests.routing.conftest import HOST, SECRET, EngineHandle, until

from tera.config.gateway import GatewayConfig
from tera.config.model import EngineConfig, ModelConfig
from tera.contract.common import ModelStatus
from tera.engine.simulated import SimulatedEngine
from tera.engine.simulated_args import SimulatedArgs
from tera.gateway.app import build_app
from tera.gateway.call import Call
from tera.gateway.catalog import Catalog, ServedModel
from tera.gateway.pipeline import Pipeline
from tera.gateway.render import TextModel
from tera.gateway.simulated_text import SimulatedTextModel
from tera.generation import ReplicaLoad
from tera.observability import Metrics
from tera.routing.channel import TokenReceiver
from tera.routing.dispatch import Dispatcher, DispatchLimits
from tera.tenancy.keys import ApiKey

MODEL, CONTEXT_TOKENS = "sim/one", 2048
CALLER = ApiKey("key_1", "acme", "", "", None, 0.0)


class EveryKey:
    """An `Authenticator` that asks nobody for a key."""

    def authenticate(self, authorization: str | None) -> ApiKey:
        return CALLER


class Gateway:
    """A pipeline and its application; the n-th dispatch is lost after `deaths[n]` tokens.

    Prompts that say FAULT fail on the engine.
    """

    def __init__(
        self,
        deaths: Sequence[int] = (),
        *,
        text: type[SimulatedTextModel] = SimulatedTextModel,
        profile: Mapping[str, JsonValue] | None = None,
    ) -> None:
        free: dict[str, JsonValue] = {"prefill_tokens_per_s": 0, "decode_step_s": 0}
        self._args: dict[str, JsonValue] = {
            "profile": {**free, "context_tokens": CONTEXT_TOKENS, **(profile or {})},
            "faults": {"only_prompts_with": "FAULT", "fail_after_tokens": 3},
        }
        self._deaths = list(deaths)
        self._text = text
        self._receiver = TokenReceiver(HOST, SECRET)
        self.config = GatewayConfig()
        self.metrics = Metrics()
        self.admitter = LocalAdmitter()
        self.catalog = Catalog()
        self.pipeline = Pipeline(
            self.catalog, EveryKey(), self.admitter, self._status, self.metrics
        )
        self.app: ASGIApp = build_app(self.pipeline, self, self.metrics, lambda: self.config)

    async def __aenter__(self) -> Self:
        await self._receiver.__aenter__()
        self._engine = SimulatedEngine(SimulatedArgs.parse(self._args), stall_s=60)
        self.handle = EngineHandle(self._engine, self._deaths)
        self.catalog.replace({"one": self.model("one", MODEL)})
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.handle.close()
        await self._engine.close()
        await self._receiver.__aexit__(None, None, None)

    def model(self, name: str, model_id: str, aliases: tuple[str, ...] = ()) -> ServedModel:
        """Return another name for this gateway's engine."""
        config = ModelConfig(
            id=model_id,
            aliases=aliases,
            engine=EngineConfig(kind="simulated", args=self._args),
            capabilities=("completions", "chat"),
        )
        limits = DispatchLimits(60, 60, 60, retries=len(self._deaths))
        text: TextModel = self._text(self._args)
        return ServedModel(name, config, text, Dispatcher(self.handle, self._receiver, limits))

    def call(self) -> Call:
        return Call("request", "/v1/completions", 0.0, 0.0)

    @property
    def load(self) -> ReplicaLoad:
        return self._engine.load()

    async def wait_until_idle(self) -> None:
        await until(lambda: (self.load.running, self.load.waiting) == (0, 0))

    async def post(self, client: "Client", path: str = "/v1/completions") -> None:
        """Answer one request."""
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(b"content-type", b"application/json")],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 2),
        }
        await self.app(scope, client.receive, client.send)

    def _status(self, name: str) -> ModelStatus:
        return "ready"

    async def readiness(self) -> tuple[bool, dict[str, Any]]:
        return True, {}

    async def exposition(self) -> str:
        return self.metrics.exposition()


class Client:
    """The other end of one ASGI request: what it was sent, and its hang-up."""

    def __init__(self, body: object = None) -> None:
        self.sent: list[Message] = []
        self._arriving: asyncio.Queue[Message] = asyncio.Queue()
        if body is not None:
            self._arriving.put_nowait({"type": "http.request", "body": json.dumps(body).encode()})

    async def receive(self) -> Message:
        return await self._arriving.get()

    async def send(self, message: Message) -> None:
        self.sent.append(message)

    def hang_up(self) -> None:
        self._arriving.put_nowait({"type": "http.disconnect"})

    @property
    def status(self) -> int | None:
        return next((message["status"] for message in self.sent if "status" in message), None)

    @property
    def writes(self) -> list[bytes]:
        return [message["body"] for message in self.sent if "body" in message]

    @property
    def body(self) -> bytes:
        return b"".join(self.writes)

    @property
    def ended(self) -> bool:
        return bool(self.sent) and self.sent[-1].get("more_body") is False


@pytest_asyncio.fixture
async def gateway() -> AsyncGenerator[Gateway]:
    """A gateway whose engine takes no time and is never lost."""
    async with Gateway() as gateway:
        yield gateway

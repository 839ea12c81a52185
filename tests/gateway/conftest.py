"""One gateway replica in this process: all of it but Ray and Redis, over a simulated engine."""

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from functools import partial
from typing import Any, Self
from uuid import uuid4

import pytest
import pytest_asyncio
import uvloop
from pydantic import JsonValue
from starlette.types import ASGIApp, Message, Send
from tests.admitters import LocalAdmitter
from tests.routing.conftest import SECRET, until
from tests.routing.engines import EngineFleet

from tera.config.gateway import GatewayConfig
from tera.config.model import CacheSharing, EngineConfig, ModelConfig
from tera.contract.common import ModelStatus
from tera.engine.simulated import SimulatedEngine
from tera.engine.simulated_args import SimulatedArgs
from tera.gateway.app import build_app
from tera.gateway.catalog import Catalog, ServedModel
from tera.gateway.exchange import Exchange
from tera.gateway.pipeline import Authenticator, Pipeline
from tera.gateway.render import TextModel
from tera.gateway.simulated_text import SimulatedTextModel
from tera.gateway.text_pool import TextPool
from tera.generation import ReplicaLoad
from tera.observability import Metrics, merge_expositions
from tera.routing.run import Dispatcher, DispatchLimits
from tera.tenancy.cache_salt import cache_salt
from tera.tenancy.keys import ApiKey

MODEL, CONTEXT_TOKENS = "sim/one", 2048
CALLER = ApiKey("key_1", "acme", "", "", None, 0.0)


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    # Serve's replicas run uvloop, and what is sent is sent by hand: see `relay.Events`.
    loops = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}
    sends = item.path.stem in ("test_relay", "test_hang_up", "test_sockets")
    return loops if sends else {"asyncio": loops["asyncio"]}


class EveryKey:
    """An `Authenticator` that asks nobody for a key."""

    def authenticate(self, authorization: str | None) -> ApiKey:
        return CALLER


async def unused(message: Message) -> None:
    raise AssertionError("nothing is sent here")


def exchange(send: Send = unused) -> Exchange:
    """Return the exchange of a request that has just arrived."""
    arrived = asyncio.get_running_loop().time()
    return Exchange(f"req_{uuid4().hex}", "/v1/completions", arrived, 0.0, send)


class Gateway:
    """A pipeline and its application; the n-th generation's replica is lost after `deaths[n]`
    tokens.

    Prompts that say FAULT fail on the engine after three tokens.
    """

    def __init__(
        self,
        deaths: Sequence[int] = (),
        *,
        text: type[SimulatedTextModel] = SimulatedTextModel,
        profile: Mapping[str, JsonValue] | None = None,
        faults: Mapping[str, JsonValue] | None = None,
        keys: Authenticator | None = None,
        pool: TextPool | None = None,
    ) -> None:
        free: dict[str, JsonValue] = {"prefill_tokens_per_s": 0, "decode_step_s": 0}
        self._args: dict[str, JsonValue] = {
            "profile": {**free, "context_tokens": CONTEXT_TOKENS, **(profile or {})},
            "faults": {"only_prompts_with": "FAULT", **(faults or {"fail_after_tokens": 3})},
        }
        self._deaths = list(deaths)
        self._text = text
        self.config = GatewayConfig()
        self.metrics = Metrics()
        self.admitter = LocalAdmitter()
        self.catalog = Catalog()
        self.pipeline = Pipeline(
            self.catalog, keys or EveryKey(), self.admitter, self._status, self.metrics, pool
        )
        self.app: ASGIApp = build_app(self.pipeline, self, self.metrics, lambda: self.config)

    async def __aenter__(self) -> Self:
        self._engine = SimulatedEngine(SimulatedArgs.parse(self._args), stall_s=60)
        self.fleet = EngineFleet(self._engine, self._deaths)
        await self.fleet.__aenter__()
        self.catalog.replace({"one": self.model("one", MODEL)})
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.fleet.__aexit__(*exc)
        await self._engine.close()

    def model(
        self,
        name: str,
        model_id: str,
        aliases: tuple[str, ...] = (),
        cache_sharing: CacheSharing = "tenant",
    ) -> ServedModel:
        """Return another name for this gateway's engine."""
        config = ModelConfig(
            id=model_id,
            aliases=aliases,
            engine=EngineConfig(kind="simulated", args=self._args),
            capabilities=("completions", "chat"),
            cache_sharing=cache_sharing,
        )
        limits = DispatchLimits(60, 60, 60, retries=len(self._deaths))
        text: TextModel = self._text(self._args)
        dispatcher = Dispatcher(self.fleet.fleet, self.fleet.links, limits)
        salt = partial(cache_salt, SECRET, config.cache_sharing)
        return ServedModel(name, config, text, dispatcher, salt)

    @property
    def load(self) -> ReplicaLoad:
        return self._engine.load()

    async def wait_until_idle(self) -> None:
        """Wait until no engine has work, and nothing is counted at any replica."""
        await until(lambda: (self.load.running, self.load.waiting) == (0, 0))
        assert self.fleet.serve.idle

    async def post(self, client: "Client", path: str = "/v1/completions") -> None:
        """Answer one request."""
        await self.request(client, "POST", path)

    async def request(self, client: "Client", method: str, path: str, key: str = "") -> None:
        headers = [(b"content-type", b"application/json")]
        if key:
            headers.append((b"authorization", f"Bearer {key}".encode()))
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": headers,
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 2),
        }
        await self.app(scope, client.receive, client.send)

    def _status(self, name: str) -> ModelStatus:
        return "ready"

    async def readiness(self) -> tuple[bool, dict[str, Any]]:
        return True, {}

    def own_exposition(self) -> str:
        return self.metrics.exposition()

    async def exposition(self) -> str:
        return merge_expositions([("replica-1", self.own_exposition())])


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


class SlowClient(Client):
    """A client that takes in what it is sent, and no more until the test lets it.

    As a server's: `send` waits while the connection is full, and not for what it was given.
    """

    def __init__(self, body: object = None) -> None:
        super().__init__(body)
        self._reads = asyncio.Event()
        self._reads.set()

    def stop_reading(self) -> None:
        self._reads.clear()

    def read_on(self) -> None:
        self._reads.set()

    async def send(self, message: Message) -> None:
        await super().send(message)
        await self._reads.wait()


@pytest_asyncio.fixture
async def gateway() -> AsyncGenerator[Gateway]:
    """A gateway whose engine takes no time and is never lost."""
    async with Gateway() as gateway:
        yield gateway

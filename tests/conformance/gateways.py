"""The gateways that the contract is held against: one in this process, and whole platforms.

All are called alike, over HTTP semantics only, and each says of itself what a test has to know.
"""

import asyncio
import json
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import httpx
from redis.asyncio import Redis
from starlette.types import Message, Scope
from tests.admitters import LocalAdmitter
from tests.routing.conftest import HOST, SECRET
from tests.routing.engines import EngineFleet
from tests.serve.conftest import Platform

from tera.config.gateway import CorsConfig, GatewayConfig, RequestLimits
from tera.config.model import EngineConfig, ModelConfig
from tera.contract.common import ModelStatus
from tera.engine.simulated import SimulatedEngine
from tera.engine.simulated_args import SimulatedArgs
from tera.engine.simulated_vocabulary import Vocabulary
from tera.gateway.app import build_app
from tera.gateway.catalog import Catalog, ServedModel
from tera.gateway.pipeline import Pipeline
from tera.gateway.render import TextModel
from tera.gateway.simulated_text import SimulatedTextModel
from tera.observability import Metrics
from tera.routing.run import Dispatcher, DispatchLimits
from tera.tenancy.cache_salt import cache_salt
from tera.tenancy.keys import ApiKey, generate_key, hash_key
from tera.tenancy.snapshot import KeySnapshot

REQUEST_ID = re.compile(r"req_[0-9a-f]{32}")
ABSENT: Any = object()
"""In place of a field's value: the field is left out."""

_PEPPER = "the pepper of this cluster"


class Gateway:
    """A way to one gateway and its main model."""

    model: str
    context_tokens: int
    vocab_size: int
    max_body_bytes: int
    key: str

    def request(
        self,
        method: str,
        path: str,
        *,
        content: bytes | None = None,
        headers: Mapping[str, str | bytes] | None = None,
        key: str | None = "",
    ) -> httpx.Response:
        """Return the answer, read to its end; `key` is the gateway's own unless given or None."""
        shown = self.key if key == "" else key
        sent = {} if shown is None else {"authorization": f"Bearer {shown}"}
        return self._request(method, path, content, {**sent, **(headers or {})})

    def _request(
        self,
        method: str,
        path: str,
        content: bytes | None,
        headers: Mapping[str, str | bytes],
    ) -> httpx.Response:
        raise NotImplementedError

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        """Send `body` as JSON, or as it is when it is bytes."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.request("POST", path, content=content, **options)

    def complete(self, **fields: Any) -> httpx.Response:
        """Ask for a short completion; greedy, so that it can be asked for again."""
        return self.post("/v1/completions", self.completion(**fields))

    def chat(self, **fields: Any) -> httpx.Response:
        """Ask for a short answer; greedy, so that it can be asked for again."""
        return self.post("/v1/chat/completions", self.conversation(**fields))

    def completion(self, **fields: Any) -> dict[str, Any]:
        """Return a valid body of `/v1/completions` with these fields."""
        base = {"model": self.model, "prompt": "One", "max_tokens": 3, "temperature": 0}
        return _with(base, fields)

    def conversation(self, **fields: Any) -> dict[str, Any]:
        """Return a valid body of `/v1/chat/completions` with these fields."""
        messages = [{"role": "user", "content": "Hello"}]
        base = {"model": self.model, "messages": messages, "max_tokens": 3, "temperature": 0}
        return _with(base, fields)

    def together(self, *calls: Callable[[], httpx.Response]) -> list[httpx.Response]:
        """Return what these calls return, made at once where the gateway is another process."""
        return [call() for call in calls]


def _with(base: dict[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in {**base, **fields}.items() if value is not ABSENT}


class PlatformGateway(Gateway):
    """A platform as a process, through HAProxy."""

    def __init__(self, platform: Platform, model: str, vocab_size: int, max_body_bytes: int):
        self.platform = platform
        self.model = model
        self.vocab_size = vocab_size
        self.max_body_bytes = max_body_bytes
        self.context_tokens = 2048
        self.key = platform.api_key
        self._client = httpx.Client(base_url=platform.base_url, timeout=120)

    def _request(
        self,
        method: str,
        path: str,
        content: bytes | None,
        headers: Mapping[str, str | bytes],
    ) -> httpx.Response:
        sent = cast("Mapping[str, str]", headers)
        return self._client.request(method, path, content=content, headers=sent)

    def together(self, *calls: Callable[[], httpx.Response]) -> list[httpx.Response]:
        with ThreadPoolExecutor(len(calls)) as pool:
            return [answer.result() for answer in [pool.submit(call) for call in calls]]

    def close(self) -> None:
        self._client.close()


class DefectiveText(SimulatedTextModel):
    """A defect of ours: it raises what nobody expects, with what nobody may see."""

    async def encode(self, text: str) -> list[int]:
        raise RuntimeError("/opt/tera/secret.py on node-7.internal: replica abc#def")


@dataclass
class Exchange:
    """One request at the level of ASGI: what was read of it and what was answered."""

    received: int
    """Messages of the request that the application has asked for."""
    sent: list[Message]
    read: int = 0
    """Those it had asked for when it began to answer; what it takes later can only be discarded."""

    @property
    def status(self) -> int:
        return int(self.sent[0]["status"])

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent[1:])


class InProcessGateway(Gateway):
    """The real gateway and simulated engines in this process; no Ray, no Redis, no sockets of HTTP.

    Its models, in order: `sim/small` (alias `sim`; fails after 5 tokens where the prompt holds
    FAULT), `Sim/Chat-Only`, and `sim/dead`, `sim/stalled`, `sim/stuck` and `sim/defective`, which
    are what they are called. One that stalls does so for good, with its first request.
    """

    model = "sim/small"
    alias = "sim"
    context_tokens = 512
    vocab_size = Vocabulary().size
    max_body_bytes = 65536

    def __init__(self) -> None:
        self.default_config = GatewayConfig(
            requests=RequestLimits(max_body_bytes=self.max_body_bytes)
        )
        self.config = self.default_config
        self.now_s = 1_800_000_000.0
        self._runner = asyncio.Runner()
        self._catalog = Catalog()
        self._stack = AsyncExitStack()
        self._engines: list[SimulatedEngine] = []
        # It is never entered, so it never asks Redis: these tests put the keys in themselves.
        self._keys = KeySnapshot(cast(Redis, None), _PEPPER, lambda: self.now_s)
        self.metrics = Metrics()
        self.admitter = LocalAdmitter()
        pipeline = Pipeline(self._catalog, self._keys, self.admitter, self._status, self.metrics)
        self.app = build_app(pipeline, self, self.metrics, lambda: self.config)
        self.key = self.make_key()
        self._runner.run(self._start())

    async def _start(self) -> None:
        flaky = {"only_prompts_with": "FAULT", "fail_after_tokens": 5}
        models = [
            await self._served("small", "sim/small", faults=flaky, aliases=("sim",)),
            await self._served("chat", "Sim/Chat-Only", capabilities=("chat",)),
            await self._served("dead", "sim/dead", faults={"fail_after_tokens": 0}),
            await self._served("stalled", "sim/stalled", faults={"stall_after_tokens": 1}),
            await self._served("stuck", "sim/stuck", faults={"stall_after_tokens": 1}),
            await self._served("defective", "sim/defective", text=DefectiveText),
        ]
        self._catalog.replace({model.name: model for model in models})

    async def _served(
        self,
        name: str,
        model_id: str,
        *,
        faults: Mapping[str, Any] | None = None,
        text: type[SimulatedTextModel] = SimulatedTextModel,
        **options: Any,
    ) -> ServedModel:
        profile = {"prefill_tokens_per_s": 0, "decode_step_s": 0, "max_running": 256}
        args: dict[str, Any] = {
            "profile": {**profile, "context_tokens": self.context_tokens},
            "faults": dict(faults or {}),
        }
        engine = SimulatedEngine(SimulatedArgs.parse(args), stall_s=60)
        self._engines.append(engine)
        self._stack.push_async_callback(engine.close)
        fleet = await self._stack.enter_async_context(EngineFleet(engine))
        config = ModelConfig(
            id=model_id, engine=EngineConfig(kind="simulated", args=args), **options
        )
        limits = DispatchLimits(60, 60, 60, retries=1)
        served_text: TextModel = text(args)
        dispatcher = Dispatcher(fleet.fleet, fleet.links, limits)
        salt = partial(cache_salt, SECRET, config.cache_sharing)
        return ServedModel(name, config, served_text, dispatcher, salt)

    def _status(self, name: str) -> ModelStatus:
        return "ready"

    async def readiness(self) -> tuple[bool, dict[str, Any]]:
        return True, {"models": {}, "redis": "ok"}

    def own_exposition(self) -> str:
        return self.metrics.exposition()

    async def exposition(self) -> str:
        return self.metrics.exposition()

    def make_key(
        self, models: tuple[str, ...] | None = None, expires_s: float | None = None
    ) -> str:
        """Return a new key that is valid from now on."""
        key = generate_key()
        digest = hash_key(key, _PEPPER)
        known = self._keys._by_hash
        known[digest] = ApiKey(
            f"key_{len(known)}", "acme", digest, "", models, self.now_s, expires_s
        )
        return key

    def revoke(self, key: str) -> None:
        """End a key."""
        del self._keys._by_hash[hash_key(key, _PEPPER)]

    def allow_origins(self, *origins: str) -> None:
        """Switch CORS on."""
        cors = CorsConfig(origins=origins)
        self.config = self.config.model_copy(update={"cors": cors})

    def keep_alive_after(self, seconds: float) -> None:
        """Set the longest silence of a stream."""
        requests = RequestLimits(max_body_bytes=self.max_body_bytes, keep_alive_seconds=seconds)
        self.config = self.config.model_copy(update={"requests": requests})

    def _request(
        self,
        method: str,
        path: str,
        content: bytes | None,
        headers: Mapping[str, str | bytes],
    ) -> httpx.Response:
        return self._runner.run(self._answer(method, path, content, headers))

    async def _answer(
        self,
        method: str,
        path: str,
        content: bytes | None,
        headers: Mapping[str, str | bytes],
    ) -> httpx.Response:
        transport = httpx.ASGITransport(cast(Any, self.app), raise_app_exceptions=False)
        sent = cast("Mapping[str, str]", headers)
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
            return await client.request(method, path, content=content, headers=sent)

    def exchange(
        self,
        body: Sequence[bytes],
        *,
        path: str = "/v1/completions",
        headers: Mapping[str, str] | None = None,
        key: str | None = "",
        hang_up_after: int | None = None,
        hang_up_when: Callable[[bytes], bool] | None = None,
    ) -> Exchange:
        """POST a body in these pieces and return both sides' messages.

        Args:
            body: one message each; the client waits after the last.
            path: where to.
            headers: beside `authorization`.
            key: as for `request`.
            hang_up_after: the client is gone after that many messages of the answer.
            hang_up_when: the client is gone once the answer's body is so.
        """
        shown = self.key if key == "" else key
        named = {} if shown is None else {"authorization": f"Bearer {shown}"}
        scope: Scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [
                (name.encode(), value.encode())
                for name, value in {**named, **(headers or {})}.items()
            ],
            "client": (HOST, 1),
            "server": (HOST, 80),
        }

        def leaves(so_far: Exchange) -> bool:
            if hang_up_when is not None:
                return hang_up_when(so_far.body)
            return len(so_far.sent) == hang_up_after

        return self._runner.run(self._exchange(scope, body, leaves))

    async def _exchange(
        self, scope: Scope, body: Sequence[bytes], leaves: Callable[[Exchange], bool]
    ) -> Exchange:
        exchange = Exchange(0, [])
        gone = asyncio.Event()
        if leaves(exchange):
            gone.set()

        async def receive() -> Message:
            if exchange.received < len(body):
                piece = body[exchange.received]
                exchange.received += 1
                more = exchange.received < len(body)
                return {"type": "http.request", "body": piece, "more_body": more}
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            if not exchange.sent:
                exchange.read = exchange.received
            exchange.sent.append(message)
            if leaves(exchange):
                gone.set()

        await self.app(scope, receive, send)
        return exchange

    def wait_until_idle(self) -> None:
        """Return once no engine has work."""
        self._runner.run(self._idle())

    async def _idle(self) -> None:
        async with asyncio.timeout(10):
            for engine in self._engines:
                load = engine.load
                while load().running or load().waiting:  # noqa: ASYNC110  it has no event
                    await asyncio.sleep(0.001)

    def close(self) -> None:
        self._runner.run(self._stack.aclose())
        self._runner.close()

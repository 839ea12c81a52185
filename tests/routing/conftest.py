"""Replicas that the tests own: they speak the token channel and fail as they are told."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing, suppress

import pytest
import pytest_asyncio
import uvloop
from tests.engine.streams import streamed

from tera import wire
from tera.engine.base import TextEngine
from tera.engine.channel import GatewayLink
from tera.errors import ReplicaLostError
from tera.generation import (
    FinishReason,
    Generation,
    GenerationEnd,
    ReplicaLoad,
    StepFrame,
    TokenDelta,
    decode_generation,
    encode,
)
from tera.routing.channel import Inbox, TokenReceiver
from tera.routing.switchboard import Route

SECRET = "the secret of this cluster"  # noqa: S105  of nobody else
HOST = "127.0.0.1"


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    # Serve's replicas run uvloop, whose transports differ from asyncio's.
    return {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


async def until(condition: Callable[[], bool], timeout_s: float = 10) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110  what is waited for has no event
            await asyncio.sleep(0.001)


class FakeReplica:
    """The replica's end of the token channel, byte by byte, independent of `GatewayLink`."""

    def __init__(
        self, name: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.name = name
        self.reader = reader
        self.writer = writer

    @classmethod
    async def connect(
        cls, address: tuple[str, int], name: str = "replica", secret: str = SECRET
    ) -> "FakeReplica":
        reader, writer = await asyncio.open_connection(*address)
        replica = cls(name, reader, writer)
        try:
            await replica._shake_hands(secret)
        except asyncio.CancelledError:
            writer.transport.abort()
            raise
        except (asyncio.IncompleteReadError, ConnectionError):
            await replica.close()
            raise ReplicaLostError("The gateway refused.") from None
        return replica

    async def _shake_hands(self, secret: str) -> None:
        nonce_g = await self.reader.readexactly(wire.NONCE_BYTES)
        nonce_r = wire.new_nonce()
        await self.write(self.opening(nonce_g, nonce_r, self.name, secret))
        answer = await self.reader.readexactly(wire.MAC_BYTES)
        assert wire.proofs_match(answer, wire.gateway_proof(secret, nonce_r, nonce_g))

    @staticmethod
    def opening(nonce_g: bytes, nonce_r: bytes, name: str, secret: str) -> bytes:
        proof = wire.replica_proof(secret, nonce_g, nonce_r, name)
        return nonce_r + proof + wire.pack(name.encode())

    async def write(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def send(self, *deltas: TokenDelta, load: ReplicaLoad | None = None) -> None:
        await self.write(wire.pack(encode(StepFrame(load or ReplicaLoad(), list(deltas)))))

    async def beat(self, load: ReplicaLoad | None = None) -> None:
        """Send a heartbeat: from the first on, silence is the replica's loss."""
        await self.send(load=load)

    async def closed(self) -> None:
        """Wait until the gateway has closed the connection."""
        with suppress(ConnectionError):
            async with asyncio.timeout(10):
                while await self.reader.read(1024):
                    pass
        await self.close()

    async def close(self) -> None:
        self.writer.close()
        with suppress(ConnectionError):
            await self.writer.wait_closed()

    async def lose(self) -> None:
        """Break the connection, as the death of the process does."""
        self.writer.transport.abort()
        with suppress(ConnectionError):
            await self.writer.wait_closed()


class Attempt:
    """One dispatched generation, on a replica of its own."""

    def __init__(self, generation: Generation, route: Route, name: str) -> None:
        self.generation = generation
        self.name = name
        self.cancelled = False
        self._route = route
        self._replica: FakeReplica | None = None

    def offered(self) -> None:
        """Be the replica that was chosen."""
        self._route.offered(self.name)

    async def take(self) -> FakeReplica:
        self._replica = await FakeReplica.connect(self.generation.reply_to, self.name)
        await self._replica.send(TokenDelta(self.generation.generation_id, []))
        return self._replica

    async def send(self, *token_ids: int, finish: FinishReason | None = None) -> None:
        assert self._replica is not None
        delta = TokenDelta(self.generation.generation_id, list(token_ids), finish)
        await self._replica.send(delta)

    async def die(self) -> bytes:
        assert self._replica is not None
        await self._replica.lose()
        raise ReplicaLostError("The engine replica was lost.")

    async def close(self) -> None:
        if self._replica is not None:
            await self._replica.close()


Script = Callable[[Attempt], Awaitable[bytes]]


def ended(finish: FinishReason = FinishReason.LENGTH, tokens: int = 0) -> bytes:
    return encode(GenerationEnd(finish, tokens))


class ScriptedHandle:
    """A `ModelHandle` whose n-th call does what the n-th script says; the last one repeats."""

    def __init__(self, *scripts: Script) -> None:
        self._scripts = scripts
        self.attempts: list[Attempt] = []

    async def resume(self, generation: Generation, inbox: Inbox, route: Route) -> bool:
        del generation, inbox, route
        return False

    async def generate(self, generation: bytes, route: Route) -> bytes:
        number = len(self.attempts)
        attempt = Attempt(decode_generation(generation), route, f"replica-{number}")
        self.attempts.append(attempt)
        try:
            return await self._scripts[min(number, len(self._scripts) - 1)](attempt)
        except asyncio.CancelledError:
            attempt.cancelled = True
            raise

    async def close(self) -> None:
        for attempt in self.attempts:
            await attempt.close()


class EngineHandle:
    """A `ModelHandle` over an engine in this process, with the real token channel between.

    The n-th dispatch goes to a replica of its own that is lost after `deaths[n]` tokens.
    """

    def __init__(self, engine: TextEngine, deaths: list[int] | None = None) -> None:
        self._engine = engine
        self._deaths = deaths or []
        self._transports: list[asyncio.Transport] = []
        self.dispatched: list[Generation] = []

    async def resume(self, generation: Generation, inbox: Inbox, route: Route) -> bool:
        del generation, inbox, route
        return False

    async def generate(self, generation: bytes, route: Route) -> bytes:
        asked = decode_generation(generation)
        number = len(self.dispatched)
        self.dispatched.append(asked)
        dies_after = self._deaths[number] if number < len(self._deaths) else None
        transport, link = await asyncio.get_running_loop().create_connection(
            lambda: GatewayLink(f"replica-{number}", SECRET, self._engine.load), *asked.reply_to
        )
        self._transports.append(transport)
        await link.ready
        link.send(TokenDelta(asked.generation_id, []))
        sent = 0
        async with aclosing(streamed(self._engine, asked)) as deltas:
            async for delta in deltas:
                if dies_after is not None and sent >= dies_after:
                    transport.abort()
                    raise ReplicaLostError("The engine replica was lost.")
                sent += len(delta.token_ids)
                link.send(delta)
                if delta.finish_reason is not None:
                    return ended(delta.finish_reason, sent)
        raise AssertionError("the engine ended without a reason")

    def close(self) -> None:
        for transport in self._transports:
            transport.abort()


@pytest_asyncio.fixture
async def receiver() -> AsyncGenerator[TokenReceiver]:
    async with TokenReceiver(HOST, SECRET) as receiver:
        yield receiver

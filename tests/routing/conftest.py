"""Replicas that the tests own: they speak the token channel and fail as they are told."""

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial

import pytest
import pytest_asyncio
import uvloop
from tests.routing.stages import Going, Stage

from tera import wire
from tera.engine.link import GatewayLink
from tera.errors import ReplicaLostError, TeraError
from tera.generation import (
    Abort,
    Begin,
    FinishReason,
    GenerationFailure,
    Order,
    ReplicaLoad,
    StepFrame,
    TokenDelta,
    decode_order,
    encode,
)
from tera.routing import loss
from tera.routing.fleet import Changed, Fleet, Seat
from tera.routing.link import ReplicaLinks
from tera.routing.switchboard import Route, Switchboard

SECRET = "the secret of this cluster"  # noqa: S105  of nobody else
HOST = "127.0.0.1"
MANY = 1000
"""Of generations: the capacity of a replica that is never full."""
Address = tuple[str, int]


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
        cls, address: Address, name: str = "replica", secret: str = SECRET
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
        await self.check_proof(nonce_g, nonce_r, secret)

    async def check_proof(self, nonce_g: bytes, nonce_r: bytes, secret: str = SECRET) -> None:
        """Read the gateway's answer to an opening."""
        answer = await self.reader.readexactly(wire.MAC_BYTES)
        assert wire.proofs_match(answer, wire.gateway_proof(secret, nonce_r, nonce_g))

    @staticmethod
    def opening(nonce_g: bytes, nonce_r: bytes, name: str, secret: str) -> bytes:
        proof = wire.replica_proof(secret, nonce_g, nonce_r, name)
        return nonce_r + proof + wire.pack(name.encode())

    async def order(self) -> Order:
        """Return the gateway's next order.

        Raises:
            IncompleteReadError: the gateway has closed the connection.
        """
        length = int.from_bytes(await self.reader.readexactly(wire.LENGTH_BYTES), "little")
        return decode_order(await self.reader.readexactly(length))

    async def begin(self) -> Begin:
        """Return the gateway's next order, which is to begin a generation."""
        order = await self.order()
        assert isinstance(order, Begin), order
        return order

    async def abort(self) -> int:
        """Return which generation the gateway's next order stops."""
        order = await self.order()
        assert isinstance(order, Abort), order
        return order.generation_id

    async def write(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def send(
        self,
        *deltas: TokenDelta,
        load: ReplicaLoad | None = None,
        failures: Sequence[GenerationFailure] = (),
        refused: Sequence[int] = (),
        draining: bool = False,
    ) -> None:
        """Send one frame."""
        frame = StepFrame(
            load or ReplicaLoad(), list(deltas), list(failures), list(refused), draining
        )
        await self.write(wire.pack(encode(frame)))

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


class Heard:
    """A `Listener` that keeps what it hears."""

    def __init__(self) -> None:
        self.deltas: list[TokenDelta] = []
        self.error: TeraError | None = None
        self.refused = False

    def receive(self, delta: TokenDelta) -> None:
        self.deltas.append(delta)

    def fail(self, error: TeraError) -> None:
        assert self.error is None, "the first error of a generation is its only one"
        self.error = error

    def refuse(self) -> None:
        self.refused = True

    @property
    def token_ids(self) -> list[int]:
        return [token_id for delta in self.deltas for token_id in delta.token_ids]

    @property
    def finish_reason(self) -> FinishReason | None:
        return self.deltas[-1].finish_reason if self.deltas else None


class RecordingWatcher:
    """Keeps what it hears of replicas."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def report(self, replica_id: str, load: ReplicaLoad) -> None:
        self.heard.append(f"{replica_id} has {load.running + load.waiting}")

    def connected(self, replica_id: str) -> None:
        self.heard.append(f"{replica_id} connected")

    def lost(self, replica_id: str) -> None:
        self.heard.append(f"{replica_id} lost")

    def draining(self, replica_id: str) -> None:
        self.heard.append(f"{replica_id} drains")


class RecordingWorker:
    """A `Worker` that keeps its orders and carries none out."""

    def __init__(self) -> None:
        self.figures = ReplicaLoad()
        self.orders: list[Order] = []
        self.gone: list[GatewayLink] = []

    def load(self) -> ReplicaLoad:
        return self.figures

    def obey(self, link: GatewayLink, order: Order) -> None:
        self.orders.append(order)

    def lost(self, link: GatewayLink) -> None:
        self.gone.append(link)


class FakeServe:
    """Ray Serve as a `Fleet` sees it: calls replicas, and counts what waits."""

    def __init__(self) -> None:
        self.replicas: dict[str, Callable[[Address], Awaitable[None]]] = {}
        """What each replica does that is asked to connect; who is not here is gone."""
        self.asked: list[str] = []
        """Who was asked to connect, in order."""
        self.waiting = 0
        self.most_waiting = 0
        self.running: Counter[str] = Counter()
        """The seats that are taken at each replica, of which Serve hears from the replica."""

    async def connect(self, replica: str, host: str, port: int) -> None:
        self.asked.append(replica)
        if replica not in self.replicas:
            raise ReplicaLostError("The engine replica was taken away.")
        await self.replicas[replica]((host, port))

    @contextmanager
    def queued(self) -> Iterator[None]:
        self.waiting += 1
        self.most_waiting = max(self.most_waiting, self.waiting)
        try:
            yield
        finally:
            self.waiting -= 1

    def seated(self, replica: str) -> None:
        self.running[replica] += 1

    def left(self, replica: str) -> None:
        self.running[replica] -= 1

    @property
    def idle(self) -> bool:
        """Whether every generation that was counted is counted no more."""
        return self.waiting == 0 and not any(self.running.values())


class CountedFleet(Fleet):
    """Has the seats counted that it gives."""

    def __init__(
        self, links: ReplicaLinks, switchboard: Switchboard, serve: Callable[[Changed], FakeServe]
    ) -> None:
        super().__init__(links, switchboard, lambda changed: self._attached(serve(changed)))

    def _attached(self, serve: FakeServe) -> FakeServe:
        self._counts = serve
        return serve

    def _seat(self, replica_id: str, route: Route) -> Seat | None:
        seat = super()._seat(replica_id, route)
        if seat is not None:
            self._counts.seated(replica_id)
        return seat

    def left(self, replica_id: str, refused_at: int | None) -> None:
        self._counts.left(replica_id)
        super().left(replica_id, refused_at)


class Attempt:
    """One generation that a fake replica was sent, and what the replica says about it."""

    def __init__(self, replica: FakeReplica, begin: Begin) -> None:
        self.replica = replica
        self.generation = begin.generation
        self.room = begin.most_ongoing
        self.aborted = asyncio.Event()
        """The gateway has told the replica to stop it."""

    async def take(self) -> None:
        """Say «I have it»."""
        await self.send()

    async def send(self, *token_ids: int, finish: FinishReason | None = None) -> None:
        delta = TokenDelta(self.generation.generation_id, list(token_ids), finish)
        await self.replica.send(delta)

    async def fail(self, fault: str | None = None, param: str | None = None) -> None:
        """Take it and fail it, which engines may do in one frame."""
        number = self.generation.generation_id
        failure = GenerationFailure(number, "The engine cannot go on.", fault, param)
        await self.replica.send(TokenDelta(number, []), failures=[failure])

    async def refuse(self) -> None:
        await self.replica.send(refused=[self.generation.generation_id])

    async def die(self) -> None:
        """End the replica; others that it runs end with it."""
        await self.replica.lose()


class FakeModel:
    """A model whose replicas are fakes that connect when Serve is told to have them do so.

    One that is lost is asked again, and connects again, unless it is taken out of `serve.replicas`.
    """

    def __init__(self, links: ReplicaLinks) -> None:
        self.links = links
        self.serve = FakeServe()
        self.switchboard = Switchboard()
        self.fleet = CountedFleet(links, self.switchboard, lambda _: self.serve)
        self.replicas: dict[str, FakeReplica] = {}
        """Those that have connected, the latest of each name."""
        self._begun: asyncio.Queue[Attempt] = asyncio.Queue()
        self._readers: dict[asyncio.Task[None], FakeReplica] = {}

    async def start(self, *names: str, room: int = MANY) -> None:
        """Have Serve run these replicas, and wait until all are connected."""
        for name in names:
            self.serve.replicas.setdefault(name, partial(self._connect, name))
        self.fleet.changed(dict.fromkeys(names, room))
        await until(lambda: all(self.links.find(name) for name in names))
        await until(lambda: not self.fleet._contacts)

    async def begun(self) -> Attempt:
        """Return the next generation that a replica is sent."""
        async with asyncio.timeout(10):
            return await self._begun.get()

    @property
    def nothing_begun(self) -> bool:
        """Whether no replica was sent anything that `begun` has not returned."""
        return self._begun.empty()

    @property
    def idle(self) -> bool:
        """Whether nothing waits and every room that was taken was given back."""
        boards = self.switchboard._replicas.values()
        return self.serve.idle and all(each.mine == 0 for each in boards)

    async def _connect(self, name: str, address: Address) -> None:
        replica = await FakeReplica.connect(address, name)
        self.replicas[name] = replica
        self._readers[asyncio.create_task(self._read(replica))] = replica

    async def _read(self, replica: FakeReplica) -> None:
        attempts: dict[int, Attempt] = {}
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                order = await replica.order()
                if isinstance(order, Begin):
                    attempt = attempts[order.generation.generation_id] = Attempt(replica, order)
                    self._begun.put_nowait(attempt)
                else:
                    attempts[order.generation_id].aborted.set()

    async def close(self) -> None:
        self.fleet.changed({})
        tasks = [*self.fleet._contacts.values(), *self._readers]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for replica in self._readers.values():
            await replica.close()


async def passed(seconds: float) -> None:
    """Wait until the loop's clock says that so much has passed."""
    loop = asyncio.get_running_loop()
    ends = loop.time() + seconds
    await until(lambda: loop.time() >= ends)


async def die_after(attempt: Attempt, going: Going, *token_ids: int) -> None:
    """Take a generation and die once the gateway has read so much of it."""
    await attempt.take()
    count = len(going.sink.token_ids) + len(token_ids)
    if token_ids:
        await attempt.send(*token_ids)
    await until(lambda: going.run._taken_at is not None and len(going.sink.token_ids) == count)
    await attempt.die()


async def live(attempt: Attempt, *token_ids: int) -> None:
    await attempt.take()
    await attempt.send(*token_ids, finish=FinishReason.LENGTH)


@pytest_asyncio.fixture
async def links() -> AsyncGenerator[ReplicaLinks]:
    async with ReplicaLinks(HOST, SECRET) as links:
        yield links


@pytest_asyncio.fixture
async def model(links: ReplicaLinks) -> AsyncGenerator[FakeModel]:
    model = FakeModel(links)
    yield model
    await model.close()


@pytest.fixture
def stage(model: FakeModel) -> Stage:
    return Stage(model.fleet, model.links)


@pytest.fixture
def deaths_far_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no loss count as soon after the take: it was not the request."""
    monkeypatch.setattr(loss, "POISON_WINDOW_S", -1)

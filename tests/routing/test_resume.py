"""Generations that go on at another replica over the token channel, past Serve."""

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing, contextmanager

import pytest
import pytest_asyncio
from tests.routing.conftest import SECRET, until

from tera.engine.channel import TokenSender
from tera.engine.runs import Runs
from tera.engine.simulated import SimulatedEngine
from tera.errors import BackendFailureError
from tera.generation import Generation, Sampling, decode_generation, encode
from tera.routing import dispatch
from tera.routing.channel import Inbox, TokenReceiver
from tera.routing.dispatch import Attempts, Dispatcher, DispatchLimits
from tera.routing.resume import resume
from tera.routing.switchboard import Route, Share, Switchboard

PROMPT = [*range(1, 100)]
SAMPLING = Sampling(max_tokens=60, temperature=0)
LIMITS = DispatchLimits(
    deadline_s=60, first_token_deadline_s=60, cold_start_deadline_s=60, retries=2
)


class Replica:
    """An engine replica in this process, as `EngineReplica` is one."""

    def __init__(self, name: str, engine: SimulatedEngine) -> None:
        self.name = name
        self.engine = engine
        self.runs = Runs(engine)
        self.sender = TokenSender(name, SECRET, engine.load, self.runs.obey)

    async def connect(self, address: tuple[str, int]) -> None:
        await self.sender.link(address)

    async def die(self, address: tuple[str, int]) -> None:
        link = await self.sender.link(address)
        assert link._transport is not None
        link._transport.abort()


class Fleet:
    """A `ModelHandle` over replicas in this process; its `resume` is the real one."""

    def __init__(self, receiver: TokenReceiver) -> None:
        self.receiver = receiver
        self.switchboard = Switchboard()
        self.replicas: dict[str, Replica] = {}
        self.called: list[str] = []
        """Who got a call such as Serve's, in order."""
        self.counted: Counter[str] = Counter()
        """What Serve is told of that runs without a call, by replica."""

    async def add(self, *names: str, connected: bool = True, step_s: float = 0.002) -> None:
        for name in names:
            profile = {"decode_step_s": step_s, "prefill_tokens_per_s": 0}
            engine = await SimulatedEngine.launch({"profile": dict(profile)}, stall_s=60)
            self.replicas[name] = Replica(name, engine)
            if connected:
                await self.replicas[name].connect(self.receiver.address)
            self.receiver.watch(name, self.switchboard)
        self.switchboard.set_replicas(dict.fromkeys(self.replicas, 64))

    async def lose(self, name: str) -> None:
        """Kill a replica, of which Serve tells later."""
        await self.replicas[name].die(self.receiver.address)

    async def generate(self, generation: bytes, route: Route) -> bytes:
        asked = decode_generation(generation)
        replica = self.replicas[await self.switchboard.take(route)]
        self.called.append(replica.name)
        try:
            route.offered(replica.name)
            link = await replica.sender.link(asked.reply_to)
            return encode(await replica.runs.run(asked, link))
        finally:
            self.switchboard.release(replica.name)

    async def resume(self, generation: Generation, inbox: Inbox, route: Route) -> bool:
        return await resume(
            self.switchboard, self.receiver, generation, inbox, route, self._counted
        )

    @contextmanager
    def _counted(self, replica_id: str) -> Iterator[None]:
        self.counted[replica_id] += 1
        try:
            yield
        finally:
            self.counted[replica_id] -= 1

    def running(self) -> int:
        return sum(replica.engine.load().running for replica in self.replicas.values())

    async def close(self) -> None:
        for replica in self.replicas.values():
            await replica.sender.close()
            await replica.engine.close()


@pytest_asyncio.fixture
async def fleet(receiver: TokenReceiver) -> AsyncGenerator[Fleet]:
    fleet = Fleet(receiver)
    yield fleet
    await fleet.close()


async def read(
    fleet: Fleet, attempts: Attempts, on_token: Callable[[int], object] = lambda _: None
) -> list[int]:
    """Return a generation's tokens; `on_token` is told how many there are."""
    dispatcher = Dispatcher(fleet, fleet.receiver, LIMITS)
    found: list[int] = []
    run = dispatcher.run("request", Share("tenant"), PROMPT, SAMPLING, attempts)
    async with asyncio.timeout(30), aclosing(run) as deltas:
        async for delta in deltas:
            found += delta.token_ids
            told = on_token(len(found))
            if asyncio.iscoroutine(told):
                await told
    return found


async def test_b2_a_lost_generation_goes_on_without_a_call(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "POISON_WINDOW_S", -1.0)  # two deaths at once are meant here
    await fleet.add("a", "b", "c")
    undisturbed = await read(fleet, Attempts())
    fleet.called.clear()
    lost: list[str] = []

    async def kill(count: int) -> None:
        """Kill whoever has it, twice."""
        if count in (10, 30):
            (victim,) = [
                name for name, each in fleet.replicas.items() if each.engine.load().running
            ]
            lost.append(victim)
            await fleet.lose(victim)
        if count in (20, 40):
            assert +fleet.counted == {
                name: 1 for name, each in fleet.replicas.items() if each.engine.load().running
            }

    attempts = Attempts()
    assert await read(fleet, attempts, kill) == undisturbed
    assert attempts.replica_switches == len(set(lost)) == 2
    assert len(fleet.called) == 1
    await until(lambda: fleet.running() == 0)
    await until(lambda: not +fleet.counted)


async def test_where_nobody_is_connected_a_call_is_made(fleet: Fleet) -> None:
    await fleet.add("a")
    undisturbed = await read(fleet, Attempts())

    async def kill(count: int) -> None:
        if count == 10:
            await fleet.add("new", connected=False)
            await fleet.lose("a")

    assert await read(fleet, Attempts(), kill) == undisturbed
    assert fleet.called == ["a", "a", "new"]


async def test_a_client_that_leaves_stops_what_was_resumed_and_frees_its_place(
    fleet: Fleet,
) -> None:
    await fleet.add("a", "b", step_s=0.02)
    resumed = asyncio.Event()

    async def kill(count: int) -> None:
        if count == 5:
            await fleet.lose(fleet.called[0])
        if count == 8:
            resumed.set()

    reading = asyncio.create_task(read(fleet, Attempts(), kill))
    await resumed.wait()
    assert fleet.running() == 1
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    await until(lambda: fleet.running() == 0)
    await until(lambda: all(each.mine == 0 for each in fleet.switchboard._replicas.values()))
    assert not +fleet.counted


async def test_an_engine_that_fails_what_it_resumed_says_so(fleet: Fleet) -> None:
    await fleet.add("a", "b")
    faulty = await SimulatedEngine.launch(
        {"profile": {"decode_step_s": 0.002}, "faults": {"fail_after_tokens": 3}}, stall_s=60
    )
    await fleet.replicas["b"].engine.close()
    fleet.replicas["b"] = Replica("b", faulty)
    await fleet.replicas["b"].connect(fleet.receiver.address)
    # Not chosen at first.
    fleet.switchboard.suspect("b")

    async def kill(count: int) -> None:
        if count == 10:
            fleet.switchboard.trust("b")
            await fleet.lose("a")

    with pytest.raises(BackendFailureError, match="repeatedly"):
        await read(fleet, Attempts(), kill)
    assert fleet.called == ["a"]
    await until(lambda: fleet.running() == 0)


async def test_a_draining_replica_waits_for_what_it_resumed(fleet: Fleet) -> None:
    await fleet.add("a", "b", step_s=0.005)
    drained: list[asyncio.Task[None]] = []
    waits: list[bool] = []

    async def kill(count: int) -> None:
        if count == 5:
            await fleet.lose(fleet.called[0])
        if count == 20:
            (other,) = fleet.replicas.keys() - {fleet.called[0]}
            drained.append(asyncio.create_task(fleet.replicas[other].runs.drained(20)))
        if count > 20:
            waits.append(not drained[0].done())

    await read(fleet, Attempts(), kill)
    await asyncio.gather(*drained)
    assert waits[:-1]
    assert all(waits[:-1])  # it may be done when the last token is read

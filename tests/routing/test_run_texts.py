"""Generations of the simulated engine over replicas that die: every text is whole."""

import asyncio
import random
from collections.abc import AsyncGenerator

import pytest
import pytest_asyncio
from tests.routing.conftest import FakeServe, passed, until
from tests.routing.engines import EngineFleet, EngineReplica
from tests.routing.stages import Sink, Stage, limits

from tera.engine.simulated import SimulatedEngine
from tera.generation import FinishReason, Sampling
from tera.routing import fleet as fleet_module
from tera.routing.fleet import Fleet
from tera.routing.link import ReplicaLinks
from tera.routing.switchboard import Switchboard

SAMPLINGS = [
    pytest.param(Sampling(max_tokens=40, temperature=0, logprobs=2), id="greedy"),
    pytest.param(Sampling(max_tokens=40, seed=5, logprobs=2), id="seeded"),
]
STORY = b"Once upon a time"


@pytest_asyncio.fixture
async def engine() -> AsyncGenerator[SimulatedEngine]:
    profile = {"decode_step_s": 0, "prefill_tokens_per_s": 0}
    engine = await SimulatedEngine.launch({"profile": dict(profile)}, stall_s=60)
    yield engine
    await engine.close()


async def told(
    engine: SimulatedEngine, sampling: Sampling, deaths: list[int]
) -> tuple[Sink, EngineFleet]:
    """Return what is read of a generation whose replicas die after so many tokens."""
    async with EngineFleet(engine, deaths) as replicas:
        stage = Stage(replicas.fleet, replicas.links, limits(retries=len(deaths)))
        going = stage.go(sampling, prompt=STORY)
        await going.end()
        assert replicas.serve.idle
        assert replicas.serve.most_waiting == 0
    return going.sink, replicas


@pytest.mark.parametrize("sampling", SAMPLINGS)
async def test_b2_a_death_at_any_token_changes_nothing(
    engine: SimulatedEngine, sampling: Sampling
) -> None:
    whole, _ = await told(engine, sampling, [])
    assert len(whole.token_ids) == sampling.max_tokens
    for cut in range(sampling.max_tokens + 1):
        sink, replicas = await told(engine, sampling, [cut])
        assert sink.token_ids == whole.token_ids, cut
        assert sink.logprobs == whole.logprobs, cut
        assert sink.finish_reasons == whole.finish_reasons, cut
        # Tokens and their frames may be lost together with the replica, so fewer are resumed.
        for asked in replicas.dispatched[1:]:
            assert asked.token_ids[len(STORY) :] == whole.token_ids[: asked.resumed_tokens]
            assert asked.sampling.max_tokens == sampling.max_tokens - asked.resumed_tokens


async def test_b2_two_deaths_at_any_tokens_change_nothing(
    engine: SimulatedEngine, deaths_far_apart: None
) -> None:
    sampling = Sampling(max_tokens=10, temperature=0)
    whole, _ = await told(engine, sampling, [])
    for first in range(sampling.max_tokens):
        for second in range(sampling.max_tokens - first):
            sink, _ = await told(engine, sampling, [first, second])
            assert sink.token_ids == whole.token_ids, (first, second)
            assert sink.finish_reasons == whole.finish_reasons, (first, second)


async def test_b2_the_end_of_the_text_is_where_it_was(engine: SimulatedEngine) -> None:
    sampling = Sampling(max_tokens=1000, temperature=0)
    whole, _ = await told(engine, sampling, [])
    assert whole.finish_reasons == [FinishReason.STOP]
    tokens = len(whole.token_ids)
    for cut in (0, 1, tokens // 2, tokens - 2, tokens - 1):
        sink, _ = await told(engine, sampling, [cut])
        assert sink.token_ids == whole.token_ids, cut
        assert sink.finish_reasons == [FinishReason.STOP]


class Platform:
    """Engine replicas that a test kills and drains, and Serve starts others in their place."""

    def __init__(self, links: ReplicaLinks) -> None:
        self.links = links
        self.serve = FakeServe()
        self.fleet = Fleet(links, Switchboard(), lambda _: self.serve)
        self.replicas: list[EngineReplica] = []
        self._all: list[EngineReplica] = []

    async def scale(self, count: int, *, room: int, step_s: float = 0.0) -> None:
        while len(self.replicas) < count:
            profile = {"decode_step_s": step_s, "prefill_tokens_per_s": 0}
            engine = await SimulatedEngine.launch({"profile": dict(profile)}, stall_s=60)
            replica = EngineReplica(f"replica-{len(self._all)}", engine)
            self.serve.replicas[replica.name] = replica.connect
            self.replicas.append(replica)
            self._all.append(replica)
        self.fleet.changed({replica.name: room for replica in self.replicas})

    @property
    def ongoing(self) -> int:
        return sum(replica.runs.ongoing for replica in self._all)

    async def close(self) -> None:
        self.fleet.changed({})
        for replica in self._all:
            await replica.links.close()
            await replica.engine.close()


@pytest_asyncio.fixture
async def platform(
    links: ReplicaLinks, monkeypatch: pytest.MonkeyPatch
) -> AsyncGenerator[Platform]:
    monkeypatch.setattr(fleet_module, "CONTACT_INTERVAL_S", 0.001)
    platform = Platform(links)
    yield platform
    await platform.close()


@pytest.mark.parametrize("seed", range(3))
async def test_whatever_happens_every_answer_is_whole_and_nothing_is_left_behind(
    platform: Platform, deaths_far_apart: None, seed: int
) -> None:
    """Kill, drain and break connections under load, while clients come and hang up."""
    drawn = random.Random(seed)
    room = 6
    await platform.scale(3, room=room, step_s=0.001)
    stage = Stage(platform.fleet, platform.links, limits(retries=50, deadline_s=300))
    stage.dispatcher.budget._balance = 1000
    undisturbed = stage.go(Sampling(max_tokens=30, temperature=0))
    await undisturbed.end()
    waiting: list[asyncio.Task[None]] = []

    async def client() -> None:
        going = stage.go(Sampling(max_tokens=30, temperature=0))
        if drawn.random() < 0.3:
            await passed(drawn.random() * 0.05)
            if not going.task.done():
                await going.cancel()
            return
        await going.end()
        assert going.sink.token_ids == undisturbed.sink.token_ids
        assert going.sink.finish_reasons == undisturbed.sink.finish_reasons

    async def disturb(victim: EngineReplica) -> None:
        match drawn.choice(["kill", "drain", "cut"]):
            case "kill":
                platform.replicas.remove(victim)
                victim.die()
            case "drain":
                platform.replicas.remove(victim)
                await victim.drain(drawn.choice([0.0, 0.01, 5.0]))
            case "cut":
                victim.die()
                victim.dead = False

    for _ in range(12):
        waiting += [asyncio.create_task(client()) for _ in range(room * 2)]
        await passed(drawn.random() * 0.03)
        await disturb(drawn.choice(platform.replicas))
        await platform.scale(3, room=room, step_s=0.001)
    async with asyncio.timeout(60):
        await asyncio.gather(*waiting)
    assert platform.serve.idle
    assert stage.dispatcher.queue.waiting == 0
    await until(lambda: platform.ongoing == 0)
    assert all(each.mine == 0 for each in platform.fleet.switchboard._replicas.values())

"""The bounded queue before a model's replicas."""

import asyncio

import pytest
from tests.routing.conftest import FakeModel, until

from tera.errors import EngineOverloadedError
from tera.generation import FinishReason, Sampling, TokenDelta
from tera.routing.queue import LONGEST_WAIT_S, SHORTEST_WAIT_S, Place, Queue
from tera.routing.run import Dispatcher, DispatchLimits, Work
from tera.routing.switchboard import Share


class Clock:
    """Seconds that only the test moves."""

    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_b4_a_full_queue_refuses_and_a_place_given_up_is_free_again() -> None:
    queue = Queue(2, Clock())
    first, _ = queue.enter("tenant"), queue.enter("tenant")
    with pytest.raises(EngineOverloadedError) as refused:
        queue.enter("tenant")
    assert refused.value.retry_after_s == SHORTEST_WAIT_S
    first.leave()
    first.leave()
    assert queue.waiting == 1
    queue.enter("tenant")
    with pytest.raises(EngineOverloadedError):
        queue.enter("tenant")


def wait_s(queue: Queue) -> float:
    with pytest.raises(EngineOverloadedError) as refused:
        queue.enter("tenant")
    assert refused.value.retry_after_s is not None
    return refused.value.retry_after_s


def test_b4_the_told_wait_follows_the_rate_at_which_replicas_take() -> None:
    clock = Clock()
    queue = Queue(100, clock)
    for _ in range(50):
        queue.enter("tenant").leave(taken=True)
        clock.now_s += 0.2
    for _ in range(100):
        queue.enter("tenant")
    assert wait_s(queue) == pytest.approx(50 * 0.2, rel=0.05)
    clock.now_s += 10  # nothing has been taken since
    assert wait_s(queue) == pytest.approx(50 * 0.4, rel=0.05)
    clock.now_s += 1000
    assert wait_s(queue) == LONGEST_WAIT_S


class Sink:
    """Keeps what a generation brings."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []

    def push(self, delta: TokenDelta) -> bool:
        self.token_ids += delta.token_ids
        return False


class HeldModel:
    """A model whose replica is there when it may be, and then ends each generation at once."""

    def __init__(self, model: FakeModel, most_queued: int) -> None:
        self._model = model
        limits = DispatchLimits(60, 60, 60, retries=0, most_queued=most_queued)
        self.dispatcher = Dispatcher(model.fleet, model.links, limits)

    def go(self, tenant: str) -> asyncio.Task[list[int]]:
        return asyncio.create_task(self.run(tenant))

    async def run(self, tenant: str) -> list[int]:
        sink, arrived = Sink(), asyncio.get_running_loop().time()
        work = Work("request", arrived, Share(tenant), [1, 2], Sampling(max_tokens=1), "")
        await self.dispatcher.run(work, sink).to_end()
        return sink.token_ids

    async def answer(self, count: int) -> None:
        await self._model.start("a")
        for _ in range(count):
            await (await self._model.begun()).send(1, finish=FinishReason.LENGTH)


async def test_b4_a_generation_waits_until_a_replica_takes_it(model: FakeModel) -> None:
    held = HeldModel(model, most_queued=2)
    waiting = [held.go("tenant") for _ in range(2)]
    await until(lambda: model.serve.waiting == 2)
    with pytest.raises(EngineOverloadedError):
        await held.run("tenant")
    assert model.serve.waiting == 2
    await held.answer(2)
    assert await asyncio.gather(*waiting) == [[1], [1]]
    following = held.go("tenant")
    await held.answer(1)
    assert await following == [1]
    assert model.idle


async def test_b4_what_runs_has_no_place_in_the_queue(model: FakeModel) -> None:
    held = HeldModel(model, most_queued=1)
    await model.start("a")
    running = [held.go("tenant") for _ in range(5)]
    await until(lambda: model.serve.running["a"] == 5)
    assert held.dispatcher.queue.waiting == 0
    await held.answer(5)
    assert await asyncio.gather(*running) == [[1]] * 5


async def test_b4_who_gives_up_waiting_leaves_the_queue(model: FakeModel) -> None:
    held = HeldModel(model, most_queued=1)
    for _ in range(3):
        waiting = held.go("tenant")
        await until(lambda: model.serve.waiting == 1)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
    assert held.dispatcher.queue.waiting == 0
    assert model.idle


def is_kept(place: Place) -> bool:
    try:
        with place.held():
            return True
    except EngineOverloadedError:
        return False


async def test_b4_a_flood_makes_room_for_others_and_not_for_itself() -> None:
    queue = Queue(4, Clock())
    flood = [queue.enter("flood") for _ in range(4)]
    with pytest.raises(EngineOverloadedError):
        queue.enter("flood")
    queue.enter("guest")
    assert [is_kept(place) for place in flood] == [True, True, True, False]  # the latest
    queue.enter("guest")
    assert [is_kept(place) for place in flood] == [True, True, False, False]
    with pytest.raises(EngineOverloadedError):
        queue.enter("guest")  # as many as the flood has: no reason to prefer it
    assert queue.waiting == 4
    flood[3].leave()
    assert queue.waiting == 4


async def test_b4_who_loses_its_place_to_another_tenant_hears_of_it(model: FakeModel) -> None:
    held = HeldModel(model, most_queued=2)
    flood = [held.go("flood") for _ in range(2)]
    await until(lambda: model.serve.waiting == 2)
    guest = held.go("guest")
    with pytest.raises(EngineOverloadedError) as refused:
        await flood[1]
    assert refused.value.retry_after_s is not None
    assert model.serve.waiting == 2
    await held.answer(2)
    assert [await flood[0], await guest] == [[1], [1]]
    assert model.idle


async def test_b4_who_is_given_a_replica_as_it_loses_its_place_gives_it_back(
    model: FakeModel,
) -> None:
    held = HeldModel(model, most_queued=2)
    await model.start("a", room=1)
    first = held.go("flood")
    attempt = await model.begun()
    flood = [held.go("flood") for _ in range(2)]
    await until(lambda: model.serve.waiting == 2)
    model.fleet.changed({"a": 3})  # both of `flood` are given the seat, and have not run yet
    held.dispatcher.queue.enter("guest")
    with pytest.raises(EngineOverloadedError):
        await flood[1]
    assert model.serve.running == {"a": 2}
    await attempt.send(1, finish=FinishReason.LENGTH)
    await held.answer(1)
    assert [await first, await flood[0]] == [[1], [1]]
    assert model.idle


async def test_b4_a_client_that_hangs_up_as_it_loses_its_place_is_a_client_that_hung_up(
    model: FakeModel,
) -> None:
    held = HeldModel(model, most_queued=2)
    flood = [held.go("flood") for _ in range(2)]
    await until(lambda: model.serve.waiting == 2)
    held.dispatcher.queue.enter("guest")
    flood[1].cancel()
    with pytest.raises(asyncio.CancelledError):
        await flood[1]
    flood[0].cancel()
    await asyncio.wait(flood)
    assert model.idle

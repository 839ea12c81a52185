"""The bounded queue before a model's replicas."""

import asyncio
from contextlib import aclosing

import pytest
from tests.routing.conftest import Attempt, ScriptedHandle, ended, until

from tera.errors import EngineOverloadedError
from tera.generation import FinishReason, Sampling
from tera.routing.channel import TokenReceiver
from tera.routing.dispatch import Attempts, Dispatcher, DispatchLimits
from tera.routing.queue import LONGEST_WAIT_S, SHORTEST_WAIT_S, Queue
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


class HeldModel:
    """A model whose replicas take nothing until they may, and then end each at once."""

    def __init__(self, receiver: TokenReceiver, most_queued: int) -> None:
        self.may_take = asyncio.Event()
        self.handle = ScriptedHandle(self._script)
        limits = DispatchLimits(60, 60, 60, retries=0, most_queued=most_queued)
        self._dispatcher = Dispatcher(self.handle, receiver, limits)

    async def _script(self, attempt: Attempt) -> bytes:
        await self.may_take.wait()
        await attempt.take()
        await attempt.send(1, finish=FinishReason.LENGTH)
        return ended()

    async def run(self, tenant: str) -> list[int]:
        sampling = Sampling(max_tokens=1)
        deltas = self._dispatcher.run("request", Share(tenant), [1, 2], sampling, Attempts())
        async with aclosing(deltas):
            return [token_id async for delta in deltas for token_id in delta.token_ids]


async def test_b4_a_generation_waits_until_a_replica_takes_it(receiver: TokenReceiver) -> None:
    model = HeldModel(receiver, most_queued=2)
    waiting = [asyncio.create_task(model.run("tenant")) for _ in range(2)]
    await until(lambda: len(model.handle.attempts) == 2)
    with pytest.raises(EngineOverloadedError):
        await model.run("tenant")
    assert len(model.handle.attempts) == 2
    model.may_take.set()
    assert await asyncio.gather(*waiting) == [[1], [1]]
    assert await model.run("tenant") == [1]
    await model.handle.close()


async def test_b4_who_gives_up_waiting_leaves_the_queue(receiver: TokenReceiver) -> None:
    async def never(attempt: Attempt) -> bytes:
        await asyncio.Event().wait()
        return ended()

    handle = ScriptedHandle(never)
    dispatcher = Dispatcher(handle, receiver, DispatchLimits(60, 60, 60, 0, most_queued=1))
    for number in range(3):
        deltas = dispatcher.run("request", Share("tenant"), [1], Sampling(max_tokens=1), Attempts())
        waiting = asyncio.create_task(anext(deltas))
        await until(lambda number=number: len(handle.attempts) == number + 1)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await deltas.aclose()
    await handle.close()


def test_b4_a_flood_makes_room_for_others_and_not_for_itself() -> None:
    queue = Queue(4, Clock())
    flood = [queue.enter("flood") for _ in range(4)]
    evicted: list[int] = []
    for number, place in enumerate(flood):
        place.on_eviction = lambda _, number=number: evicted.append(number)
    with pytest.raises(EngineOverloadedError):
        queue.enter("flood")
    queue.enter("guest")
    assert evicted == [3]  # the latest
    with pytest.raises(EngineOverloadedError):
        flood[3].check()
    flood[0].check()
    queue.enter("guest")
    assert evicted == [3, 2]
    with pytest.raises(EngineOverloadedError):
        queue.enter("guest")  # as many as the flood has: no reason to prefer it
    assert queue.waiting == 4
    flood[3].leave()
    assert queue.waiting == 4


async def test_b4_who_loses_its_place_to_another_tenant_hears_of_it(
    receiver: TokenReceiver,
) -> None:
    model = HeldModel(receiver, most_queued=2)
    flood = [asyncio.create_task(model.run("flood")) for _ in range(2)]
    await until(lambda: len(model.handle.attempts) == 2)
    guest = asyncio.create_task(model.run("guest"))
    with pytest.raises(EngineOverloadedError) as refused:
        await flood[1]
    assert refused.value.retry_after_s is not None
    await until(lambda: model.handle.attempts[1].cancelled)
    model.may_take.set()
    assert await asyncio.gather(flood[0], guest) == [[1], [1]]
    await model.handle.close()

"""Who gets a thread of the text pool when, with threads that end when the test says so."""

import asyncio
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tera.errors import EngineOverloadedError
from tera.gateway.fair_pool import LARGE_BYTES, LONGEST_WAIT_S, SHORTEST_WAIT_S
from tera.gateway.text_pool import TextPool

SIZE = 100


class ByHand(Executor):
    """Threads whose work is done when the test ends it."""

    def __init__(self) -> None:
        self.running: list[tuple[Callable[[], Any], Future[Any]]] = []

    def submit(self, work: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self.running.append((partial(work, *args, **kwargs), future))
        return future

    def end(self, place: int = 0) -> None:
        """Let the work that began as the `place`-th of those that run come to its end."""
        work, future = self.running.pop(place)
        with ThreadPoolExecutor(1) as thread:
            done = thread.submit(work)
        error = done.exception()
        if error is None:
            future.set_result(done.result())
        else:
            future.set_exception(error)


@dataclass
class Bench:
    """A pool, the pieces that were asked of it, and the tenants whose pieces were started."""

    workers: int = 2
    most_waiting_bytes: int = 1000 * SIZE
    now_s: float = 0.0
    started: list[str] = field(default_factory=list)
    threads: ByHand = field(default_factory=ByHand)

    def __post_init__(self) -> None:
        self.pool = TextPool(
            self.workers, self.most_waiting_bytes, lambda: self.now_s, self.threads
        )

    async def ask(self, tenant: str, size_bytes: int = SIZE) -> asyncio.Task[str]:
        """Ask for a piece of work, which returns its tenant's name."""
        task = asyncio.create_task(self.pool.run(tenant, size_bytes, lambda: tenant))
        await self.turns()
        return task

    async def end(self, place: int = 0) -> None:
        self.threads.end(place)
        await self.turns()

    async def end_all(self) -> None:
        while self.threads.running:
            await self.end()

    async def turns(self) -> None:
        """Give each task and callback its turns, and take note of what has been started."""
        for _ in range(6):
            await asyncio.sleep(0)

    @property
    def tenants(self) -> list[str]:
        """Whose pieces run now."""
        return [work() for work, _ in self.threads.running]


async def test_x1_another_tenant_waits_for_none_of_a_flood() -> None:
    bench = Bench()
    flood = [await bench.ask("flood") for _ in range(50)]
    assert bench.tenants == ["flood"], "the last free thread is for others"
    other = await bench.ask("other")
    assert bench.tenants == ["flood", "other"]
    await bench.end(1)
    assert await other == "other"
    assert bench.pool.waiting == 49
    await bench.end_all()
    assert await asyncio.gather(*flood) == ["flood"] * 50


async def test_x1_tenants_take_turns_whoever_came_first() -> None:
    bench = Bench()
    tasks = [await bench.ask(tenant) for tenant in [*"aaaa", *"bbbb", *"cc"]]
    order = []
    while bench.threads.running:
        order.append(bench.tenants[0])
        await bench.end(0)
    assert order == [*"ababcabcab"], "each of the two that came before has one more, then it is c's"
    await asyncio.gather(*tasks)


async def test_x1_one_thread_serves_all_in_turns() -> None:
    bench = Bench(workers=1)
    tasks = [await bench.ask(tenant) for tenant in "aaab"]
    order = []
    while bench.threads.running:
        order += bench.tenants
        await bench.end()
    assert order == [*"aaba"]
    await asyncio.gather(*tasks)


async def test_x1_the_largest_pieces_run_one_at_a_time() -> None:
    bench = Bench(workers=4, most_waiting_bytes=100 * LARGE_BYTES)
    tasks = [await bench.ask(tenant, LARGE_BYTES + 1) for tenant in "ab"]
    tasks += [await bench.ask(tenant, LARGE_BYTES) for tenant in "cd"]
    assert bench.tenants == ["a", "c", "d"]
    await bench.end()
    assert bench.tenants == ["c", "d", "b"]
    await bench.end_all()
    await asyncio.gather(*tasks)


async def test_s8_what_waits_is_dropped_when_its_client_leaves() -> None:
    bench = Bench()
    first, *waiting = [await bench.ask("a") for _ in range(4)]
    for task in waiting[:2]:
        task.cancel()
    await bench.turns()
    assert bench.pool.waiting == 1
    await bench.end()
    assert await first == "a"
    assert len(bench.threads.running) == 1
    await bench.end()
    assert await waiting[2] == "a"
    assert bench.threads.running == []


async def test_s8_what_runs_keeps_its_thread_though_its_client_has_left() -> None:
    bench = Bench()
    left = await bench.ask("a")
    left.cancel()
    await bench.turns()
    await bench.ask("a")
    assert (len(bench.threads.running), bench.pool.waiting) == (1, 1)
    await bench.end()
    assert (len(bench.threads.running), bench.pool.waiting) == (1, 0)
    await bench.end_all()


async def test_s8_a_client_that_leaves_at_its_turn_costs_nobody_a_thread() -> None:
    bench = Bench()
    await bench.ask("a")
    leaves, stays = [await bench.ask("a") for _ in range(2)]
    leaves.cancel()  # and before its task has run, a thread comes free
    bench.threads.end()
    await bench.turns()
    assert (len(bench.threads.running), bench.pool.waiting) == (1, 0)
    await bench.end()
    assert await stays == "a"


async def test_b4_too_much_waiting_is_refused_with_a_time_to_come_again() -> None:
    bench = Bench(most_waiting_bytes=2 * SIZE)
    tasks = [await bench.ask("a") for _ in range(3)]
    with pytest.raises(EngineOverloadedError) as refused:
        await bench.pool.run("a", SIZE, lambda: "")
    assert refused.value.retry_after_s == SHORTEST_WAIT_S
    bench.now_s = 1000.0
    await bench.end()
    tasks.append(await bench.ask("a"))
    with pytest.raises(EngineOverloadedError) as refused:
        await bench.pool.run("a", SIZE, lambda: "")
    assert refused.value.retry_after_s == LONGEST_WAIT_S
    await bench.end_all()
    assert await asyncio.gather(*tasks) == ["a"] * 4


async def test_b4_a_flood_makes_room_for_a_tenant_that_has_less() -> None:
    bench = Bench(most_waiting_bytes=4 * SIZE)
    flood = [await bench.ask("flood") for _ in range(5)]
    others = [await bench.ask("other") for _ in range(3)]
    assert [task.done() for task in flood] == [False, False, False, True, True]
    assert isinstance(flood[-1].exception(), EngineOverloadedError)
    with pytest.raises(EngineOverloadedError):  # it would have more than the flood
        await bench.pool.run("other", SIZE, lambda: "")
    await bench.end_all()
    assert await asyncio.gather(*flood[:3], *others) == ["flood"] * 3 + ["other"] * 3


async def test_one_that_is_larger_than_all_that_may_wait_waits_alone() -> None:
    bench = Bench(most_waiting_bytes=SIZE)
    tasks = [await bench.ask("a"), await bench.ask("a", 5 * SIZE)]
    assert bench.pool.waiting == 1
    await bench.end_all()
    assert await asyncio.gather(*tasks) == ["a", "a"]


async def test_what_goes_wrong_is_told_to_whoever_asked_and_to_nobody_else() -> None:
    def fail() -> None:
        raise RuntimeError("a defect")

    bench = Bench()
    failing = asyncio.create_task(bench.pool.run("a", SIZE, fail))
    following = await bench.ask("a")
    await bench.end_all()
    assert await following == "a"
    with pytest.raises(RuntimeError, match="a defect"):
        await failing


async def test_x1_work_runs_in_threads_of_its_own() -> None:
    pool = TextPool()

    async def here() -> int:
        await asyncio.sleep(0)
        return threading.get_ident()

    found = {await pool.run("a", 1, threading.get_ident), await pool.render("a", 1, here)}
    pool.close()
    assert threading.get_ident() not in found


@dataclass
class Asked:
    """A piece as the test knows it."""

    tenant: str
    task: asyncio.Task[int]
    alone: bool
    """Its tenant had nothing here when it came."""
    started: bool = False
    left: bool = False
    before_it: Counter[str] = field(default_factory=Counter)
    """Pieces of other tenants that were started between its arrival and its start."""


class Checked(Bench):
    """A bench that checks at each step what holds for all pieces."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.asked: list[Asked] = []

    async def arrive(self, tenant: str) -> None:
        here = [each for each in self.asked if each.tenant == tenant and not each.task.done()]
        running = Counter(self.asked[place].tenant for place in self.places)
        place = len(self.asked)
        task = asyncio.create_task(self.pool.run(tenant, SIZE, lambda: place))
        self.asked.append(Asked(tenant, task, not here and not running[tenant]))
        await self.turns()
        self.look()

    @property
    def places(self) -> list[int]:
        return [work() for work, _ in self.threads.running]

    def look(self) -> None:
        """Take note of what was started, and check that the threads are used as promised."""
        for place in self.places:
            piece = self.asked[place]
            if piece.started:
                continue
            piece.started = True
            assert not piece.left
            for other in self.asked:
                if not other.started and other.tenant != piece.tenant:
                    other.before_it[piece.tenant] += 1
        running = Counter(self.asked[place].tenant for place in self.places)
        most_each = max(1, self.workers - 1)
        assert running.total() <= self.workers
        assert max(running.values(), default=0) <= most_each
        waiting = {each.tenant for each in self.asked if not each.started and not each.left}
        if running.total() < self.workers:
            assert all(running[tenant] == most_each for tenant in waiting), "a thread is idle"


steps = st.lists(
    st.tuples(st.sampled_from(["arrive", "arrive", "end", "leave"]), st.integers(0, 5)),
    max_size=60,
)


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 3), steps)
async def test_x1_turns_are_fair_whatever_comes_ends_and_leaves(
    workers: int, steps: list[tuple[str, int]]
) -> None:
    bench = Checked(workers)
    for step, number in steps:
        if step == "arrive":
            await bench.arrive("abc"[number % 3])
        elif step == "end" and bench.threads.running:
            await bench.end(number % len(bench.threads.running))
            bench.look()
        elif step == "leave" and bench.asked:
            piece = bench.asked[-1 - number % len(bench.asked)]
            piece.left |= not piece.task.done()
            piece.task.cancel()
            await bench.turns()
            bench.look()
    while bench.threads.running:
        await bench.end()
        bench.look()
    assert bench.pool.waiting == 0
    for place, piece in enumerate(bench.asked):
        if piece.left:
            assert piece.task.cancelled()
        else:
            assert piece.started
            assert await piece.task == place
        if piece.alone and piece.started:
            assert max(piece.before_it.values(), default=0) <= 1

"""Replicas and those who wait for one, at one gateway replica."""

import asyncio
from contextlib import suppress

import pytest
from tests.routing.conftest import until

from tera.generation import ReplicaLoad
from tera.routing import switchboard as switchboard_module
from tera.routing.prefix_index import BLOCK_TOKENS
from tera.routing.switchboard import FULL_CACHE_LOAD, Route, Share, Switchboard


def route(tenant: str = "acme", block: int = 0, tokens: int = 100, weight: float = 1) -> Route:
    return Route(Share(tenant, weight), [block] * BLOCK_TOKENS, tokens, lambda _: None)


def board(**capacities: int) -> Switchboard:
    switchboard = Switchboard()
    switchboard.set_replicas(capacities)
    return switchboard


async def waits(task: asyncio.Task[str]) -> bool:
    """Return whether a task still waits once all that can happen has happened."""
    for _ in range(10):
        await asyncio.sleep(0)
    return not task.done()


async def test_who_finds_all_replicas_full_waits_until_one_has_room() -> None:
    switchboard = board(a=1, b=1)
    first = await switchboard.take(route())
    second = await switchboard.take(route())
    assert {first, second} == {"a", "b"}
    third = asyncio.create_task(switchboard.take(route()))
    assert await waits(third)
    switchboard.release(second)
    assert await third == second


async def test_b3_who_comes_while_there_is_no_replica_gets_the_first() -> None:
    switchboard = Switchboard()
    held = [asyncio.create_task(switchboard.take(route(block=number))) for number in range(3)]
    assert all([await waits(task) for task in held])
    switchboard.set_replicas({"a": 8})
    assert await asyncio.gather(*held) == ["a"] * 3


async def test_whoever_leaves_the_queue_gets_no_replica() -> None:
    switchboard = board(a=1)
    await switchboard.take(route())
    leaves = asyncio.create_task(switchboard.take(route()))
    stays = asyncio.create_task(switchboard.take(route()))
    assert await waits(leaves)
    leaves.cancel()
    with suppress(asyncio.CancelledError):
        await leaves
    switchboard.release("a")
    assert await stays == "a"


async def test_a_replica_given_to_someone_who_leaves_in_that_moment_is_free_again() -> None:
    switchboard = board(a=1)
    await switchboard.take(route())
    leaves = asyncio.create_task(switchboard.take(route()))
    assert await waits(leaves)
    switchboard.release("a")
    leaves.cancel()
    with suppress(asyncio.CancelledError):
        await leaves
    async with asyncio.timeout(5):
        assert await switchboard.take(route()) == "a"


async def test_a_prompt_returns_to_the_replica_that_had_its_beginning() -> None:
    switchboard = board(**{name: 64 for name in "abcdefgh"})
    had = {block: await switchboard.take(route(block=block)) for block in range(20)}
    for block, replica_id in had.items():
        assert await switchboard.take(route(block=block)) == replica_id


async def test_without_prefix_affinity_the_least_busy_is_taken() -> None:
    switchboard = board(a=64, b=64, c=64)
    switchboard.prefix_affinity = False
    assert sorted([await switchboard.take(route()) for _ in range(6)]) == [*"aabbcc"]


@pytest.mark.parametrize(
    ("load", "chosen"),
    [
        pytest.param(ReplicaLoad(running=3), "b", id="other gateways' generations"),
        pytest.param(ReplicaLoad(running=1, waiting=1), "b", id="waiting counts twice"),
        pytest.param(ReplicaLoad(kv_usage_ratio=0.99), "b", id="a full cache"),
        pytest.param(ReplicaLoad(running=1), "a", id="little to do"),
    ],
)
async def test_what_a_replica_reports_counts(load: ReplicaLoad, chosen: str) -> None:
    switchboard = board(a=64, b=64)
    switchboard.prefix_affinity = False
    switchboard.report("b", ReplicaLoad(running=2))
    switchboard.report("a", load)
    assert await switchboard.take(route()) == chosen


async def test_a_report_of_room_wakes_who_waits() -> None:
    switchboard = board(a=4)
    switchboard.report("a", ReplicaLoad(running=4))
    held = asyncio.create_task(switchboard.take(route()))
    assert await waits(held)
    switchboard.report("a", ReplicaLoad(running=3))
    assert await held == "a"


async def test_a_full_cache_alone_fills_no_replica() -> None:
    assert FULL_CACHE_LOAD < 64
    switchboard = board(a=64)
    switchboard.report("a", ReplicaLoad(kv_usage_ratio=1.0))
    async with asyncio.timeout(5):
        assert await switchboard.take(route()) == "a"


async def test_a_refused_generation_goes_to_another_replica_and_before_who_waits() -> None:
    switchboard = board(a=2, b=2)
    switchboard.report("b", ReplicaLoad(running=2))
    assert await switchboard.take(route()) == "a"
    switchboard.counted("a", 2)  # others filled it meanwhile
    switchboard.release("a")
    waiting = asyncio.create_task(switchboard.take(route()))
    assert await waits(waiting)
    again = asyncio.create_task(switchboard.take(route(), again=True))
    assert await waits(again)
    switchboard.report("b", ReplicaLoad(running=1))
    assert await again == "b"
    assert await waits(waiting)
    switchboard.report("a", ReplicaLoad(running=1))
    assert await waiting == "a"


async def test_a_full_replica_from_which_nothing_is_heard_is_tried_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(switchboard_module, "ASK_AGAIN_S", 0.01)
    switchboard = board(a=1)
    assert await switchboard.take(route()) == "a"
    switchboard.counted("a", 1)
    switchboard.release("a")
    async with asyncio.timeout(5):
        assert await switchboard.take(route(), again=True) == "a"


async def test_a_suspect_gets_nothing_until_it_answers() -> None:
    asked: list[str] = []
    switchboard = board(a=1, b=1)
    switchboard.on_suspect = asked.append
    switchboard.suspect("a")
    switchboard.suspect("a")
    assert asked == ["a"]
    assert await switchboard.take(route()) == "b"
    held = asyncio.create_task(switchboard.take(route()))
    assert await waits(held)
    switchboard.trust("a")
    assert await held == "a"


async def test_a_replica_that_is_gone_is_never_chosen_and_may_be_released() -> None:
    switchboard = board(a=8, b=8)
    taken = [await switchboard.take(route(block=number)) for number in range(4)]
    switchboard.set_replicas({"b": 8})
    for replica_id in taken:
        switchboard.release(replica_id)
    assert {await switchboard.take(route(block=number)) for number in range(8)} == {"b"}


async def test_b4_a_flood_leaves_the_others_their_turn() -> None:
    switchboard = board(a=1)
    await switchboard.take(route("flood"))
    order: list[str] = []

    async def run(tenant: str) -> None:
        replica_id = await switchboard.take(route(tenant))
        order.append(tenant)
        switchboard.release(replica_id)

    tasks = [asyncio.create_task(run("flood")) for _ in range(50)]
    await asyncio.sleep(0)
    tasks.append(asyncio.create_task(run("quiet")))
    await asyncio.sleep(0)
    switchboard.release("a")
    await until(lambda: len(order) == 51)
    assert order.index("quiet") <= 2
    await asyncio.gather(*tasks)


async def test_a_tenant_of_twice_the_weight_gets_twice_the_turns() -> None:
    switchboard = board(a=1)
    await switchboard.take(route("first"))
    order: list[str] = []

    async def run(tenant: str, weight: float) -> None:
        replica_id = await switchboard.take(route(tenant, weight=weight))
        order.append(tenant)
        switchboard.release(replica_id)

    tasks = [
        asyncio.create_task(run(tenant, weight))
        for _ in range(30)
        for tenant, weight in (("one", 1), ("two", 2))
    ]
    await asyncio.sleep(0)
    switchboard.release("a")
    await asyncio.gather(*tasks)
    assert 19 <= order[:30].count("two") <= 21

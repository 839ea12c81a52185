"""Replicas and those who wait for one, at one gateway replica."""

import asyncio
from contextlib import suppress

import pytest
from tests.routing.conftest import until

from tera.generation import ReplicaLoad
from tera.routing.prefix_index import BLOCK_TOKENS
from tera.routing.switchboard import (
    ASLEEP_LOAD,
    FULL_CACHE_LOAD,
    MOVED_ROOM,
    Route,
    Share,
    Switchboard,
)


def route(
    tenant: str = "acme",
    block: int = 0,
    tokens: int = 100,
    weight: float = 1,
    *,
    moved: bool = False,
) -> Route:
    return Route(Share(tenant, weight), [block] * BLOCK_TOKENS, "", tokens, moved)


def board(**capacities: int) -> Switchboard:
    """Return one with connected replicas."""
    switchboard = Switchboard()
    run(switchboard, **capacities)
    return switchboard


def run(switchboard: Switchboard, **capacities: int) -> None:
    switchboard.set_replicas(capacities)
    for replica_id in capacities:
        switchboard.connected(replica_id)


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
    assert all([await waits(task) for task in held])
    switchboard.connected("a")
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
    switchboard = board(a=64)
    switchboard.report("a", ReplicaLoad(kv_usage_ratio=1.0))
    async with asyncio.timeout(5):
        assert await switchboard.take(route()) == "a"


async def test_a_full_cache_or_a_sleeping_engine_counts_for_less_than_its_room() -> None:
    assert max(FULL_CACHE_LOAD, ASLEEP_LOAD) < 64
    switchboard = board(a=64, b=64)
    switchboard.prefix_affinity = False
    switchboard.report("a", ReplicaLoad(asleep=True))
    switchboard.report("b", ReplicaLoad(running=ASLEEP_LOAD - 1))
    assert [switchboard.take_now(route()) for _ in range(2)].count("b") >= 1
    switchboard.report("b", ReplicaLoad(running=64))
    assert switchboard.take_now(route()) == "a"


async def test_who_comes_gets_no_room_before_who_waits() -> None:
    switchboard = board(a=1)
    assert switchboard.take_now(route()) == "a"
    held = asyncio.create_task(switchboard.take(route()))
    assert await waits(held)
    switchboard.release("a")  # which gives `held` the room
    assert switchboard.take_now(route()) is None
    assert await held == "a"


async def test_a_refused_generation_goes_to_another_replica_and_before_who_waits() -> None:
    switchboard = board(a=2, b=2)
    switchboard.report("b", ReplicaLoad(running=2))
    assert await switchboard.take(route()) == "a"
    switchboard.refused("a", 2)  # others filled it meanwhile
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


async def test_a_replica_that_refused_gets_nothing_until_it_reports() -> None:
    switchboard = board(a=8)
    assert switchboard.take_now(route()) == "a"
    switchboard.refused("a", 8)
    switchboard.release("a")
    assert switchboard.take_now(route()) is None
    switchboard.report("a", ReplicaLoad(running=7))
    assert switchboard.take_now(route()) == "a"
    assert switchboard.take_now(route()) is None


async def test_what_is_moved_is_not_sent_again_to_a_replica_that_is_full_beyond_its_number() -> (
    None
):
    switchboard = board(a=2)
    moved = route(moved=True)
    assert switchboard.take_now(moved) == "a"
    switchboard.refused("a", 4)
    switchboard.release("a")
    assert switchboard.take_now(moved) is None
    switchboard.report("a", ReplicaLoad(running=3))
    assert switchboard.take_now(moved) == "a"


async def test_a_replica_gets_nothing_while_it_is_not_connected() -> None:
    switchboard = board(a=1, b=1)
    switchboard.lost("a")
    switchboard.lost("a")
    assert await switchboard.take(route()) == "b"
    held = asyncio.create_task(switchboard.take(route()))
    assert await waits(held)
    switchboard.report("a", ReplicaLoad())  # what an old connection says changes nothing
    assert await waits(held)
    switchboard.connected("a")
    assert await held == "a"


async def test_what_was_sent_over_a_lost_connection_counts_until_it_is_given_up() -> None:
    switchboard = board(a=2)
    assert [switchboard.take_now(route()) for _ in range(2)] == ["a", "a"]
    switchboard.lost("a")
    switchboard.connected("a")
    assert switchboard.take_now(route()) is None
    for _ in range(2):
        switchboard.release("a")
    assert [switchboard.take_now(route()) for _ in range(3)] == ["a", "a", None]


async def test_what_an_old_connection_said_of_a_replica_is_forgotten() -> None:
    switchboard = board(a=8)
    switchboard.report("a", ReplicaLoad(running=8, waiting=4, kv_usage_ratio=1.0))
    assert switchboard.take_now(route()) is None
    switchboard.lost("a")
    switchboard.connected("a")
    assert switchboard.take_now(route()) == "a"


async def test_a_dropped_replica_stays_away_while_serve_still_names_it() -> None:
    switchboard = board(a=8)
    switchboard.drop("a")
    switchboard.set_replicas({"a": 8})
    assert switchboard.take_now(route()) is None


class TestMoved:
    """What another replica has lost does not wait for room, within bounds."""

    async def test_it_takes_room_beyond_the_number_where_there_is_none_within(self) -> None:
        switchboard = board(a=2, b=2)
        for _ in range(3):
            assert switchboard.take_now(route()) is not None
        moved = [switchboard.take_now(route(moved=True)) for _ in range(6)]
        counts = {name: switchboard._replicas[name].mine for name in "ab"}
        assert counts == {"a": 2 * MOVED_ROOM, "b": 2 * MOVED_ROOM}
        assert moved.count(None) == 1
        assert switchboard.take_now(route()) is None

    async def test_it_comes_before_who_waits(self) -> None:
        switchboard = board(a=1)
        assert switchboard.take_now(route()) == "a"
        held = asyncio.create_task(switchboard.take(route()))
        assert await waits(held)
        assert switchboard.take_now(route(moved=True)) == "a"
        switchboard.release("a")
        assert await waits(held)
        switchboard.release("a")
        assert await held == "a"

    async def test_while_there_is_no_replica_all_wait_and_the_first_takes_them_all(self) -> None:
        switchboard = Switchboard()
        new = asyncio.create_task(switchboard.take(route()))
        moved = [asyncio.create_task(switchboard.take(route(moved=True))) for _ in range(3)]
        # Its replica was lost before it had begun, so it has no stream that stands still.
        again = asyncio.create_task(switchboard.take(route(), again=True))
        moved.append(asyncio.create_task(switchboard.take(route(moved=True))))
        assert all([await waits(task) for task in (new, again, *moved)])
        run(switchboard, a=2)
        async with asyncio.timeout(5):
            assert await asyncio.gather(*moved) == ["a"] * 4
        assert await waits(again)
        for _ in range(3):
            switchboard.release("a")
        assert await again == "a"
        assert await waits(new)
        switchboard.release("a")
        assert await new == "a"

    async def test_whoever_leaves_is_passed_over(self) -> None:
        switchboard = Switchboard()
        leaves, stays = (asyncio.create_task(switchboard.take(route(moved=True))) for _ in range(2))
        assert await waits(leaves)
        leaves.cancel()
        await asyncio.wait([leaves])
        run(switchboard, a=1)
        assert await stays == "a"
        assert switchboard._replicas["a"].mine == 1


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


async def test_b4_a_tenant_that_gives_up_keeps_its_turn_and_leaves_nothing() -> None:
    switchboard = board(a=1)
    await switchboard.take(route())
    other = [asyncio.create_task(switchboard.take(route("other"))) for _ in range(3)]
    gone = [asyncio.create_task(switchboard.take(route("tenant"))) for _ in range(99)]
    moved = [asyncio.create_task(switchboard.take(route(moved=True))) for _ in range(9)]
    assert await waits(gone[-1])
    for task in (*gone, *moved):
        task.cancel()
    await asyncio.gather(*gone, *moved, return_exceptions=True)
    assert len(switchboard._waiting) == 3
    assert len([each for each in moved if not each.cancelled()]) + len(switchboard._moved) == 1
    last = asyncio.create_task(switchboard.take(route("tenant")))
    assert await waits(last)
    for _ in range(3):
        switchboard.release("a")
    assert not await waits(last)
    assert [task.done() for task in other] == [True, False, False]
    for task in other:
        task.cancel()


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

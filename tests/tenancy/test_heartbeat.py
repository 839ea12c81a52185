from __future__ import annotations

from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

from tests.tenancy.waiting import until

from tera.tenancy.heartbeat import LIFE_S, REPLICAS, Heartbeat

if TYPE_CHECKING:
    import pytest
    from redis.asyncio import Redis
    from tests.tenancy.conftest import FakeClock, RedisServer

INTERVAL_S = 0.01


async def test_every_replica_counts_all_that_are_alive(redis: Redis, clock: FakeClock) -> None:
    async with AsyncExitStack() as stack:
        one, two = [
            await stack.enter_async_context(Heartbeat(redis, name, clock, INTERVAL_S))
            for name in ("one", "two")
        ]
        await until(lambda: one.replicas == two.replicas == 2)
        await redis.zadd(REPLICAS, {"dead": clock.now_s + 1})
        await until(lambda: one.replicas == 3)
        clock.now_s += LIFE_S / 2
        await until(lambda: one.replicas == 2)
    assert await redis.exists(REPLICAS) == 0


async def test_a_replica_that_leaves_is_not_waited_for(redis: Redis, clock: FakeClock) -> None:
    async with Heartbeat(redis, "one", clock, INTERVAL_S) as one:
        async with Heartbeat(redis, "two", clock, INTERVAL_S):
            await until(lambda: one.replicas == 2)
        await until(lambda: one.replicas == 1)


async def test_the_last_number_stands_while_redis_is_away_and_that_is_told_once(
    redis_server: RedisServer, redis: Redis, clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    await redis.zadd(REPLICAS, {"other": clock.now_s + 1})
    async with Heartbeat(redis, "one", clock, INTERVAL_S) as one:
        await until(lambda: one.replicas == 2)
        redis_server.kill()
        await until(lambda: len(caplog.records) > 0)
        redis_server.start()
        await redis.zadd(REPLICAS, {"third": clock.now_s + 1})
        await until(lambda: one.replicas > 2)
    (told,) = caplog.records
    assert told.message.startswith("The heartbeat of this gateway replica: it failed")

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError
from tests.tenancy.limiting import tenant
from tests.tenancy.waiting import until

from tera.tenancy.leases import RECLAIMING, LeaseRenewal, Reclaimer
from tera.tenancy.limits import Progress
from tera.tenancy.redis_limits import RedisLimiter
from tera.tenancy.redis_watch import RedisWatch

if TYPE_CHECKING:
    from redis.asyncio import Redis
    from tests.tenancy.conftest import FakeClock

    from tera.tenancy.pipelined import PipelinedRedis

INTERVAL_S = 0.01


@pytest.fixture
def limiter(calls: PipelinedRedis) -> RedisLimiter:
    """A limiter by Redis's own clock, whose leases end soon."""
    return RedisLimiter(calls, lease_s=0.2)


async def open_requests(limiter: RedisLimiter, *tenants: str) -> None:
    for name in tenants:
        await limiter.admit(name, f"req-{name}", tenant(concurrent_requests=9), 1, b"{}")


async def test_leases_of_all_tenants_are_renewed_with_what_was_used(
    redis: Redis, calls: PipelinedRedis, limiter: RedisLimiter, clock: FakeClock
) -> None:
    await open_requests(limiter, "acme", "beta")
    running = {name: {f"req-{name}": Progress(3, 4)} for name in ("acme", "beta")}
    watch = RedisWatch(calls, "one", clock, INTERVAL_S)

    async def renewed() -> bool:
        leases = [await redis.hget(f"tera:{{{name}}}:open", f"req-{name}") for name in running]
        return all(lease is not None and b" 3 4 " in lease for lease in leases)

    async with LeaseRenewal(limiter, watch, lambda: running, INTERVAL_S):
        await until(renewed)


async def test_leases_are_renewed_again_as_soon_as_redis_is_back(
    redis: Redis, calls: PipelinedRedis, limiter: RedisLimiter, clock: FakeClock
) -> None:
    watch = RedisWatch(calls, "one", clock, INTERVAL_S)
    watch.mark_away(RedisConnectionError("the connection was lost"))
    asked = asyncio.Event()

    def running() -> dict[str, dict[str, Progress]]:
        assert not watch.away
        asked.set()
        return {}

    async with LeaseRenewal(limiter, watch, running, INTERVAL_S), watch:
        await asked.wait()


async def test_what_nobody_renews_is_reclaimed_of_every_tenant(
    redis: Redis, limiter: RedisLimiter
) -> None:
    await open_requests(limiter, "acme", "beta")
    async with Reclaimer(redis, limiter, "one", 2 * INTERVAL_S):
        await until(lambda: nothing_is_open(redis))
    for name in ("acme", "beta"):
        assert await redis.xlen(f"tera:{{{name}}}:usage") == 1


async def nothing_is_open(redis: Redis) -> bool:
    return not await redis.keys("*:leases")


async def test_one_replica_reclaims_at_a_time(redis: Redis, limiter: RedisLimiter) -> None:
    await redis.set(RECLAIMING, "another")
    await open_requests(limiter, "acme")
    asked = (await redis.info("commandstats"))["cmdstat_set"]["calls"]

    async def looked_twice() -> bool:
        stats = await redis.info("commandstats")
        return bool(stats["cmdstat_set"]["calls"] >= asked + 2)

    async with Reclaimer(redis, limiter, "one", 2 * INTERVAL_S):
        await until(looked_twice)
        assert await redis.exists("tera:{acme}:leases") == 1
        await redis.delete(RECLAIMING)
        await until(lambda: nothing_is_open(redis))

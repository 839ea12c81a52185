"""Admission with a real Redis that is there."""

import asyncio
import time
from contextlib import suppress
from typing import Any

import pytest
from redis.asyncio import Redis
from tests.tenancy.conftest import RedisServer
from tests.tenancy.gateways import (
    KEY,
    Gateway,
    Keyring,
    admitted_in_a_row,
    counted,
    gateway,
    has_records,
    records,
    tenant,
)
from tests.tenancy.waiting import until

from tera.config.limits import Limits, LimitsConfig
from tera.errors import ConcurrencyLimitError, RequestRateLimitError
from tera.tenancy.admission import Admissions, Intervals
from tera.tenancy.keys import ApiKey
from tera.tenancy.limits import Progress
from tera.tenancy.pipelined import PipelinedRedis
from tera.tenancy.redis import connect
from tera.tenancy.redis_limits import RedisLimiter
from tera.tenancy.usage import UsageRecord, encode_record


async def test_a_request_makes_one_call_to_be_admitted_and_one_to_be_settled(
    redis_server: RedisServer, redis: Redis
) -> None:
    async with gateway(redis_server.url, default=tenant(requests_per_minute=100)) as one:
        one.finish(await one.admit())  # loads the script
        await until(lambda: not one.admissions.unsettled)
        await until(lambda: has_records(redis, 1))
        before = await counted(redis)
        for _ in range(10):
            one.finish(await one.admit())
        await until(lambda: has_records(redis, 11))
        after = await counted(redis)
    assert after["evalsha"] - before["evalsha"] == 20
    assert after.get("eval", 0) == before.get("eval", 0)
    assert {record.status for record in await records(redis)} == {"finished"}


async def test_what_is_left_is_told_and_a_refusal_is_an_error(redis_server: RedisServer) -> None:
    async with gateway(redis_server.url, default=tenant(requests_per_minute=1)) as one:
        await one.admit()
        with pytest.raises(RequestRateLimitError) as refused:
            await one.admit()
    assert refused.value.retry_after_s == pytest.approx(60, abs=1)
    left = [told.requests for told in one.told]
    assert [(it.limit, it.remaining) for it in left if it is not None] == [(1, 0), (1, 0)]


async def test_a_keys_own_limits_count_beside_its_tenants(redis_server: RedisServer) -> None:
    key = ApiKey("key_2", "acme", "", "", None, 0.0, limits=Limits(concurrent_requests=1))
    async with gateway(redis_server.url, default=tenant(concurrent_requests=3)) as one:
        await one.admit(key=key)
        with pytest.raises(ConcurrencyLimitError):
            await one.admit(key=key)
        await one.admit()
        await one.admit()
        with pytest.raises(ConcurrencyLimitError):
            await one.admit()


async def test_changed_limits_are_in_force_for_the_next_request(redis_server: RedisServer) -> None:
    limits = LimitsConfig()
    redis = connect(redis_server.url, timeout_s=1.0)
    async with Admissions(redis, Keyring(), lambda: limits, "one") as admissions:
        one = Gateway(admissions)
        assert admissions.most_tokens(KEY, "m") is None
        await one.admit()
        limits = LimitsConfig(tenants={"acme": tenant(tokens_per_minute=50, requests_per_minute=0)})
        assert admissions.most_tokens(KEY, "m") == 50
        with pytest.raises(RequestRateLimitError):
            await one.admit()
    await redis.aclose()


@pytest.mark.parametrize("limit", [0, 1])
async def test_a_flood_of_refused_requests_asks_redis_once_until_its_limit_changes(
    redis_server: RedisServer, redis: Redis, limit: int
) -> None:
    limits = LimitsConfig(default=tenant(requests_per_minute=limit))
    connected = connect(redis_server.url, timeout_s=1.0)
    async with Admissions(connected, Keyring(), lambda: limits, "one") as admissions:
        one = Gateway(admissions)
        for _ in range(limit):
            await one.admit()
        before = await counted(redis)
        waits = []
        for _ in range(20):
            with pytest.raises(RequestRateLimitError) as refused:
                await one.admit()
            waits.append(refused.value.retry_after_s)
        after = await counted(redis)
        asked = [after.get(name, 0) - before.get(name, 0) for name in ("evalsha", "eval")]
        # The first call of all is made twice: Redis does not know the script yet.
        assert asked in ([1, 0], [1, 1])
        limits = LimitsConfig(default=tenant(requests_per_minute=limit + 1))
        await one.admit()
    await connected.aclose()
    if limit:
        known = [wait for wait in waits if wait is not None]
        assert known == sorted(known, reverse=True)
        assert 55 < known[-1] < known[0] <= 60
    else:
        assert waits == [None] * 20


async def asks_until_refused(one: Gateway) -> None:
    while True:  # while some of the limit has drained
        await one.admit()


async def test_a_request_is_admitted_once_the_wait_that_was_told_is_over(
    redis_server: RedisServer,
) -> None:
    async with gateway(redis_server.url, default=tenant(requests_per_minute=600)) as one:
        for _ in range(600):
            await one.admit()
        for _ in range(3):
            with pytest.raises(RequestRateLimitError) as refused:
                await asks_until_refused(one)
            assert refused.value.retry_after_s is not None
            await asyncio.sleep(refused.value.retry_after_s)
            await one.admit()


async def test_s8_a_request_that_is_given_up_while_it_is_admitted_holds_nothing(
    redis_server: RedisServer, redis: Redis
) -> None:
    async with gateway(redis_server.url, default=tenant(concurrent_requests=1)) as one:
        one.finish(await one.admit())
        redis_server.stop()
        asking = asyncio.create_task(one.admit())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        asking.cancel()
        with suppress(asyncio.CancelledError):
            await asking
        redis_server.cont()

        async def free() -> bool:
            try:
                one.finish(await one.admit())
            except ConcurrencyLimitError:
                return False
            return True

        await until(free)


async def test_l9_what_a_dead_gateway_held_returns_with_its_leases(
    redis_server: RedisServer, redis: Redis, calls: PipelinedRedis
) -> None:
    dead = RedisLimiter(calls, lease_s=0.1)
    limits = tenant(concurrent_requests=1)
    intervals = Intervals(reclaim_s=0.2)
    async with gateway(redis_server.url, intervals=intervals, default=limits) as one:
        scopes = one.admissions.scopes(KEY, "m")
        record = UsageRecord("req_dead", "acme", "key_1", "m", "/v1", "lost", time.time())
        await dead.admit("acme", "req_dead", scopes, 10, encode_record(record))
        await dead.renew("acme", {"req_dead": Progress(5, 7)})
        await until(lambda: has_records(redis, 1))
        (lost,) = await records(redis)
        assert (lost.request_id, lost.status, lost.completion_tokens) == ("req_dead", "lost", 7)
        await one.admit()


async def test_a_running_request_keeps_its_lease(redis_server: RedisServer, redis: Redis) -> None:
    limits = tenant(concurrent_requests=1)
    async with gateway(redis_server.url, intervals=Intervals(renew_s=0.05), default=limits) as one:
        await one.admit()
        first: Any
        (first,) = await redis.zrange("tera:{acme}:leases", 0, -1, withscores=True)

        async def later() -> bool:
            now: Any
            (now,) = await redis.zrange("tera:{acme}:leases", 0, -1, withscores=True)
            return bool(now[1] > first[1])

        await until(later)
        stored = await redis.hgetall("tera:{acme}:open")
        assert all(b" 3 4 " in lease for lease in stored.values())


async def test_closing_settles_what_has_ended(redis_server: RedisServer, redis: Redis) -> None:
    async with gateway(redis_server.url) as one:
        for held in [await one.admit() for _ in range(50)]:
            one.finish(held)
    assert len(await records(redis)) == 50
    assert await redis.exists("tera:{acme}:open") == 0


async def test_damaged_keys_of_one_tenant_leave_the_others_their_limits(
    redis_server: RedisServer, redis: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    await redis.set("tera:{broken}:limits", "not a hash")
    broken = ApiKey("key_9", "broken", "", "", None, 0.0)
    async with gateway(redis_server.url, default=tenant(requests_per_minute=2)) as one:
        held = await one.admit(key=broken)
        one.finish(held)
        await until(lambda: one.admissions.given_up == 1)
        assert not one.admissions.degraded
        assert held.opening.request_id in caplog.text
        assert await admitted_in_a_row(one) == 2

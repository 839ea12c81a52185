"""Admission with a real Redis that is killed, frozen, filled, slowed and emptied under it."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import pytest
from redis.asyncio import Redis
from tests.tenancy.conftest import RedisServer
from tests.tenancy.gateways import (
    STREAM,
    admitted_in_a_row,
    gateway,
    has_all,
    tenant,
)
from tests.tenancy.proxy import Proxy
from tests.tenancy.waiting import until

from tera.errors import InternalError, QuotaError, RequestRateLimitError
from tera.tenancy.admission import AT_A_TIME, Intervals
from tera.tenancy.redis import connect


async def test_no_more_calls_wait_for_a_frozen_redis_than_are_made_at_a_time(
    redis_server: RedisServer,
) -> None:
    async with gateway(redis_server.url) as one:
        one.finish(await one.admit())
        await until(lambda: not one.admissions.unsettled)
        redis_server.stop()
        asking = [asyncio.create_task(one.admit()) for _ in range(4 * AT_A_TIME)]
        await until(lambda: one.admissions._calls.waiting > 0)
        assert one.admissions._calls.waiting == AT_A_TIME
        held = await asyncio.gather(*asking)
        assert all(each.local for each in held)
        assert one.admissions.outages == 1
        redis_server.cont()


async def test_a_gateway_that_starts_while_redis_is_away_goes_on_by_itself_until_it_is_back(
    redis_server: RedisServer,
) -> None:
    redis_server.kill()
    async with gateway(redis_server.url, default=tenant(requests_per_minute=1)) as one:
        assert one.admissions.degraded
        assert (await one.admit()).local
        redis_server.start()
        await until(lambda: not one.admissions.degraded)
        assert not (await one.admit()).local


async def test_an_idle_connection_that_was_cut_is_no_outage(redis_server: RedisServer) -> None:
    async with Proxy(redis_server) as proxy, gateway(proxy.url) as one:
        one.finish(await one.admit())
        await until(lambda: not one.admissions.unsettled)
        await proxy.cut()
        await until(lambda: one.admissions._calls.closed)
        assert not (await one.admit()).local
        assert one.admissions.outages == 0


async def test_what_cannot_be_settled_at_the_end_is_in_the_log(
    redis_server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    async with gateway(redis_server.url) as one:
        held = await one.admit()
        redis_server.kill()
        one.finish(held)
    assert held.opening.request_id in caplog.text
    assert one.admissions.given_up == 1


Break = Callable[[RedisServer, Redis, Proxy], Awaitable[None]]


async def kill(server: RedisServer, redis: Redis, proxy: Proxy) -> None:
    server.kill()


async def start(server: RedisServer, redis: Redis, proxy: Proxy) -> None:
    server.start()


async def freeze(server: RedisServer, redis: Redis, proxy: Proxy) -> None:
    server.stop()


async def thaw(server: RedisServer, redis: Redis, proxy: Proxy) -> None:
    server.cont()


async def fill(server: RedisServer, redis: Redis, proxy: Proxy) -> None:
    await redis.config_set("maxmemory", 1)


async def empty(server: RedisServer, redis: Redis, proxy: Proxy) -> None:
    await redis.config_set("maxmemory", 0)


async def slow(server: RedisServer, redis: Redis, proxy: Proxy) -> None:
    proxy.delay_s = 2.0


async def fast(server: RedisServer, redis: Redis, proxy: Proxy) -> None:
    proxy.delay_s = 0.0


async def lose(server: RedisServer, redis: Redis, proxy: Proxy) -> None:
    server.kill()
    server.erase()


FAULTS = [  # each takes seconds, so one stands for all in the fast lane
    pytest.param(freeze, thaw, id="frozen"),
    pytest.param(kill, start, id="killed", marks=pytest.mark.slow),
    pytest.param(fill, empty, id="full", marks=pytest.mark.slow),
    pytest.param(slow, fast, id="slow", marks=pytest.mark.slow),
    pytest.param(lose, start, id="restarted-empty", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("break_it", "mend_it"), FAULTS)
async def test_l8_a_gateway_goes_on_with_its_share_and_reconciles(
    redis_server: RedisServer, redis: Redis, break_it: Break, mend_it: Break
) -> None:
    limits = tenant(requests_per_minute=20)
    async with (
        Proxy(redis_server) as proxy,
        gateway(proxy.url, "one", default=limits) as one,
        gateway(proxy.url, "two", default=limits) as two,
    ):
        await until(lambda: one.admissions.replicas == 2)
        running = await one.admit()
        await break_it(redis_server, redis, proxy)

        admitted = [running]
        for _ in range(30):  # its share of 20 is 10
            with suppress(RequestRateLimitError):
                admitted.append(await one.admit())
        assert len(admitted) == 1 + 10
        assert one.admissions.degraded
        for held in admitted:
            one.finish(held)

        await mend_it(redis_server, redis, proxy)
        await until(lambda: not one.admissions.degraded)
        await until(lambda: not one.admissions.unsettled)
        await until(lambda: has_all(redis, {held.opening.request_id for held in admitted}))
        # What ran meanwhile is charged: of 20 there are 9 left, or 10 if Redis has forgotten the
        # first, and some seconds have brought back one or two.
        assert 9 <= await admitted_in_a_row(two) <= 13


async def test_l8_a_budget_that_is_used_up_stays_so_while_redis_is_away(
    redis_server: RedisServer,
) -> None:
    async with (
        gateway(redis_server.url, "one", default=tenant(token_budget=100)) as one,
        gateway(redis_server.url, "two", default=tenant(token_budget=100)) as two,
    ):
        one.finish(await one.admit(), 90, 5)
        await until(lambda: not one.admissions.unsettled)
        for each in (one, two):
            with pytest.raises(QuotaError) as refused:
                await each.admit()
            assert "budget of 100 tokens" in refused.value.message
        redis_server.kill()
        for each in (one, two):
            with pytest.raises(QuotaError) as still_refused:
                await each.admit()
            assert each.admissions.degraded
            assert still_refused.value.message == refused.value.message


@pytest.mark.parametrize(
    "cut", [pytest.param(True, id="connections-cut"), pytest.param(False, id="connections-kept")]
)
async def test_l8_a_failover_is_an_outage_until_the_address_leads_to_a_server_that_writes(
    redis_server: RedisServer,
    second_server: RedisServer,
    redis: Redis,
    cut: bool,
) -> None:
    intervals = Intervals(reclaim_s=3600)  # so that SET is the probe's alone
    async with (
        Proxy(redis_server) as proxy,
        gateway(proxy.url, intervals=intervals, default=tenant(token_budget=1000)) as one,
        connect(second_server.url, timeout_s=1.0) as second,
    ):
        finished, running = [await one.admit() for _ in range(2)]
        one.finish(finished)
        await second.replicaof("127.0.0.1", redis_server.port)
        await until(lambda: has_all(second, {finished.opening.request_id}))

        await second.replicaof("NO", "ONE")
        await redis.replicaof("127.0.0.1", second_server.port)
        during = [await one.admit() for _ in range(5)]
        assert all(held.local for held in during)
        assert one.admissions.degraded
        for held in (running, *during):
            one.finish(held)

        async def refused_probes() -> int:
            stats = await redis.info("commandstats")
            return int(stats.get("cmdstat_set", {}).get("rejected_calls", 0))

        async def probed() -> bool:
            return await refused_probes() > 0

        await until(probed)
        probes = await refused_probes()
        assert one.admissions.degraded
        proxy.server = second_server
        if cut:
            await proxy.cut()
        await until(lambda: not one.admissions.degraded)
        # The next probe found it: within `Intervals.probe_s`.
        assert await refused_probes() == probes

        everything = {held.opening.request_id for held in (finished, running, *during)}
        await until(lambda: has_all(second, everything))
        await until(lambda: not one.admissions.unsettled)
        entries: Any = await second.xrange(STREAM)
        named = [fields[b"id"].decode() for _, fields in entries]
        assert sorted(named) == sorted(everything)
        (budget,) = [key async for key in second.scan_iter("tera:{acme}:budget:*")]
        assert await second.hget(budget, "tenant") == b"%d 0" % (7 * len(everything))
        assert one.admissions.outages == 1


async def test_l8_closed_refuses_while_redis_is_away(redis_server: RedisServer) -> None:
    async with gateway(redis_server.url, on_redis_error="closed") as one:
        await one.admit()
        redis_server.kill()
        for _ in range(3):
            with pytest.raises(InternalError):
                await one.admit()
        redis_server.start()
        await until(lambda: not one.admissions.degraded)
        await one.admit()

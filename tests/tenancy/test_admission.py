"""Admission with a real Redis that is killed, frozen, filled, slowed and emptied under it."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import pytest
from redis.asyncio import Redis
from tests.tenancy.conftest import RedisServer
from tests.tenancy.proxy import Proxy
from tests.tenancy.waiting import until

from tera.config.limits import Limits, LimitsConfig, TenantLimits
from tera.errors import ConcurrencyLimitError, InternalError, QuotaError, RequestRateLimitError
from tera.tenancy.admission import AT_A_TIME, Admissions, Intervals, Reservation
from tera.tenancy.keys import ApiKey
from tera.tenancy.limits import Admission, Progress
from tera.tenancy.pipelined import PipelinedRedis
from tera.tenancy.redis import connect
from tera.tenancy.redis_limits import RedisLimiter
from tera.tenancy.usage import UsageLedger, UsageRecord, encode_record

KEY = ApiKey("key_1", "acme", "", "", None, 0.0)
INTERVALS = Intervals()
STREAM, LIMITS = "tera:{acme}:usage", "tera:{acme}:limits"


@dataclass
class Gateway:
    """One gateway replica's admissions, and what a request does with them."""

    admissions: Admissions
    told: list[Admission] = field(default_factory=list)
    made: int = 0

    async def admit(self, tokens: int = 10, key: ApiKey = KEY) -> Reservation:
        self.made += 1
        request_id = f"req_{id(self)}_{self.made}"
        opening = UsageRecord(request_id, key.tenant, key.key_id, "m", "/v1", "lost", time.time())
        return await self.admissions.admit(
            key, opening, tokens, progress=lambda: Progress(3, 4), told=self.told.append
        )

    def finish(self, held: Reservation, prompt_tokens: int = 5, completion_tokens: int = 2) -> None:
        opening = held.opening
        held.settle(
            UsageRecord(
                opening.request_id,
                opening.tenant,
                opening.key_id,
                opening.model,
                opening.route,
                "finished",
                opening.started_s,
                prompt_tokens,
                0,
                completion_tokens,
            )
        )


class Keyring:
    """A snapshot in which nothing is stored of tenants."""

    def tenant_limits(self, name: str) -> TenantLimits | None:
        return None


@asynccontextmanager
async def gateway(
    url: str, name: str = "one", intervals: Intervals = INTERVALS, **config: Any
) -> AsyncIterator[Gateway]:
    limits = LimitsConfig(**config)
    redis = connect(url, timeout_s=1.0)
    try:
        async with Admissions(
            redis, Keyring(), lambda: limits, name, intervals=intervals
        ) as admissions:
            yield Gateway(admissions)
    finally:
        await redis.aclose()


async def records(redis: Redis) -> list[UsageRecord]:
    return [record async for record in UsageLedger(redis).records(since_s=0, until_s=4e9)]


async def counted(redis: Redis) -> dict[str, int]:
    """Return how often Redis has run each command."""
    stats = await redis.info("commandstats")
    return {name.removeprefix("cmdstat_"): found["calls"] for name, found in stats.items()}


def tenant(**limits: int) -> TenantLimits:
    return TenantLimits(**limits)  # type: ignore[arg-type]


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


async def has_records(redis: Redis, count: int) -> bool:
    return await redis.xlen(STREAM) == count


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


async def admitted_in_a_row(one: Gateway) -> int:
    """Return how many requests are admitted before the first that is not."""
    for count in range(1000):
        try:
            await one.admit()
        except RequestRateLimitError:
            return count
    raise AssertionError("nothing is refused")


async def has_all(redis: Redis, request_ids: set[str]) -> bool:
    return request_ids <= {record.request_id for record in await records(redis)}


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
        entries = [fields[b"id"].decode() for _, fields in await second.xrange(STREAM)]
        assert sorted(entries) == sorted(everything)
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
        (first,) = await redis.zrange("tera:{acme}:leases", 0, -1, withscores=True)

        async def later() -> bool:
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

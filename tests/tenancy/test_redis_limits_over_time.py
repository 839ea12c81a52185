"""Leases, budgets of days and months, charges after an outage, and how long keys live."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pytest
from redis.crc import key_slot
from tests.tenancy.limiting import (
    EVERY_LIMIT,
    SECOND_US,
    admitted,
    ledger,
    moved,
    record,
    refused,
    tenant,
)

from tera.config.limits import Limits
from tera.tenancy.limits import Allowance, Progress, Scope
from tera.tenancy.pipelined import PipelinedRedis
from tera.tenancy.redis_limits import RedisLimiter, tenants_with_leases
from tera.tenancy.usage import UsageLedger, decode_record

if TYPE_CHECKING:
    from redis.asyncio import Redis


# Leases


async def test_l9_a_request_that_nobody_renews_returns_what_it_holds_and_is_recorded_once(
    redis: Redis, limiter: RedisLimiter
) -> None:
    scopes = tenant(concurrent_requests=1, tokens_per_minute=600, token_budget=1000)
    await admitted(limiter, "req_1", scopes, 600)
    moved(limiter, 29_999_999)
    assert (await refused(limiter, scopes)).wait_us is not None
    moved(limiter, 1)
    answer = await admitted(limiter, "req_2", scopes, 600)
    assert answer.tokens == Allowance(600, 0, 60 * SECOND_US)
    assert await redis.hgetall("tera:{acme}:budget:2027-01") == {b"tenant": b"0 600"}
    [(request_id, lost)] = await ledger(redis)
    assert request_id == b"req_1"
    assert lost == decode_record(record())


async def test_a_lost_request_is_charged_what_it_had_used_when_it_was_renewed(
    redis: Redis, limiter: RedisLimiter
) -> None:
    scopes = tenant(tokens_per_minute=600, token_budget=1000, concurrent_requests=1)
    opening = record(prompt_tokens=70, user='Ünïcode \u0000\u2028 / "quoted"')
    await limiter.admit("acme", "req_1", scopes, 600, opening)
    moved(limiter, 10 * SECOND_US)
    assert await limiter.renew("acme", {"req_1": Progress(70, 30)}) == frozenset()
    moved(limiter, 30 * SECOND_US)
    assert await limiter.reclaim("acme") == 1
    assert await limiter.reclaim("acme") == 0
    answer = await admitted(limiter, "req_2", scopes)
    assert answer.tokens == Allowance(600, 499, 10_100_000)
    assert await redis.hgetall("tera:{acme}:budget:2027-01") == {b"tenant": b"100 1"}
    [(_, lost)] = await ledger(redis)
    expected = decode_record(opening)
    assert (lost.status, lost.completion_tokens, lost.prompt_tokens) == ("lost", 30, 70)
    assert (lost.started_s, lost.user, lost.first_token_s) == (
        expected.started_s,
        expected.user,
        None,
    )


async def test_an_opening_record_says_lost_whatever_it_said(
    redis: Redis, limiter: RedisLimiter
) -> None:
    await limiter.admit("acme", "req_1", [], 1, record(status="finished"))
    await limiter.admit("acme", "req_2", [], 1, b"no JSON")
    moved(limiter, 30 * SECOND_US)
    assert await limiter.reclaim("acme") == 2
    entries: Any = await redis.xrange("tera:{acme}:usage")
    assert [fields[b"id"] for _, fields in entries] == [b"req_1", b"req_2"]
    assert decode_record(entries[0][1][b"r"]).status == "lost"
    assert entries[1][1][b"r"] == b"no JSON"


async def test_a_lost_request_that_ends_after_all_is_recorded_as_it_ended(
    redis: Redis, limiter: RedisLimiter
) -> None:
    await admitted(limiter, "req_1", tenant(tokens_per_minute=600), 600)
    moved(limiter, 30 * SECOND_US)
    await limiter.reclaim("acme")
    assert not await limiter.settle("acme", "req_1", 600, record(status="finished"))
    kept = [entry async for entry in UsageLedger(redis).records("acme")]
    assert [entry.status for entry in kept] == ["finished"]
    assert (await admitted(limiter, "req_2", tenant(tokens_per_minute=600), 600)).tokens


async def test_a_request_that_is_renewed_in_time_stays_open(limiter: RedisLimiter) -> None:
    scopes = tenant(concurrent_requests=1)
    await admitted(limiter, "req_1", scopes)
    for completion_tokens in range(10):
        moved(limiter, 29 * SECOND_US)
        await limiter.renew("acme", {"req_1": Progress(1, completion_tokens)})
    assert await limiter.reclaim("acme") == 0
    assert (await refused(limiter, scopes)).kind == "concurrency"


async def test_renewing_tells_which_requests_are_not_open(limiter: RedisLimiter) -> None:
    for number in range(1200):
        await admitted(limiter, f"req-{number}", [])
    progress = {f"req-{number}": Progress(0, 0) for number in range(1201)}
    assert await limiter.renew("acme", progress) == {"req-1200"}
    moved(limiter, 29 * SECOND_US)
    assert await limiter.reclaim("acme") == 0
    assert await limiter.renew("acme", {}) == frozenset()


async def test_everything_that_a_dead_replica_left_is_reclaimed_of_all_tenants(
    redis: Redis, limiter: RedisLimiter
) -> None:
    scopes = tenant(concurrent_requests=250)
    for number in range(250):
        assert (await limiter.admit("a.b-c", f"a-{number}", scopes, 1, b"{}")).refusal is None
    await limiter.admit("other", "b", scopes, 1, b"{}")
    moved(limiter, 30 * SECOND_US)
    await limiter.admit("alive", "c", scopes, 1, b"{}")
    left = [name async for name in tenants_with_leases(redis)]
    assert sorted(left) == ["a.b-c", "alive", "other"]
    assert sum([await limiter.reclaim(name) for name in left]) == 251
    assert await redis.xlen("tera:{a.b-c}:usage") == 250
    assert await redis.hget("tera:{a.b-c}:limits", "tenant") == (
        f"{limiter.now_us} 0 0 0 0 0 0 0 0".encode()
    )
    assert await redis.keys("*:leases") == [b"tera:{alive}:leases"]


# Budgets


def micros(*date: int) -> int:
    return round(datetime(*date, tzinfo=UTC).timestamp()) * SECOND_US  # type: ignore[misc, arg-type]


@pytest.mark.parametrize(
    ("period", "last", "name"),
    [
        pytest.param("day", micros(2027, 1, 16), "2027-01-15", id="day"),
        pytest.param("day", micros(2027, 1, 1), "2026-12-31", id="last-day-of-a-year"),
        pytest.param("day", micros(2028, 3, 1), "2028-02-29", id="leap-day"),
        pytest.param("month", micros(2027, 2, 1), "2027-01", id="month"),
        pytest.param("month", micros(2028, 3, 1), "2028-02", id="leap-month"),
        pytest.param("month", micros(2100, 3, 1), "2100-02", id="no-leap-year"),
        pytest.param("month", micros(2029, 1, 1), "2028-12", id="end-of-a-leap-year"),
        pytest.param(None, micros(2027, 2, 1), "2027-01", id="a-month-unless-said"),
    ],
)
async def test_a_budget_is_of_a_calendar_day_or_month_in_utc(
    redis: Redis, calls: PipelinedRedis, period: str | None, last: int, name: str
) -> None:
    scopes = tenant(token_budget=10, budget_period=period)
    limiter = RedisLimiter(calls, now_us=last - 1)
    await admitted(limiter, "req_1", scopes, 10)
    assert await redis.hgetall(f"tera:{{acme}}:budget:{name}") == {b"tenant": b"0 10"}
    assert (await refused(limiter, scopes)).kind == "budget"
    moved(limiter, 1)
    await admitted(limiter, "req_2", scopes, 10)
    # The hold is settled where it was taken.
    await limiter.settle("acme", "req_1", 4, record())
    assert await redis.hgetall(f"tera:{{acme}}:budget:{name}") == {b"tenant": b"4 0"}
    assert (await refused(limiter, scopes)).kind == "budget"


async def test_every_day_has_the_name_that_the_calendar_gives_it(
    redis: Redis, limiter: RedisLimiter
) -> None:
    both = [
        Scope("tenant", Limits(token_budget=10**9, budget_period="day")),
        Scope("key:k", Limits(token_budget=10**9)),
    ]
    names = set()
    for days in range(0, 4 * 366, 5):
        limiter.now_us = micros(2026, 12, 30) + days * 86_400 * SECOND_US
        await admitted(limiter, f"req-{days}", both)
        await limiter.settle("acme", f"req-{days}", 1, b"{}")
        day = datetime.fromtimestamp(limiter.now_us / SECOND_US, UTC)
        names |= {day.strftime("tera:{acme}:budget:%Y-%m-%d").encode()}
        names |= {day.strftime("tera:{acme}:budget:%Y-%m").encode()}
    assert set(await redis.keys("*:budget:*")) == names


async def test_a_spent_budget_is_no_reason_to_wait_and_a_held_one_is(
    limiter: RedisLimiter,
) -> None:
    scopes = tenant(token_budget=100)
    await admitted(limiter, "req_1", scopes, 60)
    assert (await refused(limiter, scopes, 50)).retryable
    await limiter.settle("acme", "req_1", 60, record())
    assert not (await refused(limiter, scopes, 50)).retryable
    await admitted(limiter, "req_2", scopes, 40)


# Requests that were admitted while Redis was away


async def test_a_request_that_ran_without_redis_is_charged_once(
    redis: Redis, limiter: RedisLimiter
) -> None:
    scopes = tenant(tokens_per_minute=100, requests_per_minute=10, token_budget=1000)
    assert await limiter.charge("acme", "req_1", scopes, 60, record(status="finished"))
    assert not await limiter.charge("acme", "req_1", scopes, 60, record(status="finished"))
    answer = await admitted(limiter, "req_2", scopes)
    assert answer.requests == Allowance(10, 8, 12 * SECOND_US)
    assert answer.tokens == Allowance(100, 39, 36_600_000)
    assert await redis.hgetall("tera:{acme}:budget:2027-01") == {b"tenant": b"60 1"}
    assert [request_id for request_id, _ in await ledger(redis)] == [b"req_1", b"req_1"]


async def test_charges_of_a_long_outage_owe_one_minute_at_the_most(
    redis: Redis, limiter: RedisLimiter
) -> None:
    scopes = tenant(tokens_per_minute=100, requests_per_minute=10, token_budget=100_000)
    for number in range(50):
        assert await limiter.charge("acme", f"req-{number}", scopes, 60, b"{}")
    assert (await refused(limiter, scopes, 100)).wait_us == 60 * SECOND_US
    moved(limiter, 60 * SECOND_US)
    await admitted(limiter, "next", scopes, 100)
    assert await redis.hgetall("tera:{acme}:budget:2027-01") == {b"tenant": b"3000 100"}


async def test_charging_a_request_that_is_open_after_all_settles_it(
    redis: Redis, limiter: RedisLimiter
) -> None:
    scopes = tenant(tokens_per_minute=100, requests_per_minute=10, concurrent_requests=1)
    await admitted(limiter, "req_1", scopes, 50)
    assert await limiter.charge("acme", "req_1", scopes, 30, record(status="finished"))
    assert not await limiter.charge("acme", "req_1", scopes, 30, record(status="finished"))
    answer = await admitted(limiter, "req_2", scopes)
    assert answer.requests == Allowance(10, 8, 12 * SECOND_US)
    assert answer.tokens == Allowance(100, 69, 18_600_000)


# Redis


async def test_a_call_is_one_command_and_the_script_is_sent_when_redis_does_not_know_it(
    redis: Redis, limiter: RedisLimiter
) -> None:
    await admitted(limiter, "req_1", tenant(requests_per_minute=10))
    await redis.script_flush()
    await admitted(limiter, "req_2", tenant(requests_per_minute=10))
    await redis.config_resetstat()
    await admitted(limiter, "req_3", tenant(requests_per_minute=10))
    called: Any = await redis.info("commandstats")
    assert called["cmdstat_evalsha"]["calls"] == 1
    assert "cmdstat_eval" not in called


async def leave_one_of_each_key(limiter: RedisLimiter) -> None:
    scopes = tenant(**EVERY_LIMIT)
    for request_id in ("running", "renewed", "settled", "lost"):
        await admitted(limiter, request_id, scopes)
    await limiter.charge("acme", "charged", scopes, 1, b"{}")
    await limiter.settle("acme", "settled", 1, b"{}")
    moved(limiter, 20 * SECOND_US)
    await limiter.renew("acme", {name: Progress(0, 0) for name in ("running", "renewed")})
    moved(limiter, 10 * SECOND_US)
    await limiter.reclaim("acme")


async def test_all_keys_of_a_tenant_lie_in_one_slot_of_a_cluster(
    redis: Redis, limiter: RedisLimiter
) -> None:
    await leave_one_of_each_key(limiter)
    keys: Any = await redis.keys("*")
    assert len(keys) == 6
    assert {key_slot(key) for key in keys} == {key_slot(b"acme")}


async def test_every_key_expires_but_the_ledger(redis: Redis, limiter: RedisLimiter) -> None:
    for step in (leave_one_of_each_key(limiter), limiter.settle("acme", "running", 1, b"{}")):
        await step
        lasting = {key for key in await redis.keys("*") if await redis.ttl(key) < 0}
        assert lasting == {b"tera:{acme}:usage"}
    assert await redis.ttl("tera:{acme}:limits") > 24 * 3600
    await limiter.settle("acme", "renewed", 1, b"{}")
    assert set(await redis.keys("*")) == {
        b"tera:{acme}:" + name
        for name in (b"limits", b"budget:2027-01", b"charged:charged", b"usage")
    }
    # The buckets are full again within a second or so; a minute is spare.
    assert 55 < await redis.ttl("tera:{acme}:limits") <= 62
    assert 17 < await redis.ttl("tera:{acme}:budget:2027-01") / 86_400 < 18


async def test_limits_expire_when_the_last_bucket_is_full_and_not_before(
    redis: Redis, limiter: RedisLimiter
) -> None:
    slow = [Scope("key:slow", Limits(tokens_per_minute=60))]
    await admitted(limiter, "req_1", slow, 60)
    await limiter.settle("acme", "req_1", 60, b"{}")
    assert 115 < await redis.ttl("tera:{acme}:limits") <= 121
    await admitted(limiter, "req_2", tenant(requests_per_minute=6000))
    await limiter.settle("acme", "req_2", 1, b"{}")
    assert 115 < await redis.ttl("tera:{acme}:limits") <= 121
    await admitted(limiter, "req_3", [])
    await limiter.settle("acme", "req_3", 1, b"{}")
    assert 115 < await redis.ttl("tera:{acme}:limits") <= 121

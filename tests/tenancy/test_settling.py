from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest
from msgspec import structs
from tests.tenancy.limiting import tenant
from tests.tenancy.waiting import until

from tera.tenancy.redis_limits import RedisLimiter
from tera.tenancy.redis_watch import RedisWatch
from tera.tenancy.settling import BATCH, Settler
from tera.tenancy.usage import UsageLedger, UsageRecord, encode_record

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from redis.asyncio import Redis
    from tests.tenancy.conftest import FakeClock, RedisServer

    from tera.tenancy.pipelined import PipelinedRedis

RECORD = UsageRecord(
    "req_0", "acme", "key_1", "m", "/v1", "finished", 1_800_000_000.0, prompt_tokens=5
)


def named(request_id: str, **members: str) -> UsageRecord:
    return structs.replace(RECORD, request_id=request_id, **members)


@pytest.fixture
def limiter(calls: PipelinedRedis) -> RedisLimiter:
    return RedisLimiter(calls)


@pytest.fixture
async def watch(calls: PipelinedRedis, clock: FakeClock) -> AsyncIterator[RedisWatch]:
    async with RedisWatch(calls, "one", clock, 0.01) as running:
        yield running


async def ledger(redis: Redis) -> set[str]:
    kept = UsageLedger(redis).records(since_s=0, until_s=4e9)
    return {record.request_id async for record in kept}


@asynccontextmanager
async def settling(settler: Settler) -> AsyncIterator[Settler]:
    async with settler:
        yield settler
    await settler.drain()


async def test_requests_are_settled_whether_redis_admitted_them_or_not(
    redis: Redis, limiter: RedisLimiter, watch: RedisWatch
) -> None:
    scopes = tenant(token_budget=100)
    await limiter.admit("acme", "admitted", scopes, 50, encode_record(RECORD))
    async with settling(Settler(limiter, watch)) as settler:
        settler.add(named("admitted"), None)
        settler.add(named("ran-here"), scopes)
        await until(lambda: not settler.unsettled)
        assert await redis.exists("tera:{acme}:open") == 0
        (budget,) = await redis.keys("tera:{acme}:budget:*")
        assert await redis.hget(budget, "tenant") == b"10 0"
    assert await ledger(redis) == {"admitted", "ran-here"}


async def test_many_are_settled_in_few_round_trips(
    redis: Redis, limiter: RedisLimiter, watch: RedisWatch
) -> None:
    await limiter.settle("acme", "req_0", 0, encode_record(RECORD))  # loads the script
    async with settling(Settler(limiter, watch)) as settler:
        before = (await redis.info("stats"))["total_reads_processed"]
        for number in range(3 * BATCH):
            settler.add(named(f"req-{number}"), None)
        await until(lambda: not settler.unsettled)
        reads = (await redis.info("stats"))["total_reads_processed"] - before
    # A batch is more than Redis reads at once.
    assert reads <= 20
    assert len(await ledger(redis)) == 3 * BATCH + 1


async def test_what_fails_with_redis_is_settled_when_it_is_back(
    redis_server: RedisServer, redis: Redis, limiter: RedisLimiter, watch: RedisWatch
) -> None:
    async with settling(Settler(limiter, watch)) as settler:
        redis_server.kill()
        settler.add(named("first"), None)
        await until(lambda: watch.away)
        settler.add(named("second"), None)
        assert settler.unsettled == 2
        redis_server.start()
        await until(lambda: not settler.unsettled)
        assert settler.given_up == 0
    assert await ledger(redis) == {"first", "second"}


async def test_the_oldest_are_given_up_to_the_log_when_there_are_too_many(
    redis: Redis, limiter: RedisLimiter, watch: RedisWatch, caplog: pytest.LogCaptureFixture
) -> None:
    settler = Settler(limiter, watch, most_unsettled=2)
    for name in ("first", "second", "third"):
        settler.add(named(name), None)
    assert (settler.unsettled, settler.given_up) == (2, 1)
    (told,) = caplog.records
    assert told.message == (
        "Not in the ledger (Redis has been away for too long): "
        f"{encode_record(named('first')).decode()}"
    )
    await settler.drain()
    assert await ledger(redis) == {"second", "third"}


async def test_a_request_that_redis_refuses_is_given_up_and_the_others_are_not(
    redis: Redis, limiter: RedisLimiter, watch: RedisWatch, caplog: pytest.LogCaptureFixture
) -> None:
    await redis.set("tera:{broken}:usage", "not a stream")
    async with settling(Settler(limiter, watch)) as settler:
        settler.add(named("refused", tenant="broken"), None)
        settler.add(named("other"), None)
        await until(lambda: not settler.unsettled)
        assert settler.given_up == 1
        assert not watch.away
    assert await ledger(redis) == {"other"}
    assert "WRONGTYPE" in caplog.text


async def test_what_is_left_at_the_end_is_in_the_log(
    redis_server: RedisServer,
    limiter: RedisLimiter,
    watch: RedisWatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with Settler(limiter, watch) as settler:
        redis_server.kill()
        for number in range(BATCH + 1):
            settler.add(named(f"req-{number}"), None)
    await settler.drain()
    assert (settler.unsettled, settler.given_up) == (0, BATCH + 1)
    assert "this replica ends while Redis is away" in caplog.text
    assert f"req-{BATCH}" in caplog.text


class FailingOnce(RedisLimiter):
    """Fails in a way that nobody has thought of."""

    failed = False

    async def end_all(self, requests: object) -> list[None]:  # type: ignore[override]
        if not self.failed:
            self.failed = True
            raise RuntimeError("out of paper")
        return await super().end_all(requests)  # type: ignore[arg-type,return-value]


async def test_a_defect_is_told_and_settling_goes_on(
    redis: Redis, calls: PipelinedRedis, watch: RedisWatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with settling(Settler(FailingOnce(calls), watch)) as settler:
        settler.add(named("req"), None)
        await until(lambda: not settler.unsettled)
    assert await ledger(redis) == {"req"}
    assert "out of paper" in caplog.text


async def test_what_is_interrupted_is_settled_by_the_drain(
    redis_server: RedisServer, redis: Redis, calls: PipelinedRedis, watch: RedisWatch
) -> None:
    async with settling(Settler(RedisLimiter(calls), watch)) as settler:
        redis_server.stop()
        settler.add(named("req"), None)
        await until(lambda: calls.waiting > 0)
        redis_server.cont()
    assert await ledger(redis) == {"req"}

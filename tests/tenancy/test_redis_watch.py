from __future__ import annotations

import asyncio
import logging
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError
from tests.tenancy.conftest import PATIENT
from tests.tenancy.scripted import ScriptedRedis
from tests.tenancy.waiting import until

from tera.tenancy.pipelined import PipelinedRedis
from tera.tenancy.redis import connect
from tera.tenancy.redis_watch import PROBE, RedisWatch

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from redis.asyncio import Redis
    from tests.tenancy.conftest import FakeClock, RedisServer

LOST = RedisConnectionError("the connection was lost")


@asynccontextmanager
async def watching(calls: PipelinedRedis, clock: FakeClock) -> AsyncIterator[RedisWatch]:
    async with RedisWatch(calls, "one", clock, 0.01) as watch:
        yield watch


async def test_redis_is_away_from_the_first_failure_until_a_probe_has_written(
    redis: Redis, calls: PipelinedRedis, clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "tera")
    async with watching(calls, clock) as watch:
        await watch.wait_until_back()
        assert not watch.away
        watch.mark_away(LOST)
        watch.mark_away(LOST)
        assert watch.away
        assert watch.outages == 1
        await watch.wait_until_back()
        assert not watch.away
        assert 0 < await redis.ttl(PROBE + "one") <= 10
        watch.mark_away(LOST)
        assert watch.outages == 2
        await watch.wait_until_back()
    told = [record.message.split(" (")[0].split(" after")[0] for record in caplog.records]
    assert told == ["Redis is away", "Redis is back"] * 2


async def test_a_server_that_is_not_there_stays_away_until_it_answers(
    redis_server: RedisServer, calls: PipelinedRedis, clock: FakeClock
) -> None:
    async with watching(calls, clock) as watch:
        redis_server.kill()
        watch.mark_away(LOST)
        back = asyncio.create_task(watch.wait_until_back())
        with pytest.raises(RedisConnectionError):
            await calls.open()
        assert not back.done()
        redis_server.start()
        await back


@pytest.mark.parametrize(
    ("setting", "broken", "mended"),
    [
        pytest.param("maxmemory", 1, 0, id="full"),
        pytest.param("min-replicas-to-write", 1, 0, id="too-few-replicas"),
    ],
)
async def test_a_server_that_answers_and_takes_no_writes_is_away(
    redis: Redis, calls: PipelinedRedis, clock: FakeClock, setting: str, broken: int, mended: int
) -> None:
    await redis.config_set(setting, broken)
    async with watching(calls, clock) as watch:
        watch.mark_away(LOST)

        async def probed() -> bool:
            stats = await redis.info("commandstats")
            found = stats.get("cmdstat_set", {"rejected_calls": 0, "failed_calls": 0})
            return int(found["rejected_calls"] + found["failed_calls"]) >= 3

        await until(probed)
        assert watch.away
        await redis.config_set(setting, mended)
        await watch.wait_until_back()


@pytest.mark.parametrize("words", [b"-ERR not today\r\n", b"-WRONGTYPE what is this\r\n"])
async def test_no_error_ends_the_probing(clock: FakeClock, words: bytes) -> None:
    async with ScriptedRedis() as server, connect(server.url, timeout_s=10.0) as client:
        calls = PipelinedRedis(client.connection_pool, PATIENT)
        async with RedisWatch(calls, "one", clock, 0.01) as watch:
            watch.mark_away(LOST)
            assert await server.asked.get() == b"SET"
            server.say(words)
            assert await server.asked.get() == b"SET"
            assert watch.away
            server.say(b"+OK\r\n")
            await watch.wait_until_back()
        await calls.aclose()

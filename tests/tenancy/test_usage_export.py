from __future__ import annotations

import asyncio
import json
import signal
import sys
import threading
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from redis import Redis as BlockingRedis
from tests.tenancy.test_usage import DAY_S, NOON_S, append, append_raw, record

from tera.config.gateway import UsageConfig
from tera.errors import InternalError
from tera.tenancy import usage_export
from tera.tenancy.usage import UsageRecord, position_of, stream_of
from tera.tenancy.usage_export import LOCK, ExportBusyError, UsageExporter, read_export

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from redis.asyncio import Redis
    from tests.tenancy.conftest import RedisServer

FOR_EVER_DAYS = 100_000
"""A retention under which the fixed times of these tests are not old."""
SOON_S = 5.0


def exporter(redis: Redis, directory: Path | None, **options: Any) -> UsageExporter:
    days = options.pop("retention_days", FOR_EVER_DAYS)
    name = "" if directory is None else str(directory)
    config = UsageConfig(export_directory=name, retention_days=days)
    return UsageExporter(redis, lambda: config, **options)


def ids(directory: Path, **options: Any) -> list[str]:
    return sorted(one.request_id for one in read_export(directory, **options))


def files(directory: Path) -> list[Path]:
    return sorted(directory.rglob("*.jsonl"))


def lines(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for file in files(directory) for line in file.read_text().splitlines()]


async def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SOON_S
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        await asyncio.sleep(0.01)


def is_in(directory: Path, request_id: str) -> bool:
    return request_id in ids(directory)


class TestFiles:
    async def test_there_is_one_for_each_hour_in_which_requests_began(
        self, redis: Redis, tmp_path: Path
    ) -> None:
        records = [
            record("r1", NOON_S - 0.001),
            record("r2", NOON_S, duration_s=4000.0),
            record("r3", NOON_S + 1, tenant="beta"),
            record("r4", NOON_S + DAY_S),
        ]
        await append(redis, *records)
        assert await exporter(redis, tmp_path).export() == 4
        names = [str(file.relative_to(tmp_path)) for file in files(tmp_path)]
        assert names == ["2027/01/31/11.jsonl", "2027/01/31/12.jsonl", "2027/02/01/12.jsonl"]
        assert sorted(read_export(tmp_path), key=lambda one: one.request_id) == records
        place = f"{int(NOON_S * 1000) + 999}-0"
        (line,) = [line for line in lines(tmp_path) if line["request_id"] == "r1"]
        assert line["entry"] == place

    async def test_only_what_is_new_is_written(
        self, redis: Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(usage_export, "PAGE_ENTRIES", 2)
        await append(redis, *(record(f"r{number}") for number in range(5)))
        assert await exporter(redis, tmp_path).export() == 5
        await append(redis, record("r5"))
        assert await exporter(redis, tmp_path).export() == 1
        assert await exporter(redis, tmp_path).export() == 0
        assert len(lines(tmp_path)) == 6

    async def test_the_last_entry_of_a_request_is_right(
        self, redis: Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        finished = record("r1", completion_tokens=9)
        await append(redis, record("r1", status="lost"), record("r2"))
        await exporter(redis, tmp_path).export()
        await append(redis, finished, at_s=NOON_S + 7200)
        await exporter(redis, tmp_path).export()
        for pass_bytes in (1 << 28, 200, 1):
            monkeypatch.setattr(usage_export, "_PASS_BYTES", pass_bytes)
            found = sorted(read_export(tmp_path), key=lambda one: one.request_id)
            assert found == [finished, record("r2")]

    async def test_readers_choose_by_the_start_of_requests(
        self, redis: Redis, tmp_path: Path
    ) -> None:
        await append(redis, *(record(f"r{hour}", NOON_S + 3600 * hour) for hour in range(4)))
        await exporter(redis, tmp_path).export()
        assert ids(tmp_path, since_s=NOON_S + 3600, until_s=NOON_S + 3 * 3600) == ["r1", "r2"]
        assert ids(tmp_path, since_s=NOON_S + 1, until_s=NOON_S + 3600.5) == ["r1"]

    async def test_a_torn_line_takes_no_other_along(
        self, redis: Redis, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        await append(redis, record("r1"), record("r2"))
        await exporter(redis, tmp_path).export()
        (file,) = files(tmp_path)
        whole = file.read_bytes()
        file.write_bytes(whole[:-20])
        assert ids(tmp_path) == ["r1"]
        await redis.delete(position_of("acme"))
        await append(redis, record("r3"))
        await exporter(redis, tmp_path).export()
        assert ids(tmp_path) == ["r1", "r2", "r3"]
        assert file.read_bytes().startswith(whole[:-20] + b"\n")
        assert "1 line(s) cannot be read" in caplog.text

    async def test_a_damaged_entry_is_told_and_takes_no_other_along(
        self, redis: Redis, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        damaged = {"id": "r0", "r": '{"user": "secret"'}
        place = await append_raw(redis, "acme", damaged, NOON_S)
        await append(redis, record("r1"))
        await exporter(redis, tmp_path).export()
        assert ids(tmp_path) == ["r1"]
        assert place in caplog.text
        assert "secret" not in caplog.text

    async def test_a_directory_that_cannot_be_written_loses_nothing(
        self, redis: Redis, tmp_path: Path
    ) -> None:
        await append(redis, record("r1"))
        (tmp_path / "file").touch()
        with pytest.raises(OSError, match="file"):
            await exporter(redis, tmp_path / "file", retention_days=1).export()
        assert await redis.xlen(stream_of("acme")) == 1
        assert await exporter(redis, tmp_path / "folder").export() == 1


class TestOneAtATime:
    # U-2: at least once in the files, once for who reads them.
    async def test_an_exporter_killed_before_it_remembers_loses_and_doubles_nothing(
        self, redis: Redis, redis_server: RedisServer, tmp_path: Path
    ) -> None:
        await append(redis, record("r1", status="lost"), record("r1"), record("r2"))
        killed = f"""
import asyncio, os, signal, sys
from tera.config.gateway import UsageConfig
from tera.tenancy import usage_export
from tera.tenancy.redis import connect

write = usage_export._write
def write_and_die(*arguments):
    write(*arguments)
    os.kill(os.getpid(), signal.SIGKILL)
usage_export._write = write_and_die

async def main():
    config = UsageConfig(export_directory={str(tmp_path)!r}, retention_days={FOR_EVER_DAYS})
    redis = connect({redis_server.url!r}, timeout_s=5)
    await usage_export.UsageExporter(redis, lambda: config).export()
asyncio.run(main())
"""
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", killed)
        assert await process.wait() == -signal.SIGKILL
        assert len(lines(tmp_path)) == 3
        with pytest.raises(ExportBusyError):
            await exporter(redis, tmp_path).export()
        assert 0 < await redis.pttl(LOCK) <= 30_000
        await redis.delete(LOCK)  # as it does by itself
        assert await exporter(redis, tmp_path).export() == 3
        assert len(lines(tmp_path)) == 6
        found = sorted(read_export(tmp_path), key=lambda one: one.request_id)
        assert found == [record("r1"), record("r2")]

    async def test_of_two_at_once_one_is_refused(
        self, redis: Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(usage_export, "PAGE_ENTRIES", 1)
        await append(redis, *(record(f"r{number}") for number in range(20)))
        done = await asyncio.gather(
            *(exporter(redis, tmp_path).export() for _ in range(4)), return_exceptions=True
        )
        assert sum(isinstance(outcome, ExportBusyError) for outcome in done) == 3
        assert len(lines(tmp_path)) == 20
        assert await exporter(redis, tmp_path).export() == 0

    async def test_one_that_was_frozen_and_goes_on_spoils_nothing(
        self, redis: Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        thaw, frozen, write = threading.Event(), threading.Event(), usage_export._write

        def write_late(*arguments: Any) -> None:
            if not frozen.is_set():
                frozen.set()
                assert thaw.wait(SOON_S)
            write(*arguments)

        monkeypatch.setattr(usage_export, "_write", write_late)
        await append(redis, record("r1", status="lost"))
        early = asyncio.create_task(exporter(redis, tmp_path).export())
        await eventually(frozen.is_set)
        await redis.delete(LOCK)  # as it does by itself
        await append(redis, record("r1"))
        assert await exporter(redis, tmp_path).export() == 2
        position = await redis.get(position_of("acme"))
        thaw.set()
        await early
        assert [line["status"] for line in lines(tmp_path)] == ["lost", "finished", "lost"]
        assert list(read_export(tmp_path)) == [record("r1")]
        assert await redis.get(position_of("acme")) == position

    async def test_another_that_took_over_ends_a_pass(
        self, redis: Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(usage_export, "_LOCK_S", 0.0)  # renewed before every page
        await append(redis, record("r1"))
        await redis.set(LOCK, "another")
        lock = usage_export._Lock(redis)
        with pytest.raises(ExportBusyError):
            await lock.renew()
        await lock.release(0)
        assert await redis.get(LOCK) == b"another"


class TestTrimming:
    """Entries' times are real here: Redis's clock says what is old."""

    def now_s(self) -> float:
        return float(int(time.time()))

    async def fill(self, redis: Redis, *ages_s: float) -> None:
        for age_s in sorted(ages_s, reverse=True):
            await append(redis, record(f"age-{age_s}", self.now_s() - age_s))

    @pytest.mark.parametrize("exports", [True, False])
    async def test_what_is_older_than_the_retention_leaves_redis(
        self, redis: Redis, tmp_path: Path, exports: bool
    ) -> None:
        await self.fill(redis, 5, 1.9 * DAY_S, 2.1 * DAY_S, 40 * DAY_S)
        directory = tmp_path if exports else None
        await exporter(redis, directory, retention_days=2).export()
        entries: Any = await redis.xrange(stream_of("acme"))
        left = [json.loads(entry[b"r"]) for _, entry in entries]
        assert [one["request_id"] for one in left] == [f"age-{1.9 * DAY_S}", "age-5"]
        assert len(ids(tmp_path)) == (4 if exports else 0)

    async def test_what_is_not_exported_is_never_trimmed(
        self, redis: Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*arguments: Any) -> None:
            raise OSError("the disk is full")

        await self.fill(redis, 5, 3 * DAY_S)
        with monkeypatch.context() as patch:
            patch.setattr(usage_export, "_write", full)
            for _ in range(2):
                with pytest.raises(OSError, match="full"):
                    await exporter(redis, tmp_path, retention_days=2).export()
        assert await redis.xlen(stream_of("acme")) == 2
        assert await exporter(redis, tmp_path, retention_days=2).export() == 2
        assert await redis.xlen(stream_of("acme")) == 1

    async def test_an_idle_tenant_leaves_nothing_in_redis(
        self, redis: Redis, tmp_path: Path
    ) -> None:
        await self.fill(redis, 3 * DAY_S)
        await exporter(redis, tmp_path, retention_days=2).export()
        assert await redis.keys("*") == []
        await self.fill(redis, 5)
        assert await exporter(redis, tmp_path, retention_days=2).export() == 1

    async def test_a_long_backlog_is_trimmed_bit_by_bit(
        self, redis: Redis, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(usage_export, "TRIM_ENTRIES", 300)
        async with redis.pipeline(transaction=False) as pipeline:
            for number in range(2050):
                pipeline.xadd(stream_of("acme"), {"id": "r", "r": "{}"}, id=f"{number + 1}-0")
            await pipeline.execute()
        await self.fill(redis, 5)
        await exporter(redis, None, retention_days=2).export()
        assert await redis.xlen(stream_of("acme")) == 1


class TestInTheBackground:
    async def test_new_records_are_exported_until_the_block_ends(
        self, redis: Redis, tmp_path: Path
    ) -> None:
        async with exporter(redis, tmp_path, interval_s=0.02):
            for number in range(3):
                await append(redis, record(f"r{number}"))
                await eventually(partial(is_in, tmp_path, f"r{number}"))
        await append(redis, record("late"))
        assert "late" not in ids(tmp_path)

    async def test_another_rests_between_the_passes_and_one_by_hand_does_not(
        self, redis: Redis, redis_server: RedisServer, tmp_path: Path
    ) -> None:
        await append(redis, record("r1"))
        async with exporter(redis, tmp_path, interval_s=60):
            await eventually(lambda: ids(tmp_path) == ["r1"])
            with BlockingRedis.from_url(redis_server.url) as blocking:
                await eventually(lambda: blocking.get(LOCK) == b"resting")
            with pytest.raises(ExportBusyError):
                await usage_export._Lock(redis).acquire(by_hand=False)
            assert 0 < await redis.pttl(LOCK) <= 60_000
            await append(redis, record("r2"))
            assert await exporter(redis, tmp_path).export() == 1

    async def test_it_outlives_redis(
        self, redis: Redis, redis_server: RedisServer, tmp_path: Path
    ) -> None:
        async with exporter(redis, tmp_path, interval_s=0.02):
            redis_server.kill()
            with pytest.raises(InternalError):
                await exporter(redis, tmp_path).export()
            redis_server.start()
            await append(redis, record("r1"))
            await eventually(lambda: ids(tmp_path) == ["r1"])

    async def test_it_follows_the_configuration(self, redis: Redis, tmp_path: Path) -> None:
        config = UsageConfig(retention_days=FOR_EVER_DAYS)
        async with UsageExporter(redis, lambda: config, interval_s=0.02):
            await append(redis, record("r1"))
            config = config.model_copy(update={"export_directory": str(tmp_path)})
            await eventually(lambda: ids(tmp_path) == ["r1"])

    async def test_it_ends_whatever_it_is_doing(self, redis: Redis, tmp_path: Path) -> None:
        await append(redis, *(record(f"r{number}") for number in range(20)))
        for turns in range(30):
            async with asyncio.timeout(SOON_S), exporter(redis, tmp_path, interval_s=0.001):
                for _ in range(turns):
                    await asyncio.sleep(0)


def test_nothing_is_read_where_nothing_is(tmp_path: Path) -> None:
    assert list[UsageRecord](read_export(tmp_path / "none")) == []


@pytest.mark.parametrize("damaged", ["no place", "of another kind"])
async def test_u2_one_tenants_damaged_keys_keep_no_other_tenant_from_the_files(
    redis: Redis, tmp_path: Path, caplog: pytest.LogCaptureFixture, damaged: str
) -> None:
    tenants = [f"t{number}" for number in range(20)]
    for tenant in tenants:
        await append(redis, record(f"r-{tenant}", tenant=tenant))
    if damaged == "no place":
        await redis.set(position_of("t7"), "nowhere")
    else:
        await redis.lpush(position_of("t7"), "something")
    await exporter(redis, tmp_path).export()
    assert ids(tmp_path) == sorted(f"r-{tenant}" for tenant in tenants if tenant != "t7")
    (told,) = [each.message for each in caplog.records if each.levelname == "ERROR"]
    assert "'t7'" in told

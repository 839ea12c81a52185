from __future__ import annotations

import calendar
import json
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tera.errors import InternalError
from tera.tenancy import usage
from tera.tenancy.usage import (
    UsageLedger,
    UsageRecord,
    UsageRow,
    decode_record,
    encode_record,
    stream_of,
    total_of,
)

if TYPE_CHECKING:
    from redis.asyncio import Redis
    from tests.tenancy.conftest import RedisServer

NOON_S = float(calendar.timegm((2027, 1, 31, 12, 0, 0)))
DAY_S = 86400.0


def record(request_id: str, started_s: float = NOON_S, **changes: Any) -> UsageRecord:
    facts: dict[str, Any] = {
        "tenant": "acme",
        "key_id": "key_1",
        "model": "llama-8b",
        "route": "/v1/completions",
        "status": "finished",
        "prompt_tokens": 10,
        "completion_tokens": 5,
        "duration_s": 1.0,
    }
    return UsageRecord(request_id=request_id, started_s=started_s, **{**facts, **changes})


async def append(redis: Redis, *records: UsageRecord, at_s: float | None = None) -> None:
    """Write entries as `limits.lua` does, at the time of each record's end or at a given one."""
    for one in records:
        end_s = one.started_s + one.duration_s if at_s is None else at_s
        await append_raw(redis, one.tenant, {"id": one.request_id, "r": encode_record(one)}, end_s)


async def append_raw(redis: Redis, tenant: str, entry: dict[Any, Any], at_s: float) -> str:
    """Write an entry at a time, or right after the last one if that is later, as Redis does."""
    newest: Any = await redis.xrevrange(stream_of(tenant), count=1)
    last_ms, last_number = map(int, newest[0][0].split(b"-")) if newest else (-1, 0)
    at_ms = round(at_s * 1000)
    place = f"{at_ms}-0" if at_ms > last_ms else f"{last_ms}-{last_number + 1}"
    await redis.xadd(stream_of(tenant), entry, id=place)
    return place


async def read(ledger: UsageLedger, *arguments: Any, **options: Any) -> list[UsageRecord]:
    return [one async for one in ledger.records(*arguments, **options)]


@pytest.fixture
def ledger(redis: Redis) -> UsageLedger:
    return UsageLedger(redis)


class TestRecord:
    # U-1: what a record holds, and what it does not.
    def test_it_says_nothing_of_prompt_or_answer(self) -> None:
        assert UsageRecord.__struct_fields__ == (
            *("request_id", "tenant", "key_id", "model", "route", "status", "started_s"),
            *("prompt_tokens", "cached_tokens", "completion_tokens", "code", "first_token_s"),
            *("duration_s", "replica_switches", "user"),
        )

    def test_members_of_a_later_version_are_ignored(self) -> None:
        later = {**json.loads(encode_record(record("r"))), "colour": "red"}
        assert decode_record(json.dumps(later).encode()) == record("r")

    @pytest.mark.parametrize("started_s", [-1.0, 1e300, 253_402_300_800.0])
    def test_what_no_calendar_has_is_refused(self, started_s: float) -> None:
        data = encode_record(record("r")).replace(str(NOON_S).encode(), str(started_s).encode())
        with pytest.raises(msgspec.ValidationError):
            decode_record(data)

    @settings(max_examples=50)
    @given(st.builds(record, st.text(max_size=8), st.floats(0, 4e9), user=st.text(max_size=8)))
    def test_it_comes_back_as_it_was(self, one: UsageRecord) -> None:
        assert decode_record(encode_record(one)) == one

    async def test_lua_can_count_it_as_lost_and_changes_nothing_else(self, redis: Redis) -> None:
        opening = record(
            "req_1", 1_795_573_101.599791, status="lost", first_token_s=None, user='ä"\n'
        )
        script = """
        local r = cjson.decode(ARGV[1])
        r['status'] = 'lost'
        r['completion_tokens'] = tonumber(ARGV[2])
        return cjson.encode(r)
        """
        lost = await redis.eval(script, 0, encode_record(opening), "7")
        assert decode_record(lost) == msgspec.structs.replace(opening, completion_tokens=7)


class TestRecords:
    async def test_the_last_entry_of_a_request_is_right(
        self, redis: Redis, ledger: UsageLedger, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        lost, finished = record("r0", status="lost"), record("r0", completion_tokens=9)
        others = [record(f"r{number}", NOON_S + number) for number in range(1, 8)]
        await append(redis, lost, *others)
        await append(redis, finished, finished, at_s=NOON_S + 60)
        for page, passes in ((1000, 1000), (3, 1000), (2, 3), (1, 1)):
            monkeypatch.setattr(usage, "PAGE_ENTRIES", page)
            monkeypatch.setattr(usage, "PASS_ENTRIES", passes)
            found = await read(ledger)
            assert sorted(found, key=lambda one: one.request_id) == [finished, *others]

    async def test_a_time_means_the_start_of_requests(
        self, redis: Redis, ledger: UsageLedger
    ) -> None:
        for number, duration_s in enumerate((0.0, 3000.0)):
            one = record(f"r{number}", NOON_S + number, duration_s=duration_s)
            await append(redis, one)

        async def ids(since_s: float, until_s: float | None) -> set[str]:
            found = await read(ledger, since_s=since_s, until_s=until_s)
            return {one.request_id for one in found}

        assert await ids(NOON_S, None) == {"r0", "r1"}
        assert await ids(NOON_S, NOON_S + 1) == {"r0"}
        assert await ids(NOON_S + 1, NOON_S + 2) == {"r1"}
        assert await ids(NOON_S + 2, None) == set()

    async def test_a_gateway_whose_clock_is_ahead_is_heard(
        self, redis: Redis, ledger: UsageLedger
    ) -> None:
        await append(redis, record("r", NOON_S), at_s=NOON_S - 200)
        assert len(await read(ledger, since_s=NOON_S)) == 1

    async def test_all_tenants_or_one(self, redis: Redis, ledger: UsageLedger) -> None:
        for tenant in ("acme", "beta.eu_1-x"):
            await append(redis, record(f"r-{tenant}", tenant=tenant))
        await redis.set("tera:{gamma}:usage", "no stream")
        await redis.xadd("tera:{a}:budget:{x}:usage", {"id": "1"})
        assert await ledger.tenants() == ["acme", "beta.eu_1-x"]
        assert [one.tenant for one in await read(ledger)] == ["acme", "beta.eu_1-x"]
        assert [one.tenant for one in await read(ledger, "acme")] == ["acme"]
        assert await read(ledger, "nobody") == []

    async def test_what_is_appended_meanwhile_is_left_out(
        self, redis: Redis, ledger: UsageLedger, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(usage, "PAGE_ENTRIES", 1)
        await append(redis, record("r0"), record("r1"))
        found = []
        async for one in ledger.records():
            found.append(one.request_id)
            await append(redis, record(f"{one.request_id}-later", NOON_S + 60))
        assert sorted(found) == ["r0", "r1"]

    async def test_a_damaged_entry_takes_no_other_along(
        self, redis: Redis, ledger: UsageLedger, caplog: pytest.LogCaptureFixture
    ) -> None:
        for fields in ({"id": "a"}, {"r": "{"}, {"r": b"\xff"}, {"r": '{"request_id": "secret"}'}):
            await append_raw(redis, "acme", fields, NOON_S)
        await append(redis, record("r"))
        assert await read(ledger) == [record("r")]
        assert caplog.text.count("cannot be read") == 4
        assert "secret" not in caplog.text

    async def test_redis_away_is_an_error_of_ours(
        self, ledger: UsageLedger, redis_server: RedisServer
    ) -> None:
        redis_server.kill()
        with pytest.raises(InternalError):
            await read(ledger)
        with pytest.raises(InternalError):
            await read(ledger, "acme")


class TestSummary:
    async def test_sums_are_by_tenant_model_and_day_in_utc(
        self, redis: Redis, ledger: UsageLedger
    ) -> None:
        midnight_s = NOON_S + DAY_S / 2
        await append(
            redis,
            record("r1", cached_tokens=4),
            record("r2", status="failed", completion_tokens=0),
            record("r3", status="lost"),
            record("r4", midnight_s - 0.001, model="other"),
            record("r5", midnight_s, status="cancelled"),
            record("r6", tenant="beta"),
        )
        await append(redis, record("r3"), at_s=midnight_s + 60)
        rows = await ledger.summary()
        assert rows == [
            UsageRow("acme", "llama-8b", "2027-01-31", 3, 30, 4, 10, failed=1),
            UsageRow("acme", "llama-8b", "2027-02-01", 1, 10, 0, 5, cancelled=1),
            UsageRow("acme", "other", "2027-01-31", 1, 10, 0, 5),
            UsageRow("beta", "llama-8b", "2027-01-31", 1, 10, 0, 5),
        ]
        assert total_of(rows) == UsageRow("", "", "", 6, 60, 4, 25, 1, 1, 0)
        assert await ledger.summary("beta", since_s=NOON_S) == rows[3:]

    async def test_nothing_has_no_rows(self, ledger: UsageLedger) -> None:
        assert await ledger.summary() == []
        assert total_of([]) == UsageRow("", "", "")

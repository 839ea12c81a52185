"""How a snapshot follows changes of keys and tenants, and says when a key was used."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

import pytest
from tests.tenancy.conftest import PEPPER
from tests.tenancy.snapshots import NEVER_S, SOON_S, accepts, eventually

from tera.config.limits import Limits, TenantLimits
from tera.tenancy import key_table
from tera.tenancy.key_store import KeyStore
from tera.tenancy.keys import (
    CHANGED,
    KEYS,
    LAST_USED,
    TENANTS,
    VERSION,
    ApiKey,
    decode_keys,
    encode_key,
)
from tera.tenancy.snapshot import PAGE_RECORDS, KeySnapshot
from tera.tenancy.tenants import BLOCKED, TenantStore

if TYPE_CHECKING:
    from collections.abc import Mapping

    from redis.asyncio import Redis
    from tests.tenancy.conftest import FakeClock, RedisServer


async def commands(redis: Redis) -> dict[str, int]:
    stats = await redis.info("commandstats")
    return {name.removeprefix("cmdstat_"): found["calls"] for name, found in stats.items()}


async def test_a_change_of_one_key_reads_that_key_alone(
    redis: Redis, store: KeyStore, clock: FakeClock
) -> None:
    old = await store.create("team-a")
    async with KeySnapshot(redis, PEPPER, clock, NEVER_S) as snapshot:
        await eventually(lambda: accepts(snapshot, old.key))
        made = await store.create("team-a")  # with it the confirmation has been read too
        await eventually(lambda: accepts(snapshot, made.key))
        before = await commands(redis)
        new = (await store.rotate(old.record.key_id, grace_s=0)).new
        await eventually(lambda: accepts(snapshot, new.key))
        await store.revoke(made.record.key_id)
        await eventually(lambda: not accepts(snapshot, made.key))
        assert not accepts(snapshot, old.key)
        await TenantStore(redis).set("team-a", BLOCKED)
        await eventually(lambda: snapshot.tenant_limits("team-a") == BLOCKED)
        after = await commands(redis)
        whole = ("hscan", "hgetall")
        assert [after.get(name) for name in whole] == [before.get(name) for name in whole]
        assert snapshot.version == 5


@pytest.mark.parametrize(
    "message",
    [
        pytest.param("2", id="of an older writer"),
        pytest.param("7 key:{key_id}", id="after one that was lost"),
        pytest.param("1 key:{key_id}", id="of a server that counts anew"),
        pytest.param("2 door:{key_id}", id="of a newer writer"),
    ],
)
async def test_a_message_that_does_not_say_all_that_changed_is_read_as_a_change_of_all(
    redis: Redis, store: KeyStore, clock: FakeClock, message: str
) -> None:
    one, other = [await store.create("team-a") for _ in range(2)]
    await redis.set(VERSION, 1)
    async with KeySnapshot(redis, PEPPER, clock, NEVER_S) as snapshot:
        await eventually(lambda: accepts(snapshot, other.key))
        await redis.hdel(KEYS, other.record.key_id)
        await redis.set(VERSION, 2)
        await redis.publish(CHANGED, message.format(key_id=one.record.key_id))
        await eventually(lambda: not accepts(snapshot, other.key))
        assert accepts(snapshot, one.key)


async def test_x1_many_keys_are_read_in_turns_between_which_other_work_goes_on(
    redis: Redis, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    records: dict[Any, Any] = {
        f"key_{number:024}": encode_key(
            ApiKey(f"key_{number:024}", "team-a", f"{number:064}", "", None, 0.0)
        )
        for number in range(20 * PAGE_RECORDS)
    }
    await redis.hset(KEYS, mapping=records)
    turns: dict[int, int] = {}
    turn = 0

    def counted(stored: Mapping[bytes, bytes]) -> list[ApiKey]:
        turns[turn] = turns.get(turn, 0) + len(stored)
        return decode_keys(stored)

    monkeypatch.setattr(key_table, "decode_keys", counted)
    async with KeySnapshot(redis, PEPPER, clock) as snapshot:
        while not snapshot.ready:
            turn += 1
            await asyncio.sleep(0)
    assert sum(turns.values()) == len(records)
    assert max(turns.values()) <= 2 * PAGE_RECORDS  # HSCAN may return somewhat more
    assert len(turns) >= 10


async def test_an_unreadable_key_set_ends_nothing(
    redis: Redis, store: KeyStore, clock: FakeClock
) -> None:
    new = await store.create("team-a")
    async with KeySnapshot(redis, PEPPER, clock, 0.05) as snapshot:
        await eventually(lambda: accepts(snapshot, new.key))
        await redis.set(VERSION, "no number")
        await eventually(lambda: snapshot.degraded)
        assert accepts(snapshot, new.key)
        await redis.set(VERSION, "7")
        await eventually(lambda: not snapshot.degraded)
        assert accepts(snapshot, new.key)


async def test_last_used_is_written_at_most_once_a_minute(
    redis: Redis, store: KeyStore, clock: FakeClock
) -> None:
    new = await store.create("team-a")
    key_id = new.record.key_id
    stored_record = await redis.hget(KEYS, key_id)

    async def last_used_s() -> float | None:
        return (await store.get(key_id)).last_used_s

    async def eventually_last_used(expected_s: float) -> None:
        deadline = time.monotonic() + SOON_S
        while await last_used_s() != expected_s:
            assert time.monotonic() < deadline, "the last use was not written in time"

    async with KeySnapshot(redis, PEPPER, clock, 0.01) as snapshot:
        await eventually(lambda: snapshot.ready)
        assert await last_used_s() is None
        first_s = clock.now_s
        snapshot.authenticate(f"Bearer {new.key}")
        await eventually_last_used(first_s)

        clock.now_s += 59
        snapshot.authenticate(f"Bearer {new.key}")
        other = await store.create("team-b")  # seen: the loop has come round since
        await eventually(lambda: accepts(snapshot, other.key))
        await eventually_last_used(first_s)

        clock.now_s += 1
        await eventually_last_used(first_s + 59)
        assert await redis.hget(KEYS, key_id) == stored_record
        snapshot.authenticate(f"Bearer {new.key}")
    assert await last_used_s() == first_s + 60


async def test_last_use_of_two_replicas_is_the_later_one(
    redis: Redis, store: KeyStore, clock: FakeClock
) -> None:
    new = await store.create("team-a")
    async with KeySnapshot(redis, PEPPER, clock, NEVER_S) as early:
        await eventually(lambda: accepts(early, new.key))
        clock.now_s += 30
        async with KeySnapshot(redis, PEPPER, clock, NEVER_S) as late:
            await eventually(lambda: accepts(late, new.key))
    assert (await store.list())[0].last_used_s == clock.now_s


async def test_a_revoked_key_is_not_marked_as_used(
    redis: Redis, store: KeyStore, clock: FakeClock
) -> None:
    new = await store.create("team-a")
    async with KeySnapshot(redis, PEPPER, clock, NEVER_S) as snapshot:
        await eventually(lambda: accepts(snapshot, new.key))
        await redis.hdel(KEYS, new.record.key_id)
        await redis.delete(LAST_USED)  # if that was quick
        accepts(snapshot, new.key)  # as it does until it reads the keys again
    assert not await redis.exists(LAST_USED)


async def test_a_rotated_key_works_until_its_grace_ends(
    redis: Redis, store: KeyStore, clock: FakeClock
) -> None:
    old = await store.create("team-a")
    async with KeySnapshot(redis, PEPPER, clock, NEVER_S) as snapshot:
        await eventually(lambda: accepts(snapshot, old.key))
        new = (await store.rotate(old.record.key_id, grace_s=60)).new
        await eventually(lambda: accepts(snapshot, new.key))
        assert accepts(snapshot, old.key)
        clock.now_s += 60
        assert not accepts(snapshot, old.key)
        assert accepts(snapshot, new.key)


async def test_a_key_that_is_rotated_without_grace_is_refused(
    redis: Redis, store: KeyStore, clock: FakeClock
) -> None:
    old = await store.create("team-a")
    async with KeySnapshot(redis, PEPPER, clock, NEVER_S) as snapshot:
        await eventually(lambda: accepts(snapshot, old.key))
        new = (await store.rotate(old.record.key_id, grace_s=0)).new
        await eventually(lambda: accepts(snapshot, new.key))
        assert not accepts(snapshot, old.key)


async def test_limits_of_keys_arrive(redis: Redis, store: KeyStore, clock: FakeClock) -> None:
    new = await store.create("team-a", limits=Limits(requests_per_minute=3))
    async with KeySnapshot(redis, PEPPER, clock) as snapshot:
        await eventually(lambda: accepts(snapshot, new.key))
        limits = snapshot.authenticate(f"Bearer {new.key}").limits
        assert limits == Limits(requests_per_minute=3)


class TestTenants:
    async def test_limits_that_are_set_and_removed_arrive_by_message(
        self, redis: Redis, clock: FakeClock
    ) -> None:
        tenants = TenantStore(redis)
        five, six = (TenantLimits(requests_per_minute=number) for number in (5, 6))
        async with KeySnapshot(redis, PEPPER, clock, NEVER_S) as snapshot:
            await eventually(lambda: snapshot.ready)
            assert snapshot.tenant_limits("acme") is None
            await tenants.set("acme", five)
            await eventually(lambda: snapshot.tenant_limits("acme") == five)
            await tenants.set("acme", six)
            await eventually(lambda: snapshot.tenant_limits("acme") == six)
            await tenants.remove("acme")
            await eventually(lambda: snapshot.tenant_limits("acme") is None)

    async def test_limits_stay_the_same_object_until_they_change(
        self, redis: Redis, store: KeyStore, clock: FakeClock
    ) -> None:
        await TenantStore(redis).set("acme", TenantLimits(requests_per_minute=5))
        async with KeySnapshot(redis, PEPPER, clock, NEVER_S) as snapshot:
            await eventually(lambda: snapshot.ready)
            before = snapshot.tenant_limits("acme")
            new = await store.create("acme")
            await eventually(lambda: accepts(snapshot, new.key))
            assert snapshot.tenant_limits("acme") is before

    async def test_limits_stay_in_force_while_redis_is_dead(
        self, redis: Redis, redis_server: RedisServer, clock: FakeClock
    ) -> None:
        await TenantStore(redis).set("acme", TenantLimits(requests_per_minute=5))
        async with KeySnapshot(redis, PEPPER, clock, 0.05) as snapshot:
            await eventually(lambda: snapshot.ready)
            redis_server.kill()
            await eventually(lambda: snapshot.degraded)
            assert snapshot.tenant_limits("acme") == TenantLimits(requests_per_minute=5)

    @pytest.mark.parametrize("damaged", [b"", b"\xff", b"[]", b'{"requestsPerHour": 1}'])
    async def test_a_damaged_record_blocks_its_tenant_and_no_other(
        self, redis: Redis, clock: FakeClock, damaged: bytes
    ) -> None:
        await TenantStore(redis).set("acme", TenantLimits(requests_per_minute=5))
        await redis.hset(TENANTS, "beta", damaged)
        async with KeySnapshot(redis, PEPPER, clock) as snapshot:
            await eventually(lambda: snapshot.ready)
            assert snapshot.tenant_limits("acme") == TenantLimits(requests_per_minute=5)
            assert snapshot.tenant_limits("beta") == BLOCKED

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
from tests.tenancy.conftest import PEPPER

from tera.config.limits import Limits, TenantLimits
from tera.errors import InternalError, InvalidApiKeyError, MissingApiKeyError
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
    generate_key,
)
from tera.tenancy.redis import connect
from tera.tenancy.snapshot import PAGE_RECORDS, KeySnapshot
from tera.tenancy.tenants import BLOCKED, TenantStore

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from redis.asyncio import Redis
    from tests.tenancy.conftest import FakeClock, RedisServer

SOON_S = 5.0
NEVER_S = 3600.0
"""A re-read interval that a test does not live to see: only messages bring news."""


async def eventually(condition: Callable[[], bool], within_s: float = SOON_S) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        await asyncio.sleep(0.01)


def accepts(snapshot: KeySnapshot, key: str) -> bool:
    try:
        snapshot.authenticate(f"Bearer {key}")
    except InvalidApiKeyError:
        return False
    return True


# A-3, by message; the next test has what holds when a message is lost.
async def test_made_and_revoked_keys_arrive_by_message(
    redis: Redis, store: KeyStore, clock: FakeClock
) -> None:
    async with KeySnapshot(redis, PEPPER, clock, NEVER_S) as snapshot:
        await eventually(lambda: snapshot.ready)
        new = await store.create("team-a", models=["one"])
        await eventually(lambda: accepts(snapshot, new.key))
        assert snapshot.authenticate(f"Bearer {new.key}") == new.record
        await store.revoke(new.record.key_id)
        await eventually(lambda: not accepts(snapshot, new.key))


async def test_a_change_without_a_message_is_found_by_reading_again(
    redis: Redis, store: KeyStore, clock: FakeClock
) -> None:
    new = await store.create("team-a")
    async with KeySnapshot(redis, PEPPER, clock, 0.05) as snapshot:
        await eventually(lambda: accepts(snapshot, new.key))
        await redis.hdel(KEYS, new.record.key_id)
        await redis.incr(VERSION)
        await eventually(lambda: not accepts(snapshot, new.key))


async def test_a_burst_of_changes_arrives_whole(
    redis: Redis, store: KeyStore, clock: FakeClock
) -> None:
    async with KeySnapshot(redis, PEPPER, clock, NEVER_S) as snapshot:
        await eventually(lambda: snapshot.ready)
        made = await asyncio.gather(*(store.create("team-a") for _ in range(50)))
        await eventually(lambda: snapshot.version == 50)
        assert all(accepts(snapshot, new.key) for new in made)


async def test_an_expired_key_is_refused(redis: Redis, store: KeyStore, clock: FakeClock) -> None:
    new = await store.create("team-a", expires_in_s=60)
    async with KeySnapshot(redis, PEPPER, clock) as snapshot:
        await eventually(lambda: accepts(snapshot, new.key))
        clock.now_s += 59.9
        assert accepts(snapshot, new.key)
        clock.now_s += 0.1
        assert not accepts(snapshot, new.key)


async def test_scheme_case_and_surrounding_space_do_not_matter(
    redis: Redis, store: KeyStore, clock: FakeClock
) -> None:
    new = await store.create("team-a")
    async with KeySnapshot(redis, PEPPER, clock) as snapshot:
        await eventually(lambda: snapshot.ready)
        for header in ("bearer {}", "BEARER {}", "  Bearer   {}\t", "bEaReR\t{} "):
            assert snapshot.authenticate(header.format(new.key)) == new.record


async def test_every_refusal_reads_the_same(
    redis: Redis, store: KeyStore, clock: FakeClock
) -> None:
    good, expired, revoked = [
        await store.create("team-a", expires_in_s=expires_in_s) for expires_in_s in (None, 1, None)
    ]
    await store.revoke(revoked.record.key_id)
    clock.now_s += 2
    headers = [
        "",
        "Bearer",
        "Bearer ",
        good.key,
        f"Basic {good.key}",
        f"Bearer{good.key}",
        f"Bearer {good.key} {good.key}",
        f"Bearer {good.key}, Bearer {good.key}",
        f"Bearer\xa0{good.key}",
        f"Bearer {good.key.upper()}",
        f"Bearer {good.key[:-1]}",
        f"Bearer {generate_key()}",
        f"Bearer {expired.key}",
        f"Bearer {revoked.key}",
        "Bearer " + "a" * 100_000,
        " " * 100_000,
        bytes(range(256)).decode("latin-1"),
    ]
    async with KeySnapshot(redis, PEPPER, clock) as snapshot:
        await eventually(lambda: accepts(snapshot, good.key))
        messages = set()
        for header in headers:
            with pytest.raises(InvalidApiKeyError) as raised:
                snapshot.authenticate(header)
            messages.add(raised.value.message)
        assert len(messages) == 1
        with pytest.raises(MissingApiKeyError):
            snapshot.authenticate(None)


# L-7: who has never read the keys knows none.
async def test_without_a_snapshot_it_is_not_ready_and_refuses(
    redis: Redis, redis_server: RedisServer, store: KeyStore, clock: FakeClock
) -> None:
    new = await store.create("team-a")
    redis_server.kill()
    async with KeySnapshot(redis, PEPPER, clock) as snapshot:
        await eventually(lambda: snapshot.degraded)
        assert not snapshot.ready
        assert not accepts(snapshot, new.key)
        redis_server.start()
        await eventually(lambda: snapshot.ready and not snapshot.degraded)
        assert accepts(snapshot, new.key)


async def test_l7_a_gateway_of_a_cluster_is_never_ready_and_says_why(
    cluster_node: RedisServer, clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    async with (
        connect(cluster_node.url, timeout_s=1.0) as node,
        KeySnapshot(node, PEPPER, clock) as snapshot,
    ):
        await eventually(lambda: snapshot.degraded)
        assert not snapshot.ready
    assert "Redis Cluster, which is not supported" in caplog.text


async def test_keys_stay_in_force_while_redis_is_dead(
    redis: Redis, redis_server: RedisServer, store: KeyStore, clock: FakeClock
) -> None:
    new = await store.create("team-a")
    async with KeySnapshot(redis, PEPPER, clock, 0.05) as snapshot:
        await eventually(lambda: accepts(snapshot, new.key))
        redis_server.kill()
        await eventually(lambda: snapshot.degraded)
        assert snapshot.degraded_since_s == clock.now_s
        assert snapshot.ready
        assert accepts(snapshot, new.key)
        redis_server.start()
        await eventually(lambda: not snapshot.degraded)
        assert snapshot.degraded_since_s is None
        await store.revoke(new.record.key_id)
        await eventually(lambda: not accepts(snapshot, new.key))


async def test_l8_keys_that_may_be_revoked_are_refused_once_redis_was_away_for_too_long(
    redis: Redis, redis_server: RedisServer, store: KeyStore, clock: FakeClock
) -> None:
    new = await store.create("team-a")
    header = f"Bearer {new.key}"
    async with KeySnapshot(redis, PEPPER, clock, 0.05, lambda: 600) as snapshot:
        await eventually(lambda: accepts(snapshot, new.key))
        redis_server.kill()
        await eventually(lambda: snapshot.degraded)
        clock.now_s += 600
        assert snapshot.authenticate(header) == new.record
        clock.now_s += 1
        with pytest.raises(InternalError, match="cannot check API keys"):
            snapshot.authenticate(header)
        assert not accepts(snapshot, generate_key())  # 401, as always
        redis_server.start()
        await eventually(lambda: not snapshot.degraded)
        assert snapshot.authenticate(header) == new.record


async def test_keys_stay_in_force_while_redis_is_frozen(
    redis_server: RedisServer, store: KeyStore, clock: FakeClock
) -> None:
    new = await store.create("team-a")
    impatient = connect(redis_server.url, timeout_s=0.1)
    try:
        async with KeySnapshot(impatient, PEPPER, clock, 0.05) as snapshot:
            await eventually(lambda: accepts(snapshot, new.key))
            redis_server.stop()
            await eventually(lambda: snapshot.degraded)
            assert accepts(snapshot, new.key)
            redis_server.cont()
            await eventually(lambda: not snapshot.degraded)
            await store.revoke(new.record.key_id)
            await eventually(lambda: not accepts(snapshot, new.key))
    finally:
        await impatient.aclose()


async def test_a_redis_that_lost_its_data_is_followed_and_logged(
    redis: Redis,
    redis_server: RedisServer,
    store: KeyStore,
    clock: FakeClock,
    caplog: pytest.LogCaptureFixture,
) -> None:
    new = await store.create("team-a")
    async with KeySnapshot(redis, PEPPER, clock, 0.05) as snapshot:
        await eventually(lambda: accepts(snapshot, new.key))
        redis_server.kill()
        redis_server.erase()
        redis_server.start()
        await eventually(lambda: not accepts(snapshot, new.key))
        assert snapshot.version == 0
        assert [r.levelname for r in caplog.records if "lost API keys" in r.message] == ["ERROR"]


async def test_a_redis_that_counted_up_again_is_not_taken_for_unchanged(
    redis: Redis, redis_server: RedisServer, store: KeyStore, clock: FakeClock
) -> None:
    lost = await store.create("team-a")
    async with KeySnapshot(redis, PEPPER, clock, 0.05) as snapshot:
        await eventually(lambda: accepts(snapshot, lost.key))
        redis_server.kill()
        redis_server.erase()
        redis_server.start()
        async with connect(redis_server.url, timeout_s=1.0) as elsewhere:
            made = await KeyStore(elsewhere, PEPPER, clock).create("team-a")
        await eventually(lambda: accepts(snapshot, made.key))
        assert not accepts(snapshot, lost.key)
        # A read in pages has no version of its own: the one before it, and then the message's.
        await eventually(lambda: snapshot.version == 1)


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


async def test_it_ends_whatever_it_is_doing(redis: Redis, clock: FakeClock) -> None:
    # On Python 3.11 redis-py loses many of these cancellations.
    for turns in range(50):
        async with asyncio.timeout(SOON_S), KeySnapshot(redis, PEPPER, clock, 0.001):
            for _ in range(turns % 25):
                await asyncio.sleep(0)


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

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
from tests.tenancy.conftest import PEPPER
from tests.tenancy.snapshots import NEVER_S, SOON_S, accepts, eventually

from tera.errors import InternalError, InvalidApiKeyError, MissingApiKeyError
from tera.tenancy.key_store import KeyStore
from tera.tenancy.keys import KEYS, VERSION, generate_key
from tera.tenancy.redis import connect
from tera.tenancy.snapshot import KeySnapshot

if TYPE_CHECKING:
    from redis.asyncio import Redis
    from tests.tenancy.conftest import FakeClock, RedisServer


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


async def test_it_ends_whatever_it_is_doing(redis: Redis, clock: FakeClock) -> None:
    # On Python 3.11 redis-py loses many of these cancellations.
    for turns in range(50):
        async with asyncio.timeout(SOON_S), KeySnapshot(redis, PEPPER, clock, 0.001):
            for _ in range(turns % 25):
                await asyncio.sleep(0)

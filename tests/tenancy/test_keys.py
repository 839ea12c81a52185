from __future__ import annotations

import asyncio
import json
import logging
import re
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tera.errors import ConfigError, InternalError, InvalidApiKeyError, MissingApiKeyError
from tera.tenancy.keys import (
    KEY_PATTERN,
    KEYS,
    LAST_USED,
    VERSION,
    ApiKey,
    KeyNotFoundError,
    KeySnapshot,
    KeyStore,
    generate_key,
    hash_key,
    is_well_formed,
)
from tera.tenancy.redis import connect

if TYPE_CHECKING:
    from redis.asyncio import Redis
    from tests.tenancy.conftest import FakeClock, RedisServer

PEPPER = "test-pepper"
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


@pytest.fixture
def store(redis: Redis, clock: FakeClock) -> KeyStore:
    return KeyStore(redis, PEPPER, clock)


class TestKeyFormat:
    def test_keys_are_well_formed_and_differ(self) -> None:
        keys = {generate_key() for _ in range(100)}
        assert len(keys) == 100
        assert all(is_well_formed(key) and re.fullmatch(KEY_PATTERN, key) for key in keys)

    @given(data=st.data())
    def test_one_wrong_character_anywhere_is_refused(self, data: st.DataObject) -> None:
        key = generate_key()
        position = data.draw(st.integers(0, len(key) - 1))
        wrong = data.draw(st.characters().filter(lambda character: character != key[position]))
        assert not is_well_formed(key[:position] + wrong + key[position + 1 :])

    @given(data=st.data())
    def test_two_swapped_neighbours_are_refused(self, data: st.DataObject) -> None:
        key = generate_key()
        at = data.draw(st.integers(0, len(key) - 2))
        swapped = key[:at] + key[at + 1] + key[at] + key[at + 2 :]
        assert swapped == key or not is_well_formed(swapped)

    @given(st.text())
    def test_any_other_text_is_refused(self, text: str) -> None:
        assert not is_well_formed(text)

    @pytest.mark.parametrize("change", [lambda k: k[:-1], lambda k: k + "0", lambda k: k + "\n"])
    def test_another_length_is_refused(self, change: Callable[[str], str]) -> None:
        assert not is_well_formed(change(generate_key()))

    def test_the_hash_depends_on_key_and_pepper(self) -> None:
        hashes = {hash_key(key, pepper) for key in ("a", "b") for pepper in ("x", "y")}
        assert len(hashes) == 4
        assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in hashes)


class TestKeyStore:
    async def test_the_record_says_what_was_asked(self, store: KeyStore, clock: FakeClock) -> None:
        new = await store.create("team-a", models=["m/one", "two"], expires_in_s=60)
        record = await store.get(new.record.key_id)
        assert record == new.record
        assert re.fullmatch("key_[0-9a-f]{24}", record.key_id)
        assert (record.tenant, record.models) == ("team-a", ("m/one", "two"))
        assert (record.created_s, record.expires_s) == (clock.now_s, clock.now_s + 60)
        assert record.hint == f"{new.key[:12]}…{new.key[-4:]}"
        assert record.key_hash == hash_key(new.key, PEPPER)
        assert await store.list() == [record]

    async def test_redis_holds_no_key(self, store: KeyStore, redis: Redis) -> None:
        new = await store.create("team-a")
        for name in await redis.keys("*"):
            # Not DUMP: it compresses, and could hide the key from this test.
            hashes = name != VERSION.encode()
            held = await redis.hgetall(name) if hashes else await redis.get(name)
            assert new.key not in str(held)
            assert new.key[12:-4] not in str(held)

    async def test_a_key_is_in_no_repr_and_no_log(
        self, store: KeyStore, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.DEBUG)
        new = await store.create("team-a")
        with pytest.raises(KeyNotFoundError) as raised:
            await store.revoke(new.key)
        assert new.key not in f"{new!r} {new.record!r} {raised.value!r} {caplog.text}"
        assert new.record.key_hash not in f"{new!r} {new.record!r} {caplog.text}"

    @pytest.mark.parametrize("tenant", ["", "Team", "a b", "a/b", "-a", "a.", "a" * 65, "ä", "a\n"])
    async def test_an_impossible_tenant_is_refused(self, store: KeyStore, tenant: str) -> None:
        with pytest.raises(ConfigError, match="tenant's name"):
            await store.create(tenant)

    @pytest.mark.parametrize("tenant", ["a", "a" * 64, "team-1.eu_west"])
    async def test_a_possible_tenant_is_accepted(self, store: KeyStore, tenant: str) -> None:
        assert (await store.create(tenant)).record.tenant == tenant

    @pytest.mark.parametrize("expires_in_s", [0, -1, float("inf"), float("nan")])
    async def test_an_impossible_lifetime_is_refused(
        self, store: KeyStore, expires_in_s: float
    ) -> None:
        with pytest.raises(ConfigError, match="expire"):
            await store.create("team-a", expires_in_s=expires_in_s)

    @pytest.mark.parametrize("models", [[], [""], ""])
    async def test_no_models_at_all_are_refused(self, store: KeyStore, models: list[str]) -> None:
        with pytest.raises(ConfigError, match="model"):
            await store.create("team-a", models=models)

    def test_an_empty_pepper_is_refused(self, redis: Redis, clock: FakeClock) -> None:
        with pytest.raises(ConfigError, match="pepper"):
            KeyStore(redis, "", clock)

    @pytest.mark.parametrize("key_id", ["key_" + "0" * 24, "nonsense", ""])
    async def test_an_unknown_id_is_a_clear_error(self, store: KeyStore, key_id: str) -> None:
        with pytest.raises(KeyNotFoundError, match="There is no API key"):
            await store.get(key_id)
        with pytest.raises(KeyNotFoundError, match="There is no API key"):
            await store.revoke(key_id)

    async def test_a_revoked_key_leaves_nothing_but_the_version(
        self, store: KeyStore, redis: Redis
    ) -> None:
        new = await store.create("team-a")
        await redis.hset(LAST_USED, new.record.key_id, "1.0")
        await store.revoke(new.record.key_id)
        assert await store.list() == []
        assert await redis.keys("*") == [VERSION.encode()]
        with pytest.raises(KeyNotFoundError):
            await store.revoke(new.record.key_id)

    async def test_importing_again_changes_nothing(
        self, store: KeyStore, redis: Redis, clock: FakeClock
    ) -> None:
        key = generate_key()
        first = await store.import_key("team-a", key=key)
        version = await redis.get(VERSION)
        clock.now_s += 100
        assert await store.import_key("team-a", key=key) == first
        assert await store.import_key("team-a", key_hash=first.key_hash) == first
        assert await store.list() == [first]
        assert await redis.get(VERSION) == version

    async def test_importing_with_other_settings_replaces_them(self, store: KeyStore) -> None:
        new = await store.create("team-a")
        narrowed = await store.import_key("team-a", key=new.key, models=["one"])
        assert narrowed.key_id == new.record.key_id
        assert narrowed.models == ("one",)
        assert await store.list() == [narrowed]

    @pytest.mark.parametrize(
        ("key", "key_hash"),
        [
            pytest.param(None, None, id="neither"),
            pytest.param(generate_key(), "0" * 64, id="both"),
            pytest.param("sk-tera-short", None, id="malformed-key"),
            pytest.param(None, "0" * 63, id="malformed-hash"),
        ],
    )
    async def test_only_one_key_or_hash_is_imported(
        self, store: KeyStore, key: str | None, key_hash: str | None
    ) -> None:
        with pytest.raises(ConfigError) as raised:
            await store.import_key("team-a", key=key, key_hash=key_hash)
        assert key is None or key not in raised.value.message

    async def test_fields_of_a_later_version_are_ignored(
        self, store: KeyStore, redis: Redis
    ) -> None:
        record = (await store.create("team-a")).record
        stored = json.loads(await redis.hget(KEYS, record.key_id) or b"")
        assert "last_used_s" not in stored
        later = json.dumps({**stored, "limits": {"requests_per_minute": 5}})
        await redis.hset(KEYS, record.key_id, later)
        assert await store.list() == [record]

    @pytest.mark.parametrize("damaged", [b"", b"\xff", b"{}", b"[1", b'{"key_id": 1}'])
    async def test_a_damaged_record_takes_no_other_along(
        self, store: KeyStore, redis: Redis, damaged: bytes
    ) -> None:
        record = (await store.create("team-a")).record
        await redis.hset(KEYS, "key_" + "0" * 24, damaged)
        assert await store.list() == [record]
        await store.revoke("key_" + "0" * 24)

    async def test_redis_away_is_an_error_of_ours(
        self, store: KeyStore, redis_server: RedisServer
    ) -> None:
        redis_server.kill()
        with pytest.raises(InternalError):
            await store.list()
        with pytest.raises(InternalError):
            await store.create("team-a")


class TestKeySnapshot:
    async def test_made_and_revoked_keys_arrive_by_message(
        self, redis: Redis, store: KeyStore, clock: FakeClock
    ) -> None:
        async with KeySnapshot(redis, PEPPER, clock, NEVER_S) as snapshot:
            await eventually(lambda: snapshot.ready)
            new = await store.create("team-a", models=["one"])
            await eventually(lambda: accepts(snapshot, new.key))
            assert snapshot.authenticate(f"Bearer {new.key}") == new.record
            await store.revoke(new.record.key_id)
            await eventually(lambda: not accepts(snapshot, new.key))

    async def test_a_change_without_a_message_is_found_by_reading_again(
        self, redis: Redis, store: KeyStore, clock: FakeClock
    ) -> None:
        new = await store.create("team-a")
        async with KeySnapshot(redis, PEPPER, clock, 0.05) as snapshot:
            await eventually(lambda: accepts(snapshot, new.key))
            await redis.hdel(KEYS, new.record.key_id)
            await redis.incr(VERSION)
            await eventually(lambda: not accepts(snapshot, new.key))

    async def test_a_burst_of_changes_arrives_whole(
        self, redis: Redis, store: KeyStore, clock: FakeClock
    ) -> None:
        async with KeySnapshot(redis, PEPPER, clock, NEVER_S) as snapshot:
            await eventually(lambda: snapshot.ready)
            made = await asyncio.gather(*(store.create("team-a") for _ in range(50)))
            await eventually(lambda: snapshot.version == 50)
            assert all(accepts(snapshot, new.key) for new in made)

    async def test_an_expired_key_is_refused(
        self, redis: Redis, store: KeyStore, clock: FakeClock
    ) -> None:
        new = await store.create("team-a", expires_in_s=60)
        async with KeySnapshot(redis, PEPPER, clock) as snapshot:
            await eventually(lambda: accepts(snapshot, new.key))
            clock.now_s += 59.9
            assert accepts(snapshot, new.key)
            clock.now_s += 0.1
            assert not accepts(snapshot, new.key)

    async def test_scheme_case_and_surrounding_space_do_not_matter(
        self, redis: Redis, store: KeyStore, clock: FakeClock
    ) -> None:
        new = await store.create("team-a")
        async with KeySnapshot(redis, PEPPER, clock) as snapshot:
            await eventually(lambda: snapshot.ready)
            for header in ("bearer {}", "BEARER {}", "  Bearer   {}\t", "bEaReR\t{} "):
                assert snapshot.authenticate(header.format(new.key)) == new.record

    async def test_every_refusal_reads_the_same(
        self, redis: Redis, store: KeyStore, clock: FakeClock
    ) -> None:
        good, expired, revoked = [
            await store.create("team-a", expires_in_s=expires_in_s)
            for expires_in_s in (None, 1, None)
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

    async def test_without_a_snapshot_it_is_not_ready_and_refuses(
        self, redis: Redis, redis_server: RedisServer, store: KeyStore, clock: FakeClock
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

    async def test_keys_stay_in_force_while_redis_is_dead(
        self, redis: Redis, redis_server: RedisServer, store: KeyStore, clock: FakeClock
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

    async def test_keys_stay_in_force_while_redis_is_frozen(
        self, redis_server: RedisServer, store: KeyStore, clock: FakeClock
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
        self,
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
            assert [r.levelname for r in caplog.records if "lost API keys" in r.message] == [
                "ERROR"
            ]

    async def test_a_redis_that_counted_up_again_is_not_taken_for_unchanged(
        self, redis: Redis, redis_server: RedisServer, store: KeyStore, clock: FakeClock
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
            assert snapshot.version == 1

    async def test_an_unreadable_key_set_ends_nothing(
        self, redis: Redis, store: KeyStore, clock: FakeClock
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

    async def test_it_ends_whatever_it_is_doing(self, redis: Redis, clock: FakeClock) -> None:
        # On Python 3.11 redis-py loses many of these cancellations.
        for turns in range(50):
            async with asyncio.timeout(SOON_S), KeySnapshot(redis, PEPPER, clock, 0.001):
                for _ in range(turns % 25):
                    await asyncio.sleep(0)

    async def test_last_used_is_written_at_most_once_a_minute(
        self, redis: Redis, store: KeyStore, clock: FakeClock
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
        self, redis: Redis, store: KeyStore, clock: FakeClock
    ) -> None:
        new = await store.create("team-a")
        async with KeySnapshot(redis, PEPPER, clock, NEVER_S) as early:
            await eventually(lambda: accepts(early, new.key))
            clock.now_s += 30
            async with KeySnapshot(redis, PEPPER, clock, NEVER_S) as late:
                await eventually(lambda: accepts(late, new.key))
        assert (await store.list())[0].last_used_s == clock.now_s

    async def test_a_revoked_key_is_not_marked_as_used(
        self, redis: Redis, store: KeyStore, clock: FakeClock
    ) -> None:
        new = await store.create("team-a")
        async with KeySnapshot(redis, PEPPER, clock, NEVER_S) as snapshot:
            await eventually(lambda: accepts(snapshot, new.key))
            await redis.hdel(KEYS, new.record.key_id)
        assert not await redis.exists(LAST_USED)


def test_records_are_compared_by_value() -> None:
    record = ApiKey("key_1", "team-a", "0" * 64, "", None, created_s=1.0)
    assert record == ApiKey("key_1", "team-a", "0" * 64, "", None, created_s=1.0)

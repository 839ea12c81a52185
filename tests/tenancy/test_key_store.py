from __future__ import annotations

import asyncio
import datetime
import json
import logging
import re
from typing import TYPE_CHECKING

import pytest
from tests.tenancy.conftest import PEPPER

from tera.config.keys_file import KeyEntry
from tera.config.limits import Limits
from tera.errors import ConfigError, InternalError
from tera.tenancy.key_store import (
    KeyNotFoundError,
    KeyRevokedError,
    KeyStore,
    import_records,
    records_of,
)
from tera.tenancy.keys import KEYS, LAST_USED, REVOKED, VERSION, ApiKey, generate_key, hash_key

if TYPE_CHECKING:
    from redis.asyncio import Redis
    from tests.tenancy.conftest import FakeClock, RedisServer


async def test_the_record_says_what_was_asked(store: KeyStore, clock: FakeClock) -> None:
    limits = Limits(requests_per_minute=5, token_budget=100, budget_period="day")
    new = await store.create("team-a", models=["m/one", "two"], limits=limits, expires_in_s=60)
    record = await store.get(new.record.key_id)
    assert record == new.record
    assert record.limits == limits
    assert re.fullmatch("key_[0-9a-f]{24}", record.key_id)
    assert (record.tenant, record.models) == ("team-a", ("m/one", "two"))
    assert (record.created_s, record.expires_s) == (clock.now_s, clock.now_s + 60)
    assert record.hint == f"{new.key[:12]}…{new.key[-4:]}"
    assert record.key_hash == hash_key(new.key, PEPPER)
    assert await store.list() == [record]


# what Redis stores of a key.
async def test_redis_holds_no_key(store: KeyStore, redis: Redis) -> None:
    new = await store.create("team-a")
    for name in await redis.keys("*"):
        # Not DUMP: it compresses, and could hide the key from this test.
        hashes = name != VERSION.encode()
        held = await redis.hgetall(name) if hashes else await redis.get(name)
        assert new.key not in str(held)
        assert new.key[12:-4] not in str(held)


async def test_a_key_is_in_no_repr_and_no_log(
    store: KeyStore, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    new = await store.create("team-a")
    with pytest.raises(KeyNotFoundError) as raised:
        await store.revoke(new.key)
    assert new.key not in f"{new!r} {new.record!r} {raised.value!r} {caplog.text}"
    assert new.record.key_hash not in f"{new!r} {new.record!r} {caplog.text}"


@pytest.mark.parametrize("tenant", ["", "Team", "a b", "a/b", "-a", "a.", "a" * 65, "ä", "a\n"])
async def test_an_impossible_tenant_is_refused(store: KeyStore, tenant: str) -> None:
    with pytest.raises(ConfigError, match="tenant's name"):
        await store.create(tenant)


@pytest.mark.parametrize("tenant", ["a", "a" * 64, "team-1.eu_west"])
async def test_a_possible_tenant_is_accepted(store: KeyStore, tenant: str) -> None:
    assert (await store.create(tenant)).record.tenant == tenant


@pytest.mark.parametrize("expires_in_s", [0, -1, float("inf"), float("nan")])
async def test_an_impossible_lifetime_is_refused(store: KeyStore, expires_in_s: float) -> None:
    with pytest.raises(ConfigError, match="expire"):
        await store.create("team-a", expires_in_s=expires_in_s)


@pytest.mark.parametrize("models", [[], [""], ""])
async def test_no_models_at_all_are_refused(store: KeyStore, models: list[str]) -> None:
    with pytest.raises(ConfigError, match="model"):
        await store.create("team-a", models=models)


def test_an_empty_pepper_is_refused(redis: Redis, clock: FakeClock) -> None:
    with pytest.raises(ConfigError, match="pepper"):
        KeyStore(redis, "", clock)


@pytest.mark.parametrize("key_id", ["key_" + "0" * 24, "nonsense", ""])
async def test_an_unknown_id_is_a_clear_error(store: KeyStore, key_id: str) -> None:
    with pytest.raises(KeyNotFoundError, match="There is no API key"):
        await store.get(key_id)
    with pytest.raises(KeyNotFoundError, match="There is no API key"):
        await store.revoke(key_id)


async def test_a_revoked_key_leaves_nothing_but_its_id(store: KeyStore, redis: Redis) -> None:
    new = await store.create("team-a")
    await redis.hset(LAST_USED, new.record.key_id, "1.0")
    await store.revoke(new.record.key_id)
    assert await store.list() == []
    assert sorted(await redis.keys("*")) == [REVOKED.encode(), VERSION.encode()]
    assert await redis.hkeys(REVOKED) == [new.record.key_id.encode()]
    with pytest.raises(KeyNotFoundError):
        await store.revoke(new.record.key_id)


async def test_importing_again_changes_nothing(
    store: KeyStore, redis: Redis, clock: FakeClock
) -> None:
    key = generate_key()
    first = await store.import_record(store.record_of("team-a", key=key))
    version = await redis.get(VERSION)
    clock.now_s += 100
    assert await store.import_record(store.record_of("team-a", key=key)) == first
    assert await store.import_record(store.record_of("team-a", key_hash=first.key_hash)) == first
    assert await store.list() == [first]
    assert await redis.get(VERSION) == version


async def test_importing_with_other_settings_replaces_them(store: KeyStore) -> None:
    new = await store.create("team-a")
    narrowed = await store.import_record(store.record_of("team-a", key=new.key, models=["one"]))
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
def test_only_one_key_or_hash_is_imported(
    store: KeyStore, key: str | None, key_hash: str | None
) -> None:
    with pytest.raises(ConfigError) as raised:
        store.record_of("team-a", key=key, key_hash=key_hash)
    assert key is None or key not in raised.value.message


async def test_fields_of_a_later_version_are_ignored(store: KeyStore, redis: Redis) -> None:
    record = (await store.create("team-a")).record
    stored = json.loads(await redis.hget(KEYS, record.key_id) or b"")
    assert "last_used_s" not in stored
    later = json.dumps({**stored, "colour": "red"})
    await redis.hset(KEYS, record.key_id, later)
    assert await store.list() == [record]


@pytest.mark.parametrize("damaged", [b"", b"\xff", b"{}", b"[1", b'{"key_id": 1}'])
async def test_a_damaged_record_takes_no_other_along(
    store: KeyStore, redis: Redis, damaged: bytes
) -> None:
    record = (await store.create("team-a")).record
    await redis.hset(KEYS, "key_" + "0" * 24, damaged)
    assert await store.list() == [record]
    await store.revoke("key_" + "0" * 24)


async def test_redis_away_is_an_error_of_ours(store: KeyStore, redis_server: RedisServer) -> None:
    redis_server.kill()
    with pytest.raises(InternalError):
        await store.list()
    with pytest.raises(InternalError):
        await store.create("team-a")


async def test_a_record_of_an_earlier_version_has_no_limits(store: KeyStore, redis: Redis) -> None:
    record = (await store.create("team-a")).record
    stored = json.loads(await redis.hget(KEYS, record.key_id) or b"")
    earlier = {name: stored[name] for name in stored.keys() - {"limits", "replaced_by"}}
    await redis.hset(KEYS, record.key_id, json.dumps(earlier))
    assert await store.get(record.key_id) == record
    assert record.limits is None


async def test_limits_are_stored_as_a_values_file_has_them(store: KeyStore, redis: Redis) -> None:
    record = (await store.create("team-a", limits=Limits(tokens_per_minute=0))).record
    stored = json.loads(await redis.hget(KEYS, record.key_id) or b"")
    assert stored["limits"] == {"tokensPerMinute": 0}


async def test_no_limits_at_all_are_none(store: KeyStore) -> None:
    assert (await store.create("team-a", limits=Limits())).record.limits is None


@pytest.mark.parametrize("limits", [{"requestsPerHour": 1}, {"requestsPerMinute": -1}, "none"])
async def test_a_key_with_limits_that_are_not_understood_is_refused(
    store: KeyStore, redis: Redis, limits: object
) -> None:
    record = (await store.create("team-a")).record
    stored = json.loads(await redis.hget(KEYS, record.key_id) or b"")
    await redis.hset(KEYS, record.key_id, json.dumps({**stored, "limits": limits}))
    assert await store.list() == []


class TestRotate:
    async def test_the_new_key_is_like_the_old_one_and_the_old_one_ends(
        self, store: KeyStore, clock: FakeClock
    ) -> None:
        limits = Limits(concurrent_requests=2)
        old = await store.create("team-a", models=["one"], limits=limits, expires_in_s=1000)
        clock.now_s += 100
        rotation = await store.rotate(old.record.key_id, grace_s=60)
        new = rotation.new.record
        assert await store.get(new.key_id) == new
        assert new.key_hash == hash_key(rotation.new.key, PEPPER)
        assert (new.tenant, new.models, new.limits) == ("team-a", ("one",), limits)
        assert (new.created_s, new.expires_s) == (clock.now_s, old.record.expires_s)
        ended = await store.get(old.record.key_id)
        assert ended.expires_s == rotation.old_expires_s == clock.now_s + 60
        assert ended.replaced_by == new.key_id
        assert new.replaced_by is None

    async def test_the_grace_is_a_day_unless_said(self, store: KeyStore, clock: FakeClock) -> None:
        old = await store.create("team-a")
        assert (await store.rotate(old.record.key_id)).old_expires_s == clock.now_s + 86400

    async def test_the_old_key_never_lives_longer_than_before(self, store: KeyStore) -> None:
        old = await store.create("team-a", expires_in_s=60)
        rotation = await store.rotate(old.record.key_id, grace_s=3600)
        assert rotation.old_expires_s == old.record.expires_s

    async def test_without_grace_the_old_key_is_revoked(
        self, store: KeyStore, redis: Redis
    ) -> None:
        old = await store.create("team-a")
        await redis.hset(LAST_USED, old.record.key_id, "1.0")
        rotation = await store.rotate(old.record.key_id, grace_s=0)
        assert await store.list() == [rotation.new.record]
        assert await redis.hkeys(REVOKED) == [old.record.key_id.encode()]
        assert not await redis.exists(LAST_USED)

    async def test_it_is_one_change(self, store: KeyStore, redis: Redis) -> None:
        old = await store.create("team-a")
        before = int(await redis.get(VERSION) or 0)
        await store.rotate(old.record.key_id)
        assert int(await redis.get(VERSION) or 0) == before + 1

    async def test_a_key_is_rotated_once(self, store: KeyStore) -> None:
        old = await store.create("team-a")
        done = await asyncio.gather(
            *(store.rotate(old.record.key_id) for _ in range(5)), return_exceptions=True
        )
        assert sum(isinstance(outcome, ConfigError) for outcome in done) == 4
        assert len(await store.list()) == 2

    async def test_an_expired_key_needs_a_lifetime(self, store: KeyStore, clock: FakeClock) -> None:
        old = await store.create("team-a", expires_in_s=60)
        clock.now_s += 60
        with pytest.raises(ConfigError, match="has expired"):
            await store.rotate(old.record.key_id)
        rotation = await store.rotate(old.record.key_id, expires_in_s=10)
        assert rotation.new.record.expires_s == clock.now_s + 10
        assert rotation.old_expires_s == old.record.expires_s

    @pytest.mark.parametrize("grace_s", [-1, float("inf"), float("nan")])
    async def test_an_impossible_grace_is_refused(self, store: KeyStore, grace_s: float) -> None:
        old = await store.create("team-a")
        with pytest.raises(ConfigError, match="seconds"):
            await store.rotate(old.record.key_id, grace_s=grace_s)
        assert await store.list() == [old.record]

    async def test_an_unknown_key_is_a_clear_error(self, store: KeyStore) -> None:
        with pytest.raises(KeyNotFoundError):
            await store.rotate("key_" + "0" * 24)


async def import_keys(store: KeyStore, entries: list[KeyEntry]) -> list[ApiKey]:
    return await import_records(store, records_of(store, entries))


class TestImportKeys:
    async def test_importing_again_changes_nothing(self, store: KeyStore, redis: Redis) -> None:
        digest = hash_key(generate_key(), PEPPER)
        expires = datetime.datetime(2027, 1, 31, tzinfo=datetime.UTC)
        entries = [
            KeyEntry(tenant="acme", key=generate_key(), limits=Limits(requests_per_minute=1)),
            KeyEntry(tenant="beta", key_hash=digest, models=("one",), expires=expires),
        ]
        first = await import_keys(store, entries)
        assert [record.tenant for record in first] == ["acme", "beta"]
        assert first[0].limits == Limits(requests_per_minute=1)
        assert (first[1].models, first[1].expires_s) == (("one",), expires.timestamp())
        version = await redis.get(VERSION)
        assert await import_keys(store, entries) == first
        assert await redis.get(VERSION) == version

    async def test_replicas_that_import_at_once_agree(self, store: KeyStore) -> None:
        entries = [KeyEntry(tenant="acme", key=generate_key()) for _ in range(5)]
        await asyncio.gather(*(import_keys(store, entries) for _ in range(4)))
        assert len(await store.list()) == 5

    async def test_a_revoked_key_does_not_come_back(
        self, store: KeyStore, caplog: pytest.LogCaptureFixture
    ) -> None:
        entries = [KeyEntry(tenant="acme", key=generate_key()) for _ in range(2)]
        kept, revoked = await import_keys(store, entries)
        await store.revoke(revoked.key_id)
        assert await import_keys(store, entries) == [kept]
        assert revoked.key_id in caplog.text
        with pytest.raises(KeyRevokedError):
            await store.import_record(store.record_of("acme", key=entries[1].key))

    async def test_a_rotated_key_keeps_its_end(self, store: KeyStore, clock: FakeClock) -> None:
        entries = [KeyEntry(tenant="acme", key=generate_key())]
        (old,) = await import_keys(store, entries)
        rotation = await store.rotate(old.key_id, grace_s=60)
        (again,) = await import_keys(store, entries)
        assert again.expires_s == clock.now_s + 60
        assert again.replaced_by == rotation.new.record.key_id

    async def test_a_fault_has_the_path_of_its_entry_and_no_key(self, store: KeyStore) -> None:
        mistyped = generate_key()[:-1] + "!"
        entries = [
            KeyEntry(tenant="acme", key=generate_key()),
            KeyEntry(tenant="acme", key=mistyped),
        ]
        with pytest.raises(ConfigError) as raised:
            await import_keys(store, entries)
        assert raised.value.message.startswith("1: ")
        assert mistyped not in raised.value.message
        assert mistyped not in repr(entries)
        assert await store.list() == []

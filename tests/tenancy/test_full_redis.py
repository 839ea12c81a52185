"""A Redis that a tenant has filled: what keeps tenants apart goes on."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from redis.exceptions import OutOfMemoryError
from tests.tenancy.conftest import PEPPER
from tests.tenancy.snapshots import NEVER_S, accepts, eventually
from tests.tenancy.test_usage import NOON_S, append, record
from tests.tenancy.waiting import until

from tera.config.gateway import UsageConfig
from tera.config.limits import TenantLimits
from tera.errors import ConfigError
from tera.tenancy.key_store import KeyStore
from tera.tenancy.keys import generate_key
from tera.tenancy.keys_file import KeysFile
from tera.tenancy.redis_memory import RedisMemory
from tera.tenancy.snapshot import KeySnapshot
from tera.tenancy.tenants import TenantStore
from tera.tenancy.usage import stream_of
from tera.tenancy.usage_bound import fair_level
from tera.tenancy.usage_export import UsageExporter, read_export

if TYPE_CHECKING:
    from pathlib import Path

    from redis.asyncio import Redis
    from tests.tenancy.conftest import FakeClock

MIB = 1024 * 1024
LONG_AGO_S = 1_600_000_000.0
BLOCKED = TenantLimits(requests_per_minute=0)


async def fill(redis: Redis) -> None:
    await redis.config_set("maxmemory", 1)
    with pytest.raises(OutOfMemoryError):
        await redis.set("more", "than fits")


async def test_a3_a_key_that_is_revoked_while_redis_is_full_stops(
    redis: Redis, store: KeyStore, clock: FakeClock
) -> None:
    one, other = [await store.create("team-a") for _ in range(2)]
    async with KeySnapshot(redis, PEPPER, clock, NEVER_S) as snapshot:
        await eventually(lambda: accepts(snapshot, one.key))
        await fill(redis)
        await store.revoke(one.record.key_id)
        await eventually(lambda: not accepts(snapshot, one.key))
        assert accepts(snapshot, other.key)
        assert not snapshot.degraded


async def test_a_tenant_is_blocked_while_redis_is_full(redis: Redis, clock: FakeClock) -> None:
    tenants = TenantStore(redis)
    async with KeySnapshot(redis, PEPPER, clock, NEVER_S) as snapshot:
        await eventually(lambda: snapshot.ready)
        await fill(redis)
        await tenants.set("acme", BLOCKED)
        await eventually(lambda: snapshot.tenant_limits("acme") == BLOCKED)


async def test_a_gateway_that_starts_while_redis_is_full_knows_the_keys(
    redis: Redis, store: KeyStore, clock: FakeClock, tmp_path: Path
) -> None:
    key = generate_key()
    path = tmp_path / "keys.yaml"
    path.write_text(f"[{{tenant: acme, key: {key}}}]")
    async with KeysFile(path, store):
        pass
    await fill(redis)
    async with KeysFile(path, store) as file, KeySnapshot(redis, PEPPER, clock, 0.01) as snapshot:
        assert file.ready
        await eventually(lambda: accepts(snapshot, key))
        assert [record.tenant for record in await store.list()] == ["acme"]


async def test_uses_that_cannot_be_written_keep_nobody_from_following_the_keys(
    redis: Redis, store: KeyStore, clock: FakeClock
) -> None:
    one = await store.create("team-a")
    async with KeySnapshot(redis, PEPPER, clock, 0.01) as snapshot:
        await eventually(lambda: snapshot.ready)
        await fill(redis)
        assert accepts(snapshot, one.key)
        scripts = await _evals(redis)

        async def tried() -> bool:
            return await _evals(redis) > scripts

        await until(tried)
        assert not snapshot.degraded
        await store.revoke(one.record.key_id)
        await eventually(lambda: not accepts(snapshot, one.key))


async def _evals(redis: Redis) -> int:
    stats = await redis.info("commandstats")
    return int(stats.get("cmdstat_eval", {}).get("calls", 0))


async def test_keys_are_made_and_rotated_while_redis_is_full(
    redis: Redis, store: KeyStore, clock: FakeClock
) -> None:
    old = await store.create("team-a")
    async with KeySnapshot(redis, PEPPER, clock, NEVER_S) as snapshot:
        await eventually(lambda: snapshot.ready)
        await fill(redis)
        made = await store.create("team-a")
        rotated = await store.rotate(old.record.key_id)
        at_once = await store.rotate(rotated.new.record.key_id, grace_s=0)
        for key in (made.key, old.key, at_once.new.key):
            await eventually(partial(accepts, snapshot, key))
        await eventually(lambda: not accepts(snapshot, rotated.new.key))


async def test_a_keys_file_that_changes_is_followed_while_redis_is_full(
    redis: Redis, store: KeyStore, tmp_path: Path
) -> None:
    await fill(redis)
    path = tmp_path / "keys.yaml"
    path.write_text(f"[{{tenant: acme, key: {generate_key()}}}]")
    async with KeysFile(path, store) as file:
        assert file.ready
        assert [record.tenant for record in await store.list()] == ["acme"]


async def test_u2_the_ledger_is_exported_and_trimmed_while_redis_is_full(
    redis: Redis, tmp_path: Path
) -> None:
    await append(redis, *(record(f"r{number}", LONG_AGO_S) for number in range(3000)))
    config = UsageConfig(export_directory=str(tmp_path), retention_days=1)
    exporter = UsageExporter(redis, lambda: config)
    await fill(redis)
    assert await exporter.export() == 3000
    assert await exporter.export() == 0
    assert await redis.xlen(stream_of("acme")) == 0
    assert len(list(read_export(tmp_path))) == 3000


def ledger(**values: Any) -> UsageConfig:
    return UsageConfig(retention_days=100_000, **values)


async def append_many(redis: Redis, tenant: str, count: int) -> None:
    user = "u" * 512  # the longest, so that fewer are needed
    await append(redis, *(record(f"{tenant}{n}", tenant=tenant, user=user) for n in range(count)))


async def ledger_bytes(redis: Redis, *tenants: str) -> int:
    sizes = [await redis.memory_usage(stream_of(tenant), samples=0) for tenant in tenants]
    return sum(size or 0 for size in sizes)


async def test_the_ledger_is_bounded_and_who_fills_it_loses_history(
    redis: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    await append_many(redis, "flood", 3000)
    await append_many(redis, "quiet", 50)
    assert await ledger_bytes(redis, "flood", "quiet") > 2 * MIB
    await UsageExporter(redis, lambda: ledger(max_bytes=MIB)).export()
    assert await ledger_bytes(redis, "flood", "quiet") <= MIB + 128 * 1024  # a node more
    assert await redis.xlen(stream_of("quiet")) == 50
    newest: Any = await redis.xrevrange(stream_of("flood"), count=1)
    assert newest[0][1][b"id"] == b"flood2999"
    (told,) = [each.message for each in caplog.records if "ledger is full" in each.message]
    assert "'flood'" in told


async def test_u2_what_is_in_no_file_yet_is_kept_beyond_the_bound(
    redis: Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await append_many(redis, "flood", 3000)
    exporter = UsageExporter(redis, lambda: ledger(max_bytes=MIB, export_directory=str(tmp_path)))
    await exporter.export()
    assert len(list(read_export(tmp_path))) == 3000
    kept = await redis.xlen(stream_of("flood"))
    assert kept < 2000

    async def nothing(*_: object) -> int:
        return 0

    await append(redis, *(record(f"r{n}", NOON_S + 9, tenant="flood") for n in range(3000)))
    monkeypatch.setattr(UsageExporter, "_export_tenant", nothing)  # the export is behind
    await exporter.export()
    assert await redis.xlen(stream_of("flood")) == kept + 3000


@pytest.mark.parametrize(
    ("sizes", "most", "level"),
    [
        pytest.param([], 10, 10, id="nobody"),
        pytest.param([3, 4], 10, 10, id="enough for all"),
        pytest.param([3, 4, 50], 10, 3, id="an equal share"),
        pytest.param([1, 50, 60], 11, 5, id="what the small ones leave"),
        pytest.param([50], 10, 10, id="alone"),
    ],
)
def test_the_larger_ones_shrink_to_one_level(sizes: list[int], most: int, level: int) -> None:
    assert fair_level(sizes, most) == level
    assert sum(min(size, level) for size in sizes) <= most


def test_a_bound_that_holds_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="maxBytes"):
        UsageConfig.parse({"maxBytes": 1000})


async def test_its_memory_is_known_and_a_policy_that_evicts_is_told_once(
    redis: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    await redis.config_set("maxmemory", 64 * MIB)
    await redis.config_set("maxmemory-policy", "volatile-ttl")
    async with RedisMemory(redis, 0.001) as watched:
        await until(lambda: watched.memory.max_bytes == 64 * MIB)
        assert 0 < watched.memory.used_bytes < 64 * MIB
        await redis.config_set("maxmemory", 32 * MIB)
        await until(lambda: watched.memory.max_bytes == 32 * MIB)
    (told,) = [each.message for each in caplog.records if "evict" in each.message]
    assert "volatile-ttl" in told

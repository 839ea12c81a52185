"""A keys file as a Secret's volume has it, whose versions follow each other under a real Redis."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest
import yaml

from tera.config.limits import Limits
from tera.errors import ConfigError, InternalError
from tera.tenancy.key_store import KeyStore
from tera.tenancy.keys import ApiKey, generate_key
from tera.tenancy.keys_file import KeysFile

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from redis.asyncio import Redis
    from tests.tenancy.conftest import RedisServer

POLL_S = 0.01
ONE, TWO = generate_key(), generate_key()


class Secret:
    """A mounted Secret: kubelet makes a directory for each version and swaps a link."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._version = 0
        self.path = directory / "keys.yaml"
        self.path.symlink_to("..data/keys.yaml")

    def write(self, content: str | None) -> None:
        """Swap in another version; None is one without the file."""
        self._version += 1
        version = self._directory / f"..{self._version}"
        version.mkdir()
        if content is not None:
            (version / "keys.yaml").write_text(content)
        link = self._directory / "..data_tmp"
        link.symlink_to(version.name)
        link.rename(self._directory / "..data")


@pytest.fixture
def secret(tmp_path: Path) -> Secret:
    directory = tmp_path / "keys"
    directory.mkdir()
    return Secret(directory)


def keys(*keys: str, tenant: str = "acme", **settings: object) -> str:
    return yaml.safe_dump([{"tenant": tenant, "key": key, **settings} for key in keys])


async def eventually(store: KeyStore, met: Callable[[list[ApiKey]], bool]) -> list[ApiKey]:
    """Return what the store has once it is so."""
    async with asyncio.timeout(10):
        while True:
            with suppress(InternalError):  # a connection to a server that was killed
                found = await store.list()
                if met(found):
                    return found
            await asyncio.sleep(POLL_S)


async def test_a_new_version_is_in_force_without_a_restart(secret: Secret, store: KeyStore) -> None:
    secret.write(keys(ONE))
    async with KeysFile(secret.path, store, POLL_S):
        (one,) = await store.list()
        secret.write(keys(ONE, TWO, limits={"requestsPerMinute": 5}))
        found = await eventually(store, lambda found: len(found) == 2)
        assert [record.limits for record in found] == [Limits(requests_per_minute=5)] * 2
        secret.write(keys(ONE))  # a former version, but new here
        await eventually(store, lambda found: one in found)
        assert len(await store.list()) == 2


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        pytest.param("- tenant: 'acme", "invalid YAML in line 1", id="syntax"),
        pytest.param("- {tenant: acme}", "0: give either key or keyHash", id="entry"),
        pytest.param(keys(TWO, TWO[:-1] + "!"), "1: The key to import is not a Tera key", id="key"),
        pytest.param(keys(TWO, models=[""]), "0: Name at least one model id", id="models"),
        pytest.param(None, "cannot be read", id="missing"),
    ],
)
async def test_a_version_with_a_fault_is_told_once_and_leaves_the_former_in_force(
    secret: Secret,
    store: KeyStore,
    caplog: pytest.LogCaptureFixture,
    content: str | None,
    fault: str,
) -> None:
    secret.write(keys(ONE))
    async with KeysFile(secret.path, store, POLL_S):
        before = await store.list()
        secret.write(content)
        await eventually(store, lambda _: bool(caplog.records))
        assert await store.list() == before
        secret.write(keys(ONE, TWO))
        await eventually(store, lambda found: len(found) == 2)
    (told,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert f"{secret.path}: {fault}" in told.message
    assert TWO[:-1] not in caplog.text


async def test_a_fault_at_the_start_is_an_error_with_its_path(
    secret: Secret, store: KeyStore
) -> None:
    secret.write(keys(ONE, ONE[:-1] + "!"))
    with pytest.raises(ConfigError) as raised:
        async with KeysFile(secret.path, store, POLL_S):
            pass
    assert raised.value.message.startswith(f"{secret.path}: 1: ")
    assert await store.list() == []


async def test_keys_come_back_when_redis_has_lost_them(
    secret: Secret, store: KeyStore, redis_server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    secret.write(keys(ONE))
    async with KeysFile(secret.path, store, POLL_S):
        before = await store.list()
        secret.write("faulty: [")
        await eventually(store, lambda _: bool(caplog.records))
        redis_server.kill()
        redis_server.erase()
        redis_server.start()
        assert await eventually(store, bool) == before


async def test_a_version_that_comes_while_redis_is_away_is_imported_when_it_is_back(
    secret: Secret, store: KeyStore, redis_server: RedisServer
) -> None:
    secret.write(keys(ONE))
    async with KeysFile(secret.path, store, POLL_S):
        redis_server.kill()
        secret.write(keys(ONE, TWO))
        redis_server.start()
        await eventually(store, lambda found: len(found) == 2)


async def test_a_replica_that_has_the_former_version_still_does_not_bring_it_back(
    secret: Secret, tmp_path: Path, store: KeyStore, redis: Redis
) -> None:
    (tmp_path / "elsewhere").mkdir()
    elsewhere = Secret(tmp_path / "elsewhere")
    secret.write(keys(ONE))
    elsewhere.write(keys(ONE, tenant="beta"))

    async def looks() -> int:
        stats = await redis.info("commandstats")
        return int(stats.get("cmdstat_sismember", {}).get("calls", 0))

    async with KeysFile(secret.path, store, POLL_S), KeysFile(elsewhere.path, store, 3600):
        enough = await looks() + 2
        for _ in range(1000):
            await asyncio.sleep(POLL_S)
            if await looks() >= enough:
                break
        else:
            pytest.fail("the file is not followed")
        (one,) = await store.list()
        assert one.tenant == "beta"


async def test_a_key_that_was_revoked_stays_so(
    secret: Secret, store: KeyStore, caplog: pytest.LogCaptureFixture
) -> None:
    secret.write(keys(ONE))
    async with KeysFile(secret.path, store, POLL_S):
        (one,) = await store.list()
        await store.revoke(one.key_id)
        secret.write(keys(ONE, TWO))
        (two,) = await eventually(store, bool)
        assert two.key_id != one.key_id
    assert one.key_id in caplog.text


async def test_l7_keys_are_imported_as_soon_as_redis_is_there(
    secret: Secret, store: KeyStore, redis_server: RedisServer
) -> None:
    secret.write(keys(ONE))
    redis_server.kill()
    async with KeysFile(secret.path, store, POLL_S) as file:
        assert not file.ready
        redis_server.start()
        await eventually(store, lambda _: file.ready)
        assert len(await store.list()) == 1

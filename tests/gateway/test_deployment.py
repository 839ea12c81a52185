"""What a gateway replica does beside requests, as far as it needs no Ray."""

import asyncio
import gc
import logging
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytest_asyncio
from tests.gateway.conftest import Gateway
from tests.tenancy.conftest import RedisServer
from tests.tenancy.waiting import until

from tera.config.names import ENGINE_DEPLOYMENT, application_name
from tera.errors import ConfigError
from tera.gateway import deployment
from tera.gateway.deployment import GatewayReplica, StatusWatcher, _spare_collections
from tera.tenancy.keys import generate_key

NEVER_S = 3600.0


@dataclass
class FakeServe:
    """Serve's answer to who asks for its status, and how often somebody did."""

    running: dict[str, int] = field(default_factory=dict)
    """Replicas by model."""
    error: Exception | None = None
    looks: int = 0

    def get_replica_context(self) -> Any:
        return SimpleNamespace(replica_id=SimpleNamespace(unique_id="gateway#1"))

    def status(self) -> Any:
        self.looks += 1
        if self.error is not None:
            raise self.error
        applications = {
            application_name(name): SimpleNamespace(
                status="RUNNING",
                deployments={
                    ENGINE_DEPLOYMENT: SimpleNamespace(replica_states={"RUNNING": replicas})
                },
            )
            for name, replicas in self.running.items()
        }
        return SimpleNamespace(applications=applications)


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> FakeServe:
    serve = FakeServe()
    monkeypatch.setattr(deployment, "serve", serve)
    return serve


@pytest_asyncio.fixture
async def watcher(gateway: Gateway, serve: FakeServe) -> AsyncGenerator[StatusWatcher]:
    """One that looks all the time, until every model is ready."""
    models = [gateway.model("one", "sim/one"), gateway.model("two", "sim/two")]
    gateway.catalog.replace({model.name: model for model in models})
    watcher = StatusWatcher(gateway.catalog, interval_s=0.001, steady_interval_s=NEVER_S)
    async with watcher:
        yield watcher


async def test_m4_a_models_status_follows_its_replicas(
    watcher: StatusWatcher, serve: FakeServe
) -> None:
    assert [watcher.status(name) for name in ("one", "two")] == ["starting", "starting"]
    assert not watcher.any_answered
    serve.running = {"one": 1}
    await until(lambda: watcher.status("one") == "ready")
    assert watcher.any_answered
    assert watcher.status("two") == "starting"
    serve.running = {"two": 2}
    await until(lambda: (watcher.status("one"), watcher.status("two")) == ("starting", "ready"))
    assert watcher.any_answered


async def test_m4_a_model_that_is_not_in_the_catalog_is_only_starting(
    watcher: StatusWatcher, serve: FakeServe
) -> None:
    serve.running = {"one": 1, "three": 1}
    await until(lambda: watcher.status("one") == "ready")
    assert watcher.status("three") == "starting"


async def test_while_serve_does_not_answer_what_was_known_is_kept(
    watcher: StatusWatcher, serve: FakeServe, caplog: pytest.LogCaptureFixture
) -> None:
    serve.running = {"one": 1}
    await until(lambda: watcher.status("one") == "ready")
    with caplog.at_level(logging.WARNING):
        serve.error = RuntimeError("the controller is away")
        looks = serve.looks
        await until(lambda: serve.looks > looks + 3)
    assert watcher.status("one") == "ready"
    assert "status could not be read" in caplog.text
    serve.error, serve.running = None, {}
    await until(lambda: watcher.status("one") == "starting")


async def test_while_all_is_well_nobody_looks_until_something_has_changed(
    watcher: StatusWatcher, serve: FakeServe
) -> None:
    serve.running = {"one": 1, "two": 1}
    await until(lambda: (watcher.status("one"), watcher.status("two")) == ("ready", "ready"))
    serve.running = {"one": 1}
    other = StatusWatcher(watcher._catalog, interval_s=0.001, steady_interval_s=NEVER_S)
    async with other:  # its looks are a clock
        looks = serve.looks
        await until(lambda: serve.looks > looks + 20)
        assert (watcher.status("two"), other.status("two")) == ("ready", "starting")
    watcher.look_soon()
    await until(lambda: watcher.status("two") == "starting")


async def test_a_watcher_leaves_no_task_behind(gateway: Gateway, serve: FakeServe) -> None:
    before = asyncio.all_tasks()
    async with StatusWatcher(gateway.catalog, interval_s=0.001, steady_interval_s=NEVER_S):
        await until(lambda: serve.looks > 0)
    assert asyncio.all_tasks() == before


@pytest.fixture
def collections() -> Iterator[None]:
    """Put the collector back as it was."""
    thresholds = gc.get_threshold()
    yield
    gc.unfreeze()
    gc.set_threshold(*thresholds)


@pytest.mark.usefixtures("collections")
def test_what_is_there_at_the_start_is_not_looked_through_again() -> None:
    before = gc.get_threshold()[0]
    _spare_collections()
    assert gc.get_freeze_count() > 0
    assert gc.get_threshold()[0] > before
    assert gc.isenabled()  # a cycle that is made later is still found


class Replica(GatewayReplica):
    """A gateway replica outside of Serve, which nobody but the test closes."""

    def __del__(self) -> None:  # type: ignore[override]  # Serve's is awaited
        pass

    @classmethod
    @asynccontextmanager
    async def running(cls) -> AsyncGenerator[GatewayReplica]:
        replica = cls.__new__(cls)
        await GatewayReplica.__init__(replica)  # as Serve does
        try:
            yield replica
        finally:
            await GatewayReplica.__del__(replica)


@pytest.fixture
def redis_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RedisServer]:
    """The Redis of the gateway that the environment describes."""
    monkeypatch.setattr(deployment, "log_json_lines", lambda: None)
    with RedisServer.running(tmp_path / "redis") as server:
        for name, value in {
            "REDIS_URL": server.url,
            "KEY_PEPPER": "pepper",
            "CLUSTER_SECRET": "secret",
            "CHANNEL_HOST": "127.0.0.1",
            "KEYS_FILE": str(tmp_path / "keys.yaml"),
        }.items():
            monkeypatch.setenv(f"TERA_{name}", value)
        yield server


@pytest.mark.usefixtures("serve")
async def test_l7_a_gateway_that_starts_before_its_redis_waits_for_it(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    key = generate_key()
    (tmp_path / "keys.yaml").write_text(f"[{{tenant: acme, key: {key}}}]")
    redis_server.kill()
    async with Replica.running() as replica:
        assert await replica.readiness() == (False, {"models": {}, "redis": "away"})
        redis_server.start()

        async def ready() -> bool:
            return (await replica.readiness())[0]

        await until(ready)
        assert replica._keys_file is not None
        assert replica._keys_file.ready
        await until(lambda: replica._keys.version > 0)
        assert replica._pipeline.authenticate(f"Bearer {key}").tenant == "acme"


@pytest.mark.usefixtures("serve", "redis_server")
async def test_a_gateway_does_not_start_with_a_redis_cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with RedisServer.running(tmp_path / "node", "--cluster-enabled", "yes") as node:
        monkeypatch.setenv("TERA_REDIS_URL", node.url)
        replica = Replica.__new__(Replica)
        with pytest.raises(ConfigError, match="Redis Cluster"):
            await GatewayReplica.__init__(replica)  # as Serve does
        await GatewayReplica.__del__(replica)

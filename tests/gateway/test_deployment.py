"""What a gateway replica does beside requests, as far as it needs no Ray."""

import asyncio
import gc
import logging
import sys
import threading
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytest_asyncio
from tests.gateway.conftest import CALLER, Gateway, exchange
from tests.tenancy.conftest import RedisServer
from tests.tenancy.waiting import until

from tera.config.names import ENGINE_DEPLOYMENT, application_name
from tera.contract.common import ModelCard
from tera.errors import ConfigError, TeraError
from tera.gateway import deployment
from tera.gateway.deployment import (
    SWITCH_INTERVAL_S,
    GatewayReplica,
    StatusWatcher,
    _spare_collections,
)
from tera.gateway.dialects.base import Unblocked
from tera.gateway.dialects.completions import CompletionQuestion
from tera.gateway.simulated_text import SimulatedTextModel
from tera.gateway.vllm_text import VllmTextModel
from tera.tenancy.keys import generate_key

NEVER_S = 3600.0


@dataclass
class FakeServe:
    """Serve's answer to who asks for its status, and how often somebody did."""

    running: dict[str, int] = field(default_factory=dict)
    """Replicas by model."""
    failed: dict[str, str] = field(default_factory=dict)
    """Serve's message on models that it could not deploy."""
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
        for name, message in self.failed.items():
            deployment = SimpleNamespace(replica_states={"STARTING": 1}, message=message)
            applications[application_name(name)] = SimpleNamespace(
                status="DEPLOY_FAILED", message="", deployments={ENGINE_DEPLOYMENT: deployment}
            )
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
    (tmp_path / "keys.yaml").write_text("[]")
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


GOOD = {"id": "org/good", "source": "hf://org/good"}
GATED = {"id": "org/gated", "source": "hf://org/gated"}
SLOW = {"id": "org/slow", "source": "hf://org/slow"}


class Hub:
    """Where a gateway's vllm models come from."""

    def __init__(self) -> None:
        self.gated = True
        self.slow = threading.Event()

    def load(self, path: str, args: object, grammars: object) -> SimulatedTextModel:
        if path == "org/gated" and self.gated:
            raise ConfigError("Access to /srv/models/org/gated is restricted.")
        if path == "org/slow":
            self.slow.wait(60)
        return SimulatedTextModel({})


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    hub = Hub()
    monkeypatch.setattr(VllmTextModel, "prepare", lambda: None)
    monkeypatch.setattr(VllmTextModel, "load", hub.load)
    monkeypatch.setattr(deployment, "_spare_collections", lambda: None)
    # Serve would tell it of replicas.
    monkeypatch.setattr(deployment, "ServedReplicas", lambda *names: SimpleNamespace())
    yield hub
    hub.slow.set()


def catalog(**models: dict[str, Any]) -> dict[str, Any]:
    return {"gateway": {}, "models": models}


def cards(replica: GatewayReplica) -> dict[str, ModelCard]:
    return {card.id: card for card in replica._pipeline.model_cards(CALLER)}


async def answers(replica: GatewayReplica, model: str) -> TeraError | None:
    """Return what becomes of a request once its model has been found; None for an answer."""
    body = {"model": model, "prompt": [[10**9]]}  # no model has such a token: it goes no further
    request = CompletionQuestion(body).request
    try:
        await replica._pipeline.generate(CALLER, request, exchange(), Unread())
    except TeraError as error:
        return None if error.code == "invalid_value" else error
    raise AssertionError("no model has such a token")


class Unread(Unblocked):
    """An answer that nobody reads."""

    def add(self, piece: object) -> None:
        raise AssertionError("nothing is generated")


@pytest.mark.usefixtures("redis_server")
async def test_one_broken_model_of_three_is_marked_failed_and_the_others_are_served(
    serve: FakeServe, hub: Hub
) -> None:
    serve.running = {"good": 1, "gated": 1, "sim": 1}
    simulated = {"id": "sim/one", "engine": {"kind": "simulated"}}
    async with Replica.running() as replica:
        await replica.reconfigure(catalog(good=GOOD, gated=GATED, sim=simulated))

        async def settled() -> bool:
            return (await replica.readiness())[0]

        await until(settled)
        _, details = await replica.readiness()
        assert details["models"] == {
            "org/good": "ready",
            "org/gated": "failed",
            "sim/one": "ready",
        }
        # Operators learn why, without the machine's directories; tenants that it has failed.
        assert details["failures"] == {"gated": "Access to …/gated is restricted."}
        shown = cards(replica)
        assert (shown["org/gated"].status, shown["org/gated"].context_length) == ("failed", None)
        assert shown["org/good"].status == "ready"
        metrics = replica.own_exposition()
        assert 'tera_model_failed{model="gated"} 1.0' in metrics
        assert 'tera_model_failed{model="good"} 0.0' in metrics

        assert await answers(replica, "org/good") is None
        error = await answers(replica, "org/gated")
        assert error is not None
        assert (error.status, error.code) == (500, "backend_failure")
        assert "failed to start" in error.message
        assert "gated" not in error.message.replace("org/gated", "")

        hub.gated = False
        await replica.reconfigure(catalog(good=GOOD, gated=GATED, sim=simulated))
        assert (await replica.readiness())[1]["models"]["org/gated"] == "ready"
        assert await answers(replica, "org/gated") is None
        assert 'tera_model_failed{model="gated"} 0.0' in replica.own_exposition()


@pytest.mark.usefixtures("redis_server")
async def test_settings_that_are_refused_take_only_their_model_away(
    serve: FakeServe, hub: Hub, caplog: pytest.LogCaptureFixture
) -> None:
    serve.running = {"good": 1}
    async with Replica.running() as replica:
        wrong = {"id": "org/wrong", "source": "ftp://org/wrong"}
        await replica.reconfigure(catalog(good=GOOD, wrong=wrong))
        assert list(cards(replica)) == ["org/good"]
        failures = (await replica.readiness())[1]["failures"]
        assert "ftp://org/wrong" in failures["wrong"]
        assert "ftp://org/wrong" in caplog.text
        assert 'tera_model_failed{model="wrong"} 1.0' in replica.own_exposition()
        await replica.reconfigure(catalog(good=GOOD))
        assert "failures" not in (await replica.readiness())[1]
        assert "wrong" not in replica.own_exposition()


@pytest.mark.usefixtures("redis_server")
async def test_a_slow_model_delays_neither_the_others_nor_readiness(
    serve: FakeServe, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deployment, "LOADING_S", 0.05)
    serve.running = {"good": 1, "slow": 1}
    async with Replica.running() as replica:
        await replica.reconfigure(catalog(slow=SLOW, good=GOOD))

        async def ready() -> bool:
            return (await replica.readiness())[0]

        await until(ready)
        assert (await replica.readiness())[1]["models"] == {
            "org/slow": "starting",
            "org/good": "ready",
        }
        assert await answers(replica, "org/good") is None
        waiting = asyncio.ensure_future(answers(replica, "org/slow"))
        await asyncio.sleep(0)
        assert not waiting.done(), "a request is held as for a cold start"
        hub.slow.set()
        assert await waiting is None


@pytest.mark.usefixtures("redis_server")
async def test_a_request_waits_for_a_slow_model_as_long_as_for_a_cold_start(
    serve: FakeServe, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deployment, "LOADING_S", 0.05)
    serve.running = {"slow": 1}
    async with Replica.running() as replica:
        slow = {**SLOW, "scaling": {"coldStartDeadlineSeconds": 0.05}}
        await replica.reconfigure(catalog(slow=slow))
        error = await answers(replica, "org/slow")
        assert error is not None
        assert error.code == "backend_failure"


@pytest.mark.usefixtures("redis_server")
async def test_a_model_whose_engine_does_not_start_fails_alone(serve: FakeServe, hub: Hub) -> None:
    serve.running = {"good": 1}
    serve.failed = {
        "bad": "The deployment failed to start 3 times in a row.\n  File /srv/x.py\n"
        "ValueError: No weights in /srv/models/bad"
    }
    async with Replica.running() as replica:
        bad = {"id": "org/bad", "source": "hf://org/bad"}
        await replica.reconfigure(catalog(good=GOOD, bad=bad))

        async def ready() -> bool:
            return (await replica.readiness())[0]

        await until(ready)
        _, details = await replica.readiness()
        assert details["models"] == {"org/good": "ready", "org/bad": "failed"}
        assert details["failures"] == {"bad": "ValueError: No weights in …/bad"}
        error = await answers(replica, "org/bad")
        assert error is not None, "refused at once, not after the deadline of a cold start"
        assert error.code == "backend_failure"


@pytest.mark.usefixtures("serve", "redis_server")
async def test_x1_threads_soon_give_way_to_the_event_loop() -> None:
    sys.setswitchinterval(0.005)  # Python's own
    async with Replica.running():
        assert sys.getswitchinterval() == pytest.approx(SWITCH_INTERVAL_S)

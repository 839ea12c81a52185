"""The gateway's end of the token channel, with replicas that go or fall silent."""

import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import pytest
from tests.routing.conftest import (
    HOST,
    SECRET,
    FakeReplica,
    Heard,
    RecordingWatcher,
    RecordingWorker,
    until,
)
from tests.routing.generations import ROOM, begun, generation, last

from tera import wire
from tera.engine.link import GatewayLinks
from tera.errors import ReplicaLostError, TeraError
from tera.generation import GenerationFailure, ReplicaLoad, TokenDelta
from tera.routing import link as link_module
from tera.routing.link import ReplicaLinks


@asynccontextmanager
async def engine_end(worker: RecordingWorker) -> AsyncGenerator[GatewayLinks]:
    """Yield the real other end, of a replica called replica-1."""
    there = GatewayLinks("replica-1", SECRET, worker)
    try:
        yield there
    finally:
        await there.close()


class TestLoss:
    async def test_broken_connection_fails_exactly_the_generations_of_that_replica(
        self, links: ReplicaLinks
    ) -> None:
        lost = await FakeReplica.connect(links.address, "lost")
        other = await FakeReplica.connect(links.address, "other")
        running = [begun(links, "lost") for _ in range(3)]  # the last two were never answered
        number, heard = begun(links, "other")
        await lost.send(TokenDelta(running[0][0], [1]))
        await other.send(TokenDelta(number, [2]))
        await until(lambda: bool(running[0][1].deltas))
        await lost.lose()
        await until(lambda: all(each.error is not None for _, each in running))
        assert {type(each.error) for _, each in running} == {ReplicaLostError}
        assert links.find("lost") is None
        await other.send(last(number, 3))
        await until(lambda: heard.finish_reason is not None)
        assert (heard.token_ids, heard.error) == ([2, 3], None)
        await other.close()

    async def test_deltas_before_the_loss_are_heard_first(self, links: ReplicaLinks) -> None:
        replica = await FakeReplica.connect(links.address)
        number, heard = begun(links, "replica")
        await replica.begin()
        await replica.send(TokenDelta(number, [1]))
        await replica.send(TokenDelta(number, [2]))
        await replica.close()
        await until(lambda: heard.error is not None)
        assert heard.token_ids == [1, 2]

    async def test_a_lost_replica_is_chosen_by_none_of_those_that_it_fails(
        self, links: ReplicaLinks
    ) -> None:
        watcher = RecordingWatcher()

        class Sender(Heard):
            def fail(self, error: TeraError) -> None:
                super().fail(error)
                found.append(links.find("replica"))
                told.append(watcher.heard[-1])

        found: list[object] = []
        told: list[str] = []
        links.watch("replica", watcher)
        replica = await FakeReplica.connect(links.address)
        link = links.find("replica")
        assert link is not None
        link.begin(generation(links), ROOM, Sender())
        await replica.lose()
        await until(lambda: bool(told))
        assert (found, told) == ([None], ["replica lost"])

    async def test_the_end_of_an_old_connection_takes_nothing_from_the_new_one(
        self, links: ReplicaLinks
    ) -> None:
        watcher = RecordingWatcher()
        links.watch("replica", watcher)
        old = await FakeReplica.connect(links.address)
        old_number, old_heard = begun(links, "replica")
        new = await FakeReplica.connect(links.address)
        number, heard = begun(links, "replica")
        await old.send(TokenDelta(old_number, [1]))
        await new.send(TokenDelta(number, [2]))
        await until(lambda: bool(old_heard.deltas and heard.deltas))
        current = links.find("replica")
        await old.lose()
        await until(lambda: old_heard.error is not None)
        assert links.find("replica") is current is not None
        assert "replica lost" not in watcher.heard
        await new.send(last(number, 3))
        await until(lambda: heard.finish_reason is not None)
        assert (heard.token_ids, heard.error) == ([2, 3], None)
        await new.close()

    async def test_no_replica_writes_into_what_was_sent_to_another(
        self, links: ReplicaLinks
    ) -> None:
        replica = await FakeReplica.connect(links.address, "asked")
        other = await FakeReplica.connect(links.address, "other")
        number, heard = begun(links, "asked")
        own, own_heard = begun(links, "other")
        await other.send(
            TokenDelta(number, [666]),
            last(number),
            TokenDelta(own, [1]),
            failures=[GenerationFailure(number, "The engine failed.")],
            refused=[number],
        )
        await until(lambda: own_heard.token_ids == [1])
        assert (heard.deltas, heard.error, heard.refused) == ([], None, False)
        await replica.send(last(number, 2))
        await until(lambda: heard.token_ids == [2])
        for each in (replica, other):
            await each.close()

    async def test_closing_fails_what_runs_and_tells_no_watcher(self) -> None:
        watcher = RecordingWatcher()
        async with ReplicaLinks(HOST, SECRET) as links:
            links.watch("replica", watcher)
            replica = await FakeReplica.connect(links.address)
            _, heard = begun(links, "replica")
        await replica.closed()
        assert isinstance(heard.error, ReplicaLostError)
        # Whoever heard of a loss now would ask the replica to connect to nothing.
        assert watcher.heard == ["replica connected"]


class TestWatching:
    async def test_a_watcher_hears_of_its_replica_alone(self, links: ReplicaLinks) -> None:
        watcher = RecordingWatcher()
        losses: list[None] = []
        links.on_lost = lambda: losses.append(None)
        links.watch("replica", watcher)
        busy, idle = ReplicaLoad(running=2, waiting=1), ReplicaLoad()
        replica = await FakeReplica.connect(links.address)
        other = await FakeReplica.connect(links.address, "other")
        for load in (busy, idle, idle, busy):
            await replica.beat(load)
            await other.beat(load)
        await until(lambda: len(watcher.heard) == 5)
        heard = ["replica connected", "replica has 3", "replica has 0", "replica has 0"]
        heard.append("replica has 3")
        assert watcher.heard == heard
        # With tokens, a load is told when it changes; a heartbeat repeats it.
        for load in (busy, busy, idle, idle):
            await replica.send(TokenDelta(0, [1]), load=load)
        await replica.beat(idle)
        await until(lambda: len(watcher.heard) == 7)
        assert watcher.heard[5:] == ["replica has 0"] * 2
        await replica.send(draining=True)
        await replica.send(TokenDelta(0, [1]), draining=True)
        await replica.lose()
        await until(lambda: bool(losses))
        assert watcher.heard[7:] == ["replica has 0", "replica drains", "replica lost"]
        await other.close()

    async def test_whoever_watches_no_more_hears_nothing_and_the_link_goes_on(
        self, links: ReplicaLinks
    ) -> None:
        watcher = RecordingWatcher()
        links.watch("replica", watcher)
        replica = await FakeReplica.connect(links.address)
        number, heard = begun(links, "replica")
        links.unwatch("replica")
        await replica.send(last(number, 1), load=ReplicaLoad(running=1), draining=True)
        await until(lambda: heard.token_ids == [1])
        await replica.lose()
        await until(lambda: links.find("replica") is None)
        assert watcher.heard == ["replica connected"]


class TestSilence:
    @pytest.fixture(autouse=True)
    def quick(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(wire, "HEARTBEAT_S", 0.01)
        monkeypatch.setattr(wire, "SILENCE_S", 0.3)
        monkeypatch.setattr(link_module, "CHECK_S", 0.02)

    async def test_an_idle_replica_is_heard_and_its_load_is_fresh(
        self, links: ReplicaLinks
    ) -> None:
        watcher = RecordingWatcher()
        links.watch("replica-1", watcher)
        worker = RecordingWorker()
        async with engine_end(worker) as there:
            await there.connect(links.address)
            await until(lambda: watcher.heard.count("replica-1 has 0") > 2)
            worker.figures = ReplicaLoad(running=5)
            await until(lambda: watcher.heard[-1] == "replica-1 has 5")

    async def test_a_replica_that_falls_silent_loses_exactly_its_generations(
        self, links: ReplicaLinks
    ) -> None:
        frozen = await FakeReplica.connect(links.address, "frozen")
        await frozen.beat()
        lost, lost_heard = begun(links, "frozen")
        await frozen.send(TokenDelta(lost, [1]))
        async with engine_end(RecordingWorker()) as there:
            await there.connect(links.address)
            number, heard = begun(links, "replica-1")
            await until(lambda: lost_heard.error is not None)
            assert isinstance(lost_heard.error, ReplicaLostError)
            assert lost_heard.token_ids == [1]
            (task,) = there._links.values()
            task.result().send(last(number, 3))
            await until(lambda: heard.finish_reason is not None)
            assert (heard.token_ids, heard.error) == ([3], None)
        await frozen.closed()

    async def test_a_replica_without_work_that_falls_silent_is_lost_too(
        self, links: ReplicaLinks
    ) -> None:
        watcher = RecordingWatcher()
        links.watch("frozen", watcher)
        frozen = await FakeReplica.connect(links.address, "frozen")
        await frozen.beat()
        await until(lambda: watcher.heard[-1] == "frozen lost")
        assert links.find("frozen") is None
        await frozen.closed()

    async def test_a_replica_that_thaws_is_hung_up_on_and_may_come_back(
        self, links: ReplicaLinks
    ) -> None:
        watcher = RecordingWatcher()
        links.watch("frozen", watcher)
        frozen = await FakeReplica.connect(links.address, "frozen")
        lost, lost_heard = begun(links, "frozen")
        await frozen.beat()
        await frozen.send(TokenDelta(lost, [1]))
        await until(lambda: watcher.heard[-1] == "frozen lost")
        await frozen.closed()
        thawed = await FakeReplica.connect(links.address, "frozen")
        connected = "frozen connected"
        assert watcher.heard == [connected, "frozen has 0", "frozen lost", connected]
        number, heard = begun(links, "frozen")
        await thawed.send(last(lost, 99), last(number, 2))
        await until(lambda: heard.token_ids == [2])
        assert lost_heard.token_ids == [1]
        await thawed.close()

    async def test_a_replica_that_sends_no_heartbeats_is_not_judged_by_them(
        self, links: ReplicaLinks
    ) -> None:
        older = await FakeReplica.connect(links.address, "older")
        number, heard = begun(links, "older")
        await older.send(TokenDelta(number, [1]))
        frozen = await FakeReplica.connect(links.address, "frozen")
        await frozen.beat()
        await until(lambda: links.find("frozen") is None)  # after both were silent for as long
        await older.send(last(number, 2))
        await until(lambda: heard.finish_reason is not None)
        assert heard.token_ids == [1, 2]
        for each in (older, frozen):
            await each.close()

    async def test_a_gateway_that_was_kept_blames_no_replica(self, links: ReplicaLinks) -> None:
        watcher = RecordingWatcher()
        links.watch("replica-1", watcher)
        async with engine_end(RecordingWorker()) as there:
            await there.connect(links.address)
            await until(lambda: len(watcher.heard) > 1)
            time.sleep(2 * wire.SILENCE_S)  # noqa: ASYNC251  both ends' loop is what is kept
            count = len(watcher.heard)
            await until(lambda: len(watcher.heard) > count + 5)
            assert "replica-1 lost" not in watcher.heard

    async def test_an_engine_that_makes_no_step_loses_its_generations_though_it_beats(
        self,
    ) -> None:
        worker = RecordingWorker()
        worker.figures = ReplicaLoad(running=1, kv_usage_ratio=0.1)
        async with ReplicaLinks(HOST, SECRET, stall_s=0.2) as links, engine_end(worker) as there:
            await there.connect(links.address)
            number, heard = begun(links, "replica-1")
            (task,) = there._links.values()
            task.result().send(TokenDelta(number, [1]))
            await until(lambda: heard.error is not None)
            assert heard.token_ids == [1]
            assert isinstance(heard.error, ReplicaLostError)

    async def test_an_engine_busy_for_others_only_keeps_its_connection(self) -> None:
        worker = RecordingWorker()
        worker.figures = ReplicaLoad(running=1, kv_usage_ratio=0.1)
        watcher = RecordingWatcher()
        async with ReplicaLinks(HOST, SECRET, stall_s=0.0) as links, engine_end(worker) as there:
            links.watch("replica-1", watcher)
            await there.connect(links.address)
            await until(lambda: len(watcher.heard) > 20)
            assert "replica-1 lost" not in watcher.heard

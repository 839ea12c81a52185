"""The gateway's end of the token channel, with fake replicas and with the real other end."""

import asyncio
import os
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.routing.conftest import (
    HOST,
    SECRET,
    FakeReplica,
    Heard,
    RecordingWatcher,
    RecordingWorker,
    until,
)

from tera import wire
from tera.engine.link import GatewayLinks
from tera.errors import (
    ContextLengthError,
    EngineError,
    InvalidRequestError,
    InvalidValueError,
    ReplicaLostError,
    TeraError,
)
from tera.generation import (
    Abort,
    Begin,
    FinishReason,
    Generation,
    GenerationFailure,
    ReplicaLoad,
    Sampling,
    StepFrame,
    TokenDelta,
    encode,
)
from tera.routing import link as link_module
from tera.routing.link import ReplicaLinks

OTHER = "the secret of another cluster"
ROOM = 8


def generation(links: ReplicaLinks) -> Generation:
    return Generation(links.new_generation_id(), "request", [1, 2, 3], Sampling(max_tokens=9))


def begun(links: ReplicaLinks, replica_id: str) -> tuple[int, Heard]:
    """Send a replica a generation; return its id and what is heard of it."""
    link = links.find(replica_id)
    assert link is not None
    asked, heard = generation(links), Heard()
    link.begin(asked, ROOM, heard)
    return asked.generation_id, heard


def last(generation_id: int, *token_ids: int) -> TokenDelta:
    return TokenDelta(generation_id, list(token_ids), FinishReason.STOP)


@asynccontextmanager
async def engine_end(worker: RecordingWorker) -> AsyncGenerator[GatewayLinks]:
    """Yield the real other end, of a replica called replica-1."""
    there = GatewayLinks("replica-1", SECRET, worker)
    try:
        yield there
    finally:
        await there.close()


async def test_a_replica_gets_the_order_and_the_listener_its_deltas(links: ReplicaLinks) -> None:
    replica = await FakeReplica.connect(links.address)
    link = links.find("replica")
    assert link is not None
    asked, heard = generation(links), Heard()
    link.begin(asked, ROOM, heard)
    assert await replica.begin() == Begin(asked, ROOM)
    deltas = [
        TokenDelta(asked.generation_id, []),  # «I have it»
        TokenDelta(asked.generation_id, [1, 2], cached_tokens=2),
        last(asked.generation_id, 3),
    ]
    for delta in deltas:
        await replica.send(delta)
    await until(lambda: heard.finish_reason is not None)
    assert heard.deltas == deltas
    assert not link.working
    await replica.close()


async def test_one_frame_reaches_all_generations_of_a_step(links: ReplicaLinks) -> None:
    replica = await FakeReplica.connect(links.address)
    running = [begun(links, "replica") for _ in range(50)]
    for step in range(4):
        await replica.send(*(TokenDelta(number, [number, step]) for number, _ in running))
    await until(lambda: all(len(heard.deltas) == 4 for _, heard in running))
    for number, heard in running:
        assert heard.token_ids == [number, 0, number, 1, number, 2, number, 3]
    await replica.close()


@settings(max_examples=25, deadline=None)
@given(st.data())
async def test_frames_may_be_cut_anywhere(data: st.DataObject) -> None:
    async with ReplicaLinks(HOST, SECRET) as links:
        deltas = [TokenDelta(1, [token_id]) for token_id in range(9)] + [last(1, 9)]
        frames = [encode(StepFrame(ReplicaLoad(), [delta])) for delta in deltas]
        stream = b"".join(map(wire.pack, frames))
        cuts = sorted(data.draw(st.sets(st.integers(1, len(stream) - 1), max_size=12)))
        # Hypothesis may end an example where it draws: connect only after that.
        replica = await FakeReplica.connect(links.address)
        number, heard = begun(links, "replica")
        assert number == 1
        for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
            await replica.write(stream[start:end])
            await asyncio.sleep(0)  # so that the pieces are read one by one
        await until(lambda: heard.finish_reason is not None)
        assert heard.token_ids == list(range(10))
        await replica.close()


async def test_everything_may_come_byte_by_byte(links: ReplicaLinks) -> None:
    async def dribble(stream: bytes) -> None:
        for position in range(len(stream)):
            writer.write(stream[position : position + 1])
            await asyncio.sleep(0)

    reader, writer = await asyncio.open_connection(*links.address)
    replica = FakeReplica("replica", reader, writer)
    nonce_g, nonce_r = await reader.readexactly(wire.NONCE_BYTES), wire.new_nonce()
    await dribble(FakeReplica.opening(nonce_g, nonce_r, "replica", SECRET))
    await replica.check_proof(nonce_g, nonce_r)
    number, heard = begun(links, "replica")
    await dribble(wire.pack(encode(StepFrame(ReplicaLoad(), [last(number, 1, 2, 3)]))))
    await until(lambda: heard.deltas == [last(number, 1, 2, 3)])
    await replica.close()


class TestEnds:
    """How a generation ends, and that it is heard of no more."""

    async def test_stopping_tells_the_replica_and_late_deltas_find_nobody(
        self, links: ReplicaLinks
    ) -> None:
        replica = await FakeReplica.connect(links.address)
        link = links.find("replica")
        assert link is not None
        given_up, heard = begun(links, "replica")
        other, other_heard = begun(links, "replica")
        assert [(await replica.begin()).generation.generation_id for _ in "ab"] == [given_up, other]
        link.end(given_up)
        assert await replica.abort() == given_up
        await replica.send(TokenDelta(given_up, [99]), TokenDelta(other, [1]), refused=[given_up])
        await until(lambda: other_heard.token_ids == [1])
        assert (heard.deltas, heard.error, heard.refused) == ([], None, False)
        await replica.close()

    @pytest.mark.parametrize("how", ["finished", "failed", "refused"])
    async def test_what_the_replica_has_ended_is_not_stopped_and_not_heard_of_again(
        self, links: ReplicaLinks, how: str
    ) -> None:
        replica = await FakeReplica.connect(links.address)
        link = links.find("replica")
        assert link is not None
        number, heard = begun(links, "replica")
        await replica.begin()
        if how == "finished":
            await replica.send(last(number, 1))
            await until(lambda: heard.finish_reason is not None)
        elif how == "failed":
            await replica.send(failures=[GenerationFailure(number, "The engine failed.")])
            await until(lambda: heard.error is not None)
        else:
            await replica.send(refused=[number])
            await until(lambda: heard.refused)
        link.end(number)
        other, other_heard = begun(links, "replica")
        assert (await replica.begin()).generation.generation_id == other  # with no Abort before
        count = len(heard.deltas)
        await replica.send(
            TokenDelta(number, [99]),
            TokenDelta(other, [1]),
            failures=[GenerationFailure(number, "The engine failed again.")],
        )
        await until(lambda: other_heard.token_ids == [1])
        assert len(heard.deltas) == count
        await replica.close()

    async def test_tokens_are_heard_before_the_failure_or_refusal_in_their_frame(
        self, links: ReplicaLinks
    ) -> None:
        class Ordered(Heard):
            def fail(self, error: TeraError) -> None:
                assert self.token_ids == [1]
                super().fail(error)

            def refuse(self) -> None:
                assert self.token_ids == [1]
                super().refuse()

        replica = await FakeReplica.connect(links.address)
        link = links.find("replica")
        assert link is not None
        failed, refused = Ordered(), Ordered()
        for number, heard in ((1, failed), (2, refused)):
            link.begin(Generation(number, "request", [1], Sampling(max_tokens=9)), ROOM, heard)
        await replica.send(
            TokenDelta(1, [1]),
            TokenDelta(2, [1]),
            failures=[GenerationFailure(1, "The engine failed.")],
            refused=[2],
        )
        await until(lambda: failed.error is not None and refused.refused)
        await replica.close()

    @pytest.mark.parametrize(
        ("failure", "expected"),
        [
            pytest.param(
                GenerationFailure(1, "The engine failed."),
                EngineError("The engine failed."),
                id="the engine's fault",
            ),
            pytest.param(
                GenerationFailure(1, "Too long.", "context_length_exceeded", "prompt"),
                ContextLengthError("Too long.", param="prompt"),
                id="the request's fault",
            ),
            pytest.param(
                GenerationFailure(1, "Out of range.", "invalid_value", "top_p"),
                InvalidValueError("Out of range.", param="top_p"),
                id="a value's fault",
            ),
            pytest.param(
                GenerationFailure(1, "Odd.", "a code of a newer version"),
                InvalidRequestError("Odd."),
                id="a fault that is not known here",
            ),
        ],
    )
    async def test_a_failure_arrives_as_the_error_that_it_was(
        self, links: ReplicaLinks, failure: GenerationFailure, expected: TeraError
    ) -> None:
        replica = await FakeReplica.connect(links.address)
        number, heard = begun(links, "replica")
        assert number == failure.generation_id
        await replica.send(failures=[failure])
        await until(lambda: heard.error is not None)
        assert heard.error is not None
        assert type(heard.error) is type(expected)
        assert (heard.error.message, heard.error.param) == (expected.message, expected.param)
        await replica.close()

    async def test_a_request_that_no_order_holds_fails_alone(self, links: ReplicaLinks) -> None:
        replica = await FakeReplica.connect(links.address)
        number, heard = begun(links, "replica")
        link = links.find("replica")
        assert link is not None
        refused, huge = Heard(), "r" * wire.MAX_ORDER_BYTES
        link.begin(Generation(0, huge, [1], Sampling(max_tokens=9)), ROOM, refused)
        assert isinstance(refused.error, InvalidRequestError)
        await replica.begin()
        await replica.send(last(number, 1))
        await until(lambda: heard.token_ids == [1])
        await replica.close()

    async def test_each_attempt_has_an_id_of_its_own(self, links: ReplicaLinks) -> None:
        assert len({links.new_generation_id() for _ in range(1000)}) == 1000


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no connection end because its handshake takes long."""
    monkeypatch.setattr(link_module, "HANDSHAKE_TIMEOUT_S", 60)


@pytest.mark.usefixtures("patient")
class TestSecret:
    def test_gateway_without_a_secret_does_not_start(self) -> None:
        with pytest.raises(ValueError, match="secret"):
            ReplicaLinks(HOST, "")

    async def test_replica_with_another_secret_is_refused(self, links: ReplicaLinks) -> None:
        with pytest.raises(ReplicaLostError):
            await FakeReplica.connect(links.address, secret=OTHER)
        await until(lambda: not links.all)
        assert links.find("replica") is None

    async def test_nothing_that_a_refused_replica_says_is_read(self, links: ReplicaLinks) -> None:
        watcher = RecordingWatcher()
        links.watch("replica", watcher)
        replica = await FakeReplica.connect(links.address)
        number, heard = begun(links, "replica")
        await until(lambda: watcher.heard == ["replica connected"])
        reader, writer = await asyncio.open_connection(*links.address)
        nonce_g = await reader.readexactly(wire.NONCE_BYTES)
        frame = StepFrame(ReplicaLoad(running=9), [last(number, 666)])
        writer.write(FakeReplica.opening(nonce_g, wire.new_nonce(), "replica", OTHER))
        writer.write(wire.pack(encode(frame)))
        await FakeReplica("replica", reader, writer).closed()
        assert heard.deltas == []
        assert watcher.heard == ["replica connected"]
        await replica.close()

    async def test_an_opening_works_once(self, links: ReplicaLinks) -> None:
        nonce_r = wire.new_nonce()
        openings = []
        for _ in range(2):
            reader, writer = await asyncio.open_connection(*links.address)
            nonce_g = await reader.readexactly(wire.NONCE_BYTES)
            openings.append(FakeReplica.opening(nonce_g, nonce_r, "replica", SECRET))
            writer.write(openings[0])  # the second time, what was heard the first time
            if len(openings) == 1:
                await reader.readexactly(wire.MAC_BYTES)
                writer.close()
                await writer.wait_closed()
            else:
                await FakeReplica("replica", reader, writer).closed()

    @pytest.mark.parametrize("length", [wire.MAX_NAME_BYTES + 1, wire.MAX_FRAME_BYTES, 0xFFFFFFFF])
    async def test_a_name_that_is_too_long_is_refused_before_it_comes(
        self, links: ReplicaLinks, length: int
    ) -> None:
        reader, writer = await asyncio.open_connection(*links.address)
        await reader.readexactly(wire.NONCE_BYTES)
        writer.write(bytes(wire.NONCE_BYTES + wire.MAC_BYTES) + length.to_bytes(4, "little"))
        await FakeReplica("stranger", reader, writer).closed()

    async def test_the_longest_name_is_a_name(self, links: ReplicaLinks) -> None:
        name = "r" * wire.MAX_NAME_BYTES
        replica = await FakeReplica.connect(links.address, name)
        assert links.find(name) is not None
        await replica.close()

    async def test_a_replica_needs_a_name(self, links: ReplicaLinks) -> None:
        with pytest.raises(ReplicaLostError):
            await FakeReplica.connect(links.address, "")

    async def test_whoever_goes_on_before_the_gateway_has_proved_itself_is_refused(
        self, links: ReplicaLinks
    ) -> None:
        reader, writer = await asyncio.open_connection(*links.address)
        nonce_g = await reader.readexactly(wire.NONCE_BYTES)
        opening = FakeReplica.opening(nonce_g, wire.new_nonce(), "replica", SECRET)
        writer.write(opening + wire.pack(encode(StepFrame(ReplicaLoad()))))
        assert await reader.read() == b""
        assert links.find("replica") is None
        await FakeReplica("replica", reader, writer).close()


@pytest.mark.usefixtures("patient")
class TestGarbage:
    @pytest.mark.parametrize(
        "garbage",
        [
            pytest.param(b"GET / HTTP/1.1\r\nHost: gateway\r\n\r\n" + b"x" * 200, id="HTTP"),
            pytest.param(b"\xff" * 200, id="length over the limit"),
            pytest.param(bytes(200), id="zeros"),
        ],
    )
    async def test_stranger_is_hung_up_on(self, links: ReplicaLinks, garbage: bytes) -> None:
        replica = await FakeReplica.connect(links.address)
        number, heard = begun(links, "replica")
        reader, writer = await asyncio.open_connection(*links.address)
        writer.write(garbage)
        await FakeReplica("stranger", reader, writer).closed()
        await replica.send(last(number, 1))
        await until(lambda: heard.token_ids == [1])
        await replica.close()

    @pytest.mark.parametrize(
        "garbage",
        [
            pytest.param(b"\xff\xff\xff\xff", id="length over the limit"),
            pytest.param(wire.pack(b"\xc1"), id="no MessagePack"),
            pytest.param(wire.pack(encode(TokenDelta(1, [2]))), id="another record"),
            pytest.param(wire.pack(encode(Abort(1))), id="an order"),
            pytest.param(wire.pack(b""), id="empty"),
        ],
    )
    async def test_broken_replica_loses_its_own_generations_only(
        self, links: ReplicaLinks, garbage: bytes
    ) -> None:
        broken = await FakeReplica.connect(links.address, "broken")
        sound = await FakeReplica.connect(links.address, "sound")
        lost, lost_heard = begun(links, "broken")
        number, heard = begun(links, "sound")
        await broken.send(TokenDelta(lost, [1]))
        await sound.send(TokenDelta(number, [2]))
        await broken.write(garbage)
        await broken.closed()
        await until(lambda: lost_heard.error is not None)
        assert isinstance(lost_heard.error, ReplicaLostError)
        assert lost_heard.token_ids == [1]
        await sound.send(last(number, 3))
        await until(lambda: heard.finish_reason is not None)
        assert heard.token_ids == [2, 3]
        await sound.close()

    async def test_random_bytes_harm_nobody(self, links: ReplicaLinks) -> None:
        replica = await FakeReplica.connect(links.address)
        number, heard = begun(links, "replica")
        for size in (1, 31, 32, 64, 68, 69, 500, 5000):
            _, writer = await asyncio.open_connection(*links.address)
            writer.write(os.urandom(size))
            writer.close()
        await replica.send(last(number, 1))
        await until(lambda: heard.token_ids == [1])
        await replica.close()

    async def test_silent_stranger_is_hung_up_on(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(link_module, "HANDSHAKE_TIMEOUT_S", 0.01)
        async with ReplicaLinks(HOST, SECRET) as links:
            reader, writer = await asyncio.open_connection(*links.address)
            await FakeReplica("silent", reader, writer).closed()
            await until(lambda: not links.all)


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

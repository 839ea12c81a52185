import asyncio
import os
import socket
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.routing.conftest import HOST, SECRET, FakeReplica, until

from tera import wire
from tera.engine import channel as engine_channel
from tera.engine.channel import GatewayLink, TokenSender
from tera.errors import EngineError, ReplicaLostError
from tera.generation import FinishReason, ReplicaLoad, StepFrame, TokenDelta, decode_frame, encode
from tera.routing import channel as routing_channel
from tera.routing.channel import Inbox, TokenReceiver

OTHER = "the secret of another cluster"


class RecordingReceiver(TokenReceiver):
    """Keeps the frames as they came, those that are heartbeats apart."""

    def __init__(self) -> None:
        super().__init__(HOST, SECRET)
        self.frames: list[StepFrame] = []
        self.heartbeats: list[StepFrame] = []

    def deliver(self, replica_id: str, frame: StepFrame) -> None:
        (self.frames if frame.deltas else self.heartbeats).append(frame)
        super().deliver(replica_id, frame)


class RecordingWatcher:
    """Keeps what it hears of replicas."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def report(self, replica_id: str, load: ReplicaLoad) -> None:
        self.heard.append(f"{replica_id} has {load.running + load.waiting}")

    def trust(self, replica_id: str) -> None:
        self.heard.append(f"trust {replica_id}")

    def suspect(self, replica_id: str) -> None:
        self.heard.append(f"suspect {replica_id}")


@asynccontextmanager
async def sender(
    secret: str = SECRET, load: Callable[[], ReplicaLoad] = ReplicaLoad
) -> AsyncGenerator[TokenSender]:
    sender = TokenSender("replica-1", secret, load)
    try:
        yield sender
    finally:
        await sender.close()


async def tokens(inbox: Inbox) -> list[int]:
    """Return all token ids until the finish reason."""
    found: list[int] = []
    while True:
        delta = await inbox.get()
        found += delta.token_ids
        if delta.finish_reason is not None:
            return found


async def test_deltas_arrive_in_order_with_replica_and_load(receiver: TokenReceiver) -> None:
    inbox = receiver.open()
    load = ReplicaLoad(running=3, waiting=2, kv_usage_ratio=0.5)
    async with sender(load=lambda: load) as there:
        link = await there.link(receiver.address)
        for token_id in range(100):
            finish = FinishReason.STOP if token_id == 99 else None
            link.send(TokenDelta(inbox.generation_id, [token_id], finish))
            if token_id % 3 == 0:
                await asyncio.sleep(0)
        assert await tokens(inbox) == list(range(100))
        assert inbox.finished
        assert inbox.replica_id == "replica-1"
        assert receiver.loads == {"replica-1": load}


async def test_who_asks_hears_of_the_taking_at_once_and_once(receiver: TokenReceiver) -> None:
    inbox = receiver.open()
    heard: list[str | None] = []
    inbox.on_taken = lambda: heard.append(inbox.replica_id)
    taken = StepFrame(ReplicaLoad(), [TokenDelta(inbox.generation_id, [])])
    receiver.deliver("replica-1", taken)
    assert heard == ["replica-1"]  # and nothing has run in between
    receiver.deliver("replica-1", taken)
    assert heard == ["replica-1"]
    inbox.close()


async def test_one_frame_for_all_generations_of_a_step() -> None:
    async with RecordingReceiver() as receiver, sender() as there:
        inboxes = [receiver.open() for _ in range(50)]
        link = await there.link(receiver.address)
        for step in range(4):
            finish = FinishReason.LENGTH if step == 3 else None
            for inbox in inboxes:
                link.send(TokenDelta(inbox.generation_id, [step], finish))
            await until(lambda step=step: len(receiver.frames) > step)  # type: ignore[misc]
        for inbox in inboxes:
            assert await tokens(inbox) == [0, 1, 2, 3]
        assert [len(frame.deltas) for frame in receiver.frames] == [50] * 4


async def test_deltas_of_one_generation_in_one_step_are_merged_whole() -> None:
    async with RecordingReceiver() as receiver, sender() as there:
        inbox = receiver.open()
        link = await there.link(receiver.address)
        link.send(TokenDelta(inbox.generation_id, []))
        link.send(TokenDelta(inbox.generation_id, [1, 2], None, 16))
        link.send(TokenDelta(inbox.generation_id, [3], FinishReason.STOP, 16))
        delta = await inbox.get()
        assert delta == TokenDelta(inbox.generation_id, [1, 2, 3], FinishReason.STOP, 16)


@settings(max_examples=25, deadline=None)
@given(st.data())
async def test_frames_may_be_cut_anywhere(data: st.DataObject) -> None:
    async with TokenReceiver(HOST, SECRET) as receiver:
        inbox = receiver.open()
        deltas = [
            TokenDelta(
                inbox.generation_id, [token_id], FinishReason.STOP if token_id == 9 else None
            )
            for token_id in range(10)
        ]
        frames = [encode(StepFrame(ReplicaLoad(), [delta])) for delta in deltas]
        stream = b"".join(map(wire.pack, frames))
        cuts = sorted(data.draw(st.sets(st.integers(1, len(stream) - 1), max_size=12)))
        # Hypothesis may end an example where it draws: connect only after that.
        replica = await FakeReplica.connect(receiver.address)
        for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
            await replica.write(stream[start:end])
            await asyncio.sleep(0)  # so that the pieces are read one by one
        assert await tokens(inbox) == list(range(10))
        await replica.close()


async def test_everything_may_come_byte_by_byte(receiver: TokenReceiver) -> None:
    inbox = receiver.open()
    reader, writer = await asyncio.open_connection(*receiver.address)
    nonce_g = await reader.readexactly(wire.NONCE_BYTES)
    delta = TokenDelta(inbox.generation_id, [1, 2, 3], FinishReason.STOP)
    stream = FakeReplica.opening(nonce_g, wire.new_nonce(), "replica", SECRET)
    stream += wire.pack(encode(StepFrame(ReplicaLoad(), [delta])))
    for position in range(len(stream)):
        writer.write(stream[position : position + 1])
        await asyncio.sleep(0)
    assert await inbox.get() == delta
    writer.close()
    await writer.wait_closed()


class TestSecret:
    def test_gateway_without_a_secret_does_not_start(self) -> None:
        with pytest.raises(ValueError, match="secret"):
            TokenReceiver(HOST, "")

    async def test_replica_with_another_secret_is_refused(self, receiver: TokenReceiver) -> None:
        async with sender(OTHER) as there:
            with pytest.raises(ReplicaLostError):
                await there.link(receiver.address)
        await until(lambda: not receiver.links)
        assert receiver.loads == {}

    async def test_no_delta_of_a_refused_replica_is_delivered(
        self, receiver: TokenReceiver
    ) -> None:
        inbox = receiver.open()
        reader, writer = await asyncio.open_connection(*receiver.address)
        nonce_g = await reader.readexactly(wire.NONCE_BYTES)
        delta = TokenDelta(inbox.generation_id, [666], FinishReason.STOP)
        writer.write(FakeReplica.opening(nonce_g, wire.new_nonce(), "replica", OTHER))
        writer.write(wire.pack(encode(StepFrame(ReplicaLoad(), [delta]))))
        await FakeReplica("replica", reader, writer).closed()
        assert not inbox.finished
        assert receiver.loads == {}

    async def test_an_opening_works_once(self, receiver: TokenReceiver) -> None:
        nonce_r = wire.new_nonce()
        openings = []
        for _ in range(2):
            reader, writer = await asyncio.open_connection(*receiver.address)
            nonce_g = await reader.readexactly(wire.NONCE_BYTES)
            openings.append(FakeReplica.opening(nonce_g, nonce_r, "replica", SECRET))
            writer.write(openings[0])  # the second time, what was heard the first time
            if len(openings) == 1:
                await reader.readexactly(wire.MAC_BYTES)
                writer.close()
                await writer.wait_closed()
            else:
                await FakeReplica("replica", reader, writer).closed()

    async def test_gateway_with_another_secret_gets_no_tokens(self) -> None:
        heard = bytearray()

        async def impostor(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonce_g = wire.new_nonce()
            writer.write(nonce_g)
            nonce_r = await reader.readexactly(wire.NONCE_BYTES)
            writer.write(wire.gateway_proof(OTHER, nonce_r, nonce_g))
            heard.extend(await reader.read())
            writer.close()

        server = await asyncio.start_server(impostor, HOST, 0)
        async with server, sender() as there:
            with pytest.raises(ReplicaLostError):
                await there.link(server.sockets[0].getsockname())
        assert len(heard) <= wire.MAC_BYTES + wire.LENGTH_BYTES + len("replica-1")


class TestGarbage:
    @pytest.mark.parametrize(
        "garbage",
        [
            pytest.param(b"GET / HTTP/1.1\r\nHost: gateway\r\n\r\n" + b"x" * 200, id="HTTP"),
            pytest.param(b"\xff" * 200, id="length over the limit"),
            pytest.param(bytes(200), id="zeros"),
        ],
    )
    async def test_stranger_is_hung_up_on(self, receiver: TokenReceiver, garbage: bytes) -> None:
        inbox = receiver.open()
        replica = await FakeReplica.connect(receiver.address)
        reader, writer = await asyncio.open_connection(*receiver.address)
        writer.write(garbage)
        await FakeReplica("stranger", reader, writer).closed()
        await replica.send(TokenDelta(inbox.generation_id, [1], FinishReason.STOP))
        assert await tokens(inbox) == [1]
        await replica.close()

    @pytest.mark.parametrize(
        "garbage",
        [
            pytest.param(b"\xff\xff\xff\xff", id="length over the limit"),
            pytest.param(wire.pack(b"\xc1"), id="no MessagePack"),
            pytest.param(wire.pack(encode(TokenDelta(1, [2]))), id="another record"),
            pytest.param(wire.pack(b""), id="empty"),
        ],
    )
    async def test_broken_replica_loses_its_own_generations_only(
        self, receiver: TokenReceiver, garbage: bytes
    ) -> None:
        broken_inbox, inbox = receiver.open(), receiver.open()
        broken = await FakeReplica.connect(receiver.address, "broken")
        replica = await FakeReplica.connect(receiver.address, "sound")
        await broken.send(TokenDelta(broken_inbox.generation_id, [1]))
        await replica.send(TokenDelta(inbox.generation_id, [2]))
        await broken.write(garbage)
        await broken.closed()
        assert (await broken_inbox.get()).token_ids == [1]
        with pytest.raises(ReplicaLostError):
            await broken_inbox.get()
        await replica.send(TokenDelta(inbox.generation_id, [3], FinishReason.STOP))
        assert await tokens(inbox) == [2, 3]
        await replica.close()

    async def test_random_bytes_harm_nobody(self, receiver: TokenReceiver) -> None:
        inbox = receiver.open()
        replica = await FakeReplica.connect(receiver.address)
        for size in (1, 31, 32, 64, 68, 69, 500, 5000):
            _, writer = await asyncio.open_connection(*receiver.address)
            writer.write(os.urandom(size))
            writer.close()
        await replica.send(TokenDelta(inbox.generation_id, [1], FinishReason.STOP))
        assert await tokens(inbox) == [1]
        await replica.close()

    async def test_silent_stranger_is_hung_up_on(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(routing_channel, "HANDSHAKE_TIMEOUT_S", 0.01)
        async with TokenReceiver(HOST, SECRET) as receiver:
            reader, writer = await asyncio.open_connection(*receiver.address)
            await FakeReplica("silent", reader, writer).closed()
            await until(lambda: not receiver.links)

    async def test_silent_gateway_is_given_up(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(engine_channel, "HANDSHAKE_TIMEOUT_S", 0.01)
        connections: list[asyncio.StreamWriter] = []

        async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            connections.append(writer)

        server = await asyncio.start_server(silent, HOST, 0)
        async with server, sender() as there:
            with pytest.raises(ReplicaLostError):
                await there.link(server.sockets[0].getsockname())
        for writer in connections:
            writer.close()


class TestSlowGateway:
    @asynccontextmanager
    async def paused(
        self,
    ) -> AsyncGenerator[tuple[GatewayLink, asyncio.Transport, asyncio.StreamReader]]:
        """Yield a link, its transport, and the reader of a gateway that does not read yet."""
        accepted: asyncio.Future[asyncio.StreamReader] = asyncio.Future()
        writers: list[asyncio.StreamWriter] = []

        async def gateway(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writers.append(writer)
            nonce_g = wire.new_nonce()
            writer.write(nonce_g)
            nonce_r = await reader.readexactly(wire.NONCE_BYTES)
            opening = wire.MAC_BYTES + wire.LENGTH_BYTES + len("replica-1")
            await reader.readexactly(opening)
            writer.write(wire.gateway_proof(SECRET, nonce_r, nonce_g))
            accepted.set_result(reader)

        listening = socket.socket()
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        listening.bind((HOST, 0))
        server = await asyncio.start_server(gateway, sock=listening, limit=1024)
        connecting = socket.socket()
        # Small, so that the test need not fill megabytes of the kernel's.
        connecting.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        connecting.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(connecting, listening.getsockname())
        async with server:
            transport, link = await loop.create_connection(
                lambda: GatewayLink("replica-1", SECRET, ReplicaLoad), sock=connecting
            )
            await link.ready
            try:
                yield link, transport, await accepted
            finally:
                transport.abort()
                for writer in writers:
                    writer.close()

    async def test_deltas_are_merged_and_no_token_is_lost(self) -> None:
        steps, generations, width = 1000, 4, 50
        async with self.paused() as (link, transport, reader):
            highest_bytes = 0
            for step in range(steps):
                for generation_id in range(generations):
                    token_ids = list(range(step * width, (step + 1) * width))
                    finish = FinishReason.LENGTH if step == steps - 1 else None
                    link.send(TokenDelta(generation_id, token_ids, finish))
                await asyncio.sleep(0)
                highest_bytes = max(highest_bytes, transport.get_write_buffer_size())
            # The mark at which transports ask for a pause, and the frame that went over it.
            assert highest_bytes < 2 * 64 * 1024
            buffer = bytearray()
            received: dict[int, list[int]] = {each: [] for each in range(generations)}
            finished: set[int] = set()
            frames = 0
            while len(finished) < generations:
                buffer += await reader.read(65536)
                for payload in list(wire.take_frames(buffer)):
                    frames += 1
                    for delta in decode_frame(payload).deltas:
                        assert delta.generation_id not in finished
                        received[delta.generation_id] += delta.token_ids
                        if delta.finish_reason is not None:
                            finished.add(delta.generation_id)
            assert received == {key: list(range(steps * width)) for key in range(generations)}
            assert frames < steps / 2

    async def test_slow_gateway_that_leaves_is_told_to_who_sends(self) -> None:
        async with self.paused() as (link, transport, _):
            for _ in range(500):
                link.send(TokenDelta(1, [7] * 500))
                await asyncio.sleep(0)
            transport.abort()
            await until(lambda: link.closed)
            with pytest.raises(ReplicaLostError):
                link.send(TokenDelta(1, [7]))


class TestLoss:
    async def test_broken_connection_fails_exactly_the_generations_of_that_replica(
        self, receiver: TokenReceiver
    ) -> None:
        lost_inboxes = [receiver.open() for _ in range(3)]
        other_inbox, untaken_inbox = receiver.open(), receiver.open()
        lost = await FakeReplica.connect(receiver.address, "lost")
        other = await FakeReplica.connect(receiver.address, "other")
        await lost.send(*(TokenDelta(each.generation_id, [1]) for each in lost_inboxes))
        await other.send(TokenDelta(other_inbox.generation_id, [2]))
        await until(lambda: receiver.loads.keys() == {"lost", "other"})
        waiting = [asyncio.create_task(tokens(each)) for each in lost_inboxes]
        untaken = asyncio.create_task(tokens(untaken_inbox))
        await lost.lose()
        results = await asyncio.gather(*waiting, return_exceptions=True)
        assert [type(each) for each in results] == [ReplicaLostError] * 3
        assert receiver.loads.keys() == {"other"}
        for inbox, token_id in ((other_inbox, 3), (untaken_inbox, 4)):
            await other.send(TokenDelta(inbox.generation_id, [token_id], FinishReason.STOP))
        assert await tokens(other_inbox) == [2, 3]
        assert await untaken == [4]
        await other.close()

    async def test_deltas_before_the_loss_are_read_first(self, receiver: TokenReceiver) -> None:
        inbox = receiver.open()
        replica = await FakeReplica.connect(receiver.address)
        await replica.send(TokenDelta(inbox.generation_id, [1]))
        await replica.send(TokenDelta(inbox.generation_id, [2]))
        await replica.close()
        await until(lambda: not receiver.links)
        assert (await inbox.get()).token_ids == [1]
        assert (await inbox.get()).token_ids == [2]
        with pytest.raises(ReplicaLostError):
            await inbox.get()

    async def test_first_error_of_an_inbox_stays(self, receiver: TokenReceiver) -> None:
        inbox = receiver.open()
        inbox.fail(EngineError("first"))
        inbox.fail(EngineError("second"))
        with pytest.raises(EngineError, match="first"):
            await inbox.get()

    async def test_deltas_of_a_forgotten_attempt_are_dropped(self, receiver: TokenReceiver) -> None:
        forgotten, inbox = receiver.open(), receiver.open()
        replica = await FakeReplica.connect(receiver.address)
        forgotten.close()
        await replica.send(
            TokenDelta(forgotten.generation_id, [1], FinishReason.STOP),
            TokenDelta(inbox.generation_id, [2], FinishReason.STOP),
        )
        assert await tokens(inbox) == [2]
        assert not forgotten.finished
        assert receiver.open().generation_id not in (forgotten.generation_id, inbox.generation_id)
        await replica.close()

    async def test_replica_makes_a_new_link_after_a_loss(self) -> None:
        async with RecordingReceiver() as receiver, sender() as there:
            first = await there.link(receiver.address)
            for link in list(receiver.links):
                link.abort()
            await until(lambda: first.closed)
            with pytest.raises(ReplicaLostError):
                first.send(TokenDelta(1, [1]))
            inbox = receiver.open()
            second = await there.link(receiver.address)
            second.send(TokenDelta(inbox.generation_id, [5], FinishReason.STOP))
            assert await tokens(inbox) == [5]

    async def test_gateway_that_is_not_there_is_lost(self) -> None:
        with socket.socket() as probe:
            probe.bind((HOST, 0))
            address = probe.getsockname()
        async with sender() as there:
            for _ in range(2):
                with pytest.raises(ReplicaLostError):
                    await there.link(address)

    async def test_closing_the_receiver_closes_its_connections(self) -> None:
        async with TokenReceiver(HOST, SECRET) as receiver:
            replica = await FakeReplica.connect(receiver.address)
        await replica.closed()


class TestSharing:
    async def test_all_askers_share_one_connection(self, receiver: TokenReceiver) -> None:
        async with sender() as there:
            links = await asyncio.gather(*(there.link(receiver.address) for _ in range(20)))
            assert len({id(link) for link in links}) == 1
            assert len(receiver.links) == 1

    async def test_asker_that_gives_up_takes_nobody_with_it(self, receiver: TokenReceiver) -> None:
        async with sender() as there:
            asking = [asyncio.create_task(there.link(receiver.address)) for _ in range(2)]
            await asyncio.sleep(0)
            asking[0].cancel()
            link = await asking[1]
            assert not link.closed
            assert await there.link(receiver.address) is link

    async def test_each_gateway_gets_its_own_tokens(self) -> None:
        async with (
            TokenReceiver(HOST, SECRET) as one,
            TokenReceiver(HOST, SECRET) as two,
            sender() as there,
        ):
            inboxes = [one.open(), two.open()]
            assert inboxes[0].generation_id == inboxes[1].generation_id
            for gateway, inbox, token_id in zip((one, two), inboxes, (1, 2), strict=True):
                link = await there.link(gateway.address)
                link.send(TokenDelta(inbox.generation_id, [token_id], FinishReason.STOP))
            assert [await tokens(inbox) for inbox in inboxes] == [[1], [2]]

    async def test_closing_the_sender_sends_what_is_pending(self, receiver: TokenReceiver) -> None:
        inbox = receiver.open()
        async with sender() as there:
            link = await there.link(receiver.address)
            link.send(TokenDelta(inbox.generation_id, [1], FinishReason.STOP))
        assert await tokens(inbox) == [1]


class TestHeartbeats:
    @pytest.fixture(autouse=True)
    def quick(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(wire, "HEARTBEAT_S", 0.01)
        monkeypatch.setattr(wire, "SILENCE_S", 0.3)
        monkeypatch.setattr(routing_channel, "CHECK_S", 0.02)

    async def test_an_idle_replica_is_heard_and_its_load_is_fresh(self) -> None:
        load = ReplicaLoad()
        async with RecordingReceiver() as receiver, sender(load=lambda: load) as there:
            await there.link(receiver.address)
            await until(lambda: len(receiver.heartbeats) > 2)
            load = ReplicaLoad(running=5)
            await until(lambda: receiver.loads == {"replica-1": load})

    async def test_the_first_heartbeat_comes_before_any_token(self) -> None:
        async with RecordingReceiver() as receiver, sender() as there:
            link = await there.link(receiver.address)
            inbox = receiver.open()
            link.send(TokenDelta(inbox.generation_id, [1], FinishReason.STOP))
            await tokens(inbox)
            assert receiver.heartbeats

    async def test_no_heartbeat_while_tokens_flow(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(wire, "HEARTBEAT_S", 60)
        async with RecordingReceiver() as receiver, sender() as there:
            link = await there.link(receiver.address)
            inbox = receiver.open()
            for token_id in range(20):
                finish = FinishReason.STOP if token_id == 19 else None
                link.send(TokenDelta(inbox.generation_id, [token_id], finish))
                await asyncio.sleep(0)
            await tokens(inbox)
            assert len(receiver.heartbeats) == 1

    async def test_a_closed_link_beats_no_more(self, receiver: TokenReceiver) -> None:
        async with sender() as there:
            link = await there.link(receiver.address)
        await until(lambda: link.closed)
        assert link._heartbeat is not None
        assert link._heartbeat.cancelled()

    async def test_a_replica_that_falls_silent_loses_exactly_its_generations(
        self, receiver: TokenReceiver
    ) -> None:
        lost_inbox, inbox = receiver.open(), receiver.open()
        frozen = await FakeReplica.connect(receiver.address, "frozen")
        await frozen.beat()
        await frozen.send(TokenDelta(lost_inbox.generation_id, [1]))
        async with sender() as there:
            link = await there.link(receiver.address)
            link.send(TokenDelta(inbox.generation_id, [2]))
            assert (await lost_inbox.get()).token_ids == [1]
            with pytest.raises(ReplicaLostError):
                await lost_inbox.get()
            assert receiver.loads.keys() == {"replica-1"}
            link.send(TokenDelta(inbox.generation_id, [3], FinishReason.STOP))
            assert await tokens(inbox) == [2, 3]
        await frozen.closed()

    async def test_a_replica_that_thaws_is_hung_up_on_and_may_come_back(
        self, receiver: TokenReceiver
    ) -> None:
        watcher = RecordingWatcher()
        receiver.watch("frozen", watcher)
        lost_inbox = receiver.open()
        frozen = await FakeReplica.connect(receiver.address, "frozen")
        await frozen.beat()
        await frozen.send(TokenDelta(lost_inbox.generation_id, [1]))
        await until(lambda: watcher.heard[-1:] == ["suspect frozen"])
        await until(lambda: not receiver.links)
        await frozen.closed()
        thawed = await FakeReplica.connect(receiver.address, "frozen")
        assert watcher.heard == ["trust frozen", "frozen has 0", "suspect frozen", "trust frozen"]
        lost_inbox.close()
        inbox = receiver.open()
        await thawed.send(
            TokenDelta(lost_inbox.generation_id, [99], FinishReason.STOP),
            TokenDelta(inbox.generation_id, [2], FinishReason.STOP),
        )
        assert await tokens(inbox) == [2]
        assert not lost_inbox.finished
        await thawed.close()

    async def test_a_gateway_that_was_kept_blames_no_replica(self) -> None:
        async with RecordingReceiver() as receiver, sender() as there:
            link = await there.link(receiver.address)
            await until(lambda: bool(receiver.heartbeats))
            time.sleep(2 * wire.SILENCE_S)  # noqa: ASYNC251  both ends' loop is what is kept
            heard = len(receiver.heartbeats)
            await until(lambda: len(receiver.heartbeats) > heard + 5)
            assert not link.closed

    async def test_an_engine_that_makes_no_step_loses_its_generations_though_it_beats(
        self,
    ) -> None:
        stuck = ReplicaLoad(running=1, kv_usage_ratio=0.1)
        async with (
            TokenReceiver(HOST, SECRET, stall_s=0.2) as receiver,
            sender(load=lambda: stuck) as there,
        ):
            inbox = receiver.open()
            link = await there.link(receiver.address)
            link.send(TokenDelta(inbox.generation_id, [1]))
            assert (await inbox.get()).token_ids == [1]
            with pytest.raises(ReplicaLostError):
                await inbox.get()

    async def test_an_engine_busy_for_others_only_keeps_its_connection(self) -> None:
        stuck = ReplicaLoad(running=1, kv_usage_ratio=0.1)
        async with RecordingReceiver() as receiver, sender(load=lambda: stuck) as there:
            receiver.stall_s = 0.0
            link = await there.link(receiver.address)
            await until(lambda: len(receiver.heartbeats) > 5)
            assert not link.closed

    async def test_a_call_that_a_silent_replica_was_to_take_is_made_again_and_no_other(
        self, receiver: TokenReceiver
    ) -> None:
        untaken, elsewhere = receiver.open(), receiver.open()
        untaken.offered_to, elsewhere.offered_to = "frozen", "another"
        frozen = await FakeReplica.connect(receiver.address, "frozen")
        await frozen.beat()
        with pytest.raises(ReplicaLostError):
            await untaken.get()
        assert untaken.replica_id is None
        assert not elsewhere.next_is_here
        await frozen.closed()


async def test_a_watcher_hears_of_its_replicas_load_when_it_changes_and_by_heartbeats(
    receiver: TokenReceiver,
) -> None:
    watcher = RecordingWatcher()
    receiver.watch("replica", watcher)
    busy, idle = ReplicaLoad(running=2, waiting=1), ReplicaLoad()
    replica = await FakeReplica.connect(receiver.address)
    other = await FakeReplica.connect(receiver.address, "other")
    for load in (busy, idle, idle, busy):
        await replica.beat(load)
        await other.beat(load)
    await until(lambda: len(watcher.heard) == 5)
    heard = ["replica has 3", "replica has 0", "replica has 0", "replica has 3"]
    assert watcher.heard[1:] == heard
    for load in (busy, idle):
        token = TokenDelta(0, [1])
        receiver.deliver("replica", StepFrame(load, [token]))
        receiver.deliver("replica", StepFrame(load, [token]))
    assert watcher.heard[1:] == [*heard, "replica has 0"]
    receiver.watch("replica", None)
    await replica.beat(idle)
    await replica.lose()
    await until(lambda: receiver.loads.keys() == {"other"})
    assert len(watcher.heard) == 6
    await other.close()

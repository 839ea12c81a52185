"""The replica's end of the token channel, with fake gateways."""

import asyncio

import pytest
from tests.engine.gateways import NAME, Connection, FakeGateway, connect
from tests.routing.conftest import HOST, SECRET, RecordingWorker, until

from tera import wire
from tera.engine import link as link_module
from tera.engine.link import GatewayLinks
from tera.errors import ReplicaLostError
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
    TokenLogprobs,
    decode_frame,
    encode,
)

OTHER = "the secret of another cluster"
OPENING_BYTES = wire.NONCE_BYTES + wire.MAC_BYTES + wire.LENGTH_BYTES + len(NAME)
BEGIN = Begin(Generation(7, "request", [1, 2, 3], Sampling(max_tokens=9)), 8)


@pytest.fixture
def no_heartbeats(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no frame but the first be a heartbeat."""
    monkeypatch.setattr(wire, "HEARTBEAT_S", 60)


class TestFrames:
    @pytest.fixture(autouse=True)
    def _no_heartbeats(self, no_heartbeats: None) -> None:
        pass

    async def test_the_first_frame_is_a_heartbeat(
        self, links: GatewayLinks, gateway: FakeGateway, worker: RecordingWorker
    ) -> None:
        worker.figures = ReplicaLoad(running=3, waiting=2, kv_usage_ratio=0.5)
        link, there = await connect(links, gateway)
        link.send(TokenDelta(1, [7]))
        assert await there.frame() == StepFrame(worker.figures)
        assert await there.frame() == StepFrame(worker.figures, [TokenDelta(1, [7])])

    async def test_one_frame_for_all_that_one_step_makes(
        self, links: GatewayLinks, gateway: FakeGateway
    ) -> None:
        link, there = await connect(links, gateway)
        await there.frame()
        for step in range(4):
            for number in range(50):
                link.send(TokenDelta(number, [step]))
            frame = await there.frame()
            assert frame.deltas == [TokenDelta(number, [step]) for number in range(50)]
        failure = GenerationFailure(0, "The engine failed.")
        link.send(TokenDelta(0, [5]))
        link.fail(failure)
        link.send(TokenDelta(1, [6]))
        link.refuse(1, 2)
        link.drain()
        assert await there.frame() == StepFrame(
            ReplicaLoad(), [TokenDelta(0, [5]), TokenDelta(1, [6])], [failure], [1, 2], True
        )

    async def test_deltas_of_one_generation_in_one_step_are_merged_whole(
        self, links: GatewayLinks, gateway: FakeGateway
    ) -> None:
        link, there = await connect(links, gateway)
        await there.frame()
        link.send(TokenDelta(1, []))
        link.send(TokenDelta(1, [1, 2], None, 16))
        link.send(TokenDelta(1, [3], FinishReason.STOP, 16))
        assert (await there.frame()).deltas == [TokenDelta(1, [1, 2, 3], FinishReason.STOP, 16)]

    async def test_tokens_leave_in_order_whatever_steps_they_come_from(
        self, links: GatewayLinks, gateway: FakeGateway
    ) -> None:
        link, there = await connect(links, gateway)
        for token_id in range(100):
            link.send(TokenDelta(1, [token_id], FinishReason.STOP if token_id == 99 else None))
            if token_id % 3 == 0:
                await asyncio.sleep(0)
        found: list[int] = []
        finish_reason = None
        while finish_reason is None:
            for delta in (await there.frame()).deltas:
                found += delta.token_ids
                finish_reason = delta.finish_reason
        assert found == list(range(100))

    async def test_the_load_is_that_of_when_the_frame_leaves(
        self, links: GatewayLinks, gateway: FakeGateway, worker: RecordingWorker
    ) -> None:
        link, there = await connect(links, gateway)
        await there.frame()
        link.send(TokenDelta(1, [1]))
        worker.figures = ReplicaLoad(running=5)
        assert (await there.frame()).load == ReplicaLoad(running=5)

    async def test_a_huge_delta_keeps_nothing_else_from_being_done(
        self, links: GatewayLinks, gateway: FakeGateway
    ) -> None:
        entries = [TokenLogprobs(it, -0.5, [(it, -0.5)] * 20) for it in range(5000)]
        async with FakeGateway() as other:
            link, there = await connect(links, gateway)
            elsewhere, beyond = await connect(links, other)
            for connection in (there, beyond):
                await connection.frame()
            turns = 0

            def turn() -> None:
                nonlocal turns
                turns += 1
                link.send(TokenDelta(2, [turns]))
                elsewhere.send(TokenDelta(3, [turns]))
                if turns < 5:
                    asyncio.get_running_loop().call_soon(turn)

            link.send(TokenDelta(1, [7], FinishReason.STOP, prompt_logprobs=[None, *entries]))
            asyncio.get_running_loop().call_soon(turn)
            told: list[TokenLogprobs | None] = []
            tokens: list[int] = []
            finish_reason = None
            while finish_reason is None:
                payload = await there.payload()
                assert len(payload) <= wire.FRAME_BYTES + 1000
                for delta in decode_frame(payload).deltas:
                    if delta.generation_id == 1:
                        told += delta.prompt_logprobs or []
                        finish_reason = delta.finish_reason
                    else:
                        tokens += delta.token_ids
            assert told == [None, *entries]
            assert tokens == [1, 2, 3, 4, 5]  # before the end of what was sent before them
            while 5 not in tokens[5:]:
                tokens += [it for delta in (await beyond.frame()).deltas for it in delta.token_ids]

    async def test_what_no_frame_can_hold_ends_its_own_generation_alone(
        self, links: GatewayLinks, gateway: FakeGateway, worker: RecordingWorker
    ) -> None:
        link, there = await connect(links, gateway)
        link.send(TokenDelta(1, [1]))
        huge = TokenLogprobs(1, -0.5, [(1, -0.5)] * wire.FRAME_BYTES)
        link.send(TokenDelta(2, [1], logprobs=[huge]))
        assert (await there.news()).deltas == [TokenDelta(1, [1])]
        frame = await there.news()
        assert [failure.generation_id for failure in frame.failures] == [2]
        assert frame.deltas == []
        assert worker.orders == [Abort(2)]


class TestHeartbeats:
    @pytest.fixture(autouse=True)
    def _quick(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(wire, "HEARTBEAT_S", 0.01)

    async def test_an_idle_replica_says_that_it_lives_and_what_it_does(
        self, links: GatewayLinks, gateway: FakeGateway, worker: RecordingWorker
    ) -> None:
        _, there = await connect(links, gateway)
        for running in range(5):
            worker.figures = ReplicaLoad(running=running)
            while (await there.frame()) != StepFrame(worker.figures):
                pass

    async def test_no_heartbeat_while_tokens_flow(
        self, links: GatewayLinks, gateway: FakeGateway, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(wire, "HEARTBEAT_S", 60)
        link, there = await connect(links, gateway)
        for token_id in range(20):
            link.send(TokenDelta(1, [token_id]))
            await asyncio.sleep(0)
        link.send(TokenDelta(1, [20], FinishReason.STOP))
        assert (await there.frame()).deltas == []
        tokens: list[int] = []
        while 20 not in tokens:
            (delta,) = (await there.frame()).deltas
            tokens += delta.token_ids
        assert tokens == list(range(21))

    async def test_a_closed_link_beats_no_more(
        self, links: GatewayLinks, gateway: FakeGateway
    ) -> None:
        link, _ = await connect(links, gateway)
        await links.close()
        await until(lambda: link.closed)
        assert link._heartbeat is not None
        assert link._heartbeat.cancelled()


class TestOrders:
    async def test_orders_may_be_cut_anywhere(
        self, links: GatewayLinks, gateway: FakeGateway, worker: RecordingWorker
    ) -> None:
        _, there = await connect(links, gateway)
        orders = [BEGIN, Abort(7), BEGIN]
        stream = b"".join(wire.pack(encode(order)) for order in orders)
        for cut in range(1, len(stream)):
            worker.orders.clear()
            for part in (stream[:cut], stream[cut:]):
                there.writer.write(part)
                await there.writer.drain()
                await asyncio.sleep(0)
            await until(lambda: len(worker.orders) == 3)
            assert worker.orders == orders

    async def test_an_order_may_come_with_the_gateways_proof(
        self, links: GatewayLinks, worker: RecordingWorker
    ) -> None:
        class Hasty(FakeGateway):
            async def _accept(
                self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
            ) -> None:
                self.connections.append(Connection(reader, writer))
                nonce_g = wire.new_nonce()
                writer.write(nonce_g)
                nonce_r = await reader.readexactly(wire.NONCE_BYTES)
                proof = wire.gateway_proof(SECRET, nonce_r, nonce_g)
                writer.write(proof + wire.pack(encode(BEGIN)))

        async with Hasty() as gateway:
            await links.connect(gateway.address)
            await until(lambda: worker.orders == [BEGIN])

    @pytest.mark.parametrize(
        "garbage",
        [
            pytest.param(b"\xff\xff\xff\xff", id="length over the limit"),
            pytest.param(wire.pack(b"\xc1"), id="no MessagePack"),
            pytest.param(wire.pack(encode(StepFrame(ReplicaLoad()))), id="a frame"),
            pytest.param(wire.pack(b""), id="empty"),
        ],
    )
    async def test_a_gateway_that_makes_no_sense_is_hung_up_on(
        self, links: GatewayLinks, gateway: FakeGateway, worker: RecordingWorker, garbage: bytes
    ) -> None:
        link, there = await connect(links, gateway)
        there.order(BEGIN)
        there.writer.write(garbage)
        await there.ended()
        assert worker.orders == [BEGIN]
        assert worker.gone == [link]

    async def test_the_worker_hears_once_that_a_gateway_is_gone(
        self, links: GatewayLinks, gateway: FakeGateway, worker: RecordingWorker
    ) -> None:
        link, there = await connect(links, gateway)
        there.writer.transport.abort()
        await until(lambda: link.closed)
        assert worker.gone == [link]
        for _ in range(3):  # who has not heard of it yet does no harm
            link.send(TokenDelta(1, [1]))
            link.fail(GenerationFailure(1, "The engine failed."))
            link.refuse(2)
            link.drain()
            await asyncio.sleep(0)
        assert worker.gone == [link]


class TestSecret:
    async def test_gateway_with_another_secret_gets_no_tokens_and_gives_no_orders(
        self, links: GatewayLinks, worker: RecordingWorker
    ) -> None:
        async with FakeGateway(OTHER) as impostor:
            with pytest.raises(ReplicaLostError):
                await links.connect(impostor.address)
            there = await impostor.connected()
            there.order(BEGIN)
            await there.ended()
        assert worker.orders == []

    async def test_a_gateway_that_does_not_prove_itself_hears_no_more_than_a_name(
        self, links: GatewayLinks
    ) -> None:
        heard = bytearray()

        async def impostor(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonce_g = wire.new_nonce()
            writer.write(nonce_g)
            nonce_r = await reader.readexactly(wire.NONCE_BYTES)
            writer.write(wire.gateway_proof(OTHER, nonce_r, nonce_g))
            heard.extend(nonce_r + await reader.read())
            writer.close()

        server = await asyncio.start_server(impostor, HOST, 0)
        async with server:
            with pytest.raises(ReplicaLostError):
                await links.connect(server.sockets[0].getsockname())
            await until(lambda: bool(heard))
        assert len(heard) <= OPENING_BYTES

    async def test_a_silent_gateway_is_given_up_for_good(
        self, links: GatewayLinks, worker: RecordingWorker, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(link_module, "HANDSHAKE_TIMEOUT_S", 0.01)
        async with FakeGateway(None) as gateway:
            with pytest.raises(ReplicaLostError):
                await links.connect(gateway.address)
            there = await gateway.connected()
            # It has proved nothing, however long it waited.
            there.order(BEGIN)
            await there.ended()
        assert worker.orders == []

    async def test_who_closes_while_it_connects_leaves_no_connection(
        self, links: GatewayLinks
    ) -> None:
        async with FakeGateway(None) as gateway:
            connecting = asyncio.create_task(links.connect(gateway.address))
            there = await gateway.connected()
            await links.close()
            await there.ended()
            with pytest.raises(asyncio.CancelledError):
                await connecting

"""Links to several gateways, to slow ones, and those of a replica that drains."""

import asyncio
import socket
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import pytest
from tests.engine.gateways import NAME, Connection, FakeGateway, connect
from tests.routing.conftest import HOST, SECRET, RecordingWorker, until

from tera import wire
from tera.engine.link import GatewayLink, GatewayLinks
from tera.errors import ReplicaLostError
from tera.generation import FinishReason, GenerationFailure, StepFrame, TokenDelta, decode_frame


class TestSlowGateway:
    @asynccontextmanager
    async def paused(
        self, worker: RecordingWorker
    ) -> AsyncGenerator[tuple[GatewayLink, asyncio.Transport, asyncio.StreamReader]]:
        """Yield a link, its transport, and the reader of a gateway that does not read yet."""
        accepted: asyncio.Future[asyncio.StreamReader] = asyncio.Future()
        writers: list[asyncio.StreamWriter] = []

        async def gateway(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writers.append(writer)
            await Connection(reader, writer).shake_hands(SECRET)
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
                lambda: GatewayLink(NAME, SECRET, worker), sock=connecting
            )
            await link.ready
            try:
                yield link, transport, await accepted
            finally:
                transport.abort()
                for writer in writers:
                    writer.close()

    async def test_deltas_are_merged_and_no_token_is_lost(self, worker: RecordingWorker) -> None:
        steps, generations, width = 1000, 4, 50
        async with self.paused(worker) as (link, transport, reader):
            highest_bytes = 0
            for step in range(steps):
                for generation_id in range(generations):
                    token_ids = list(range(step * width, (step + 1) * width))
                    finish = FinishReason.LENGTH if step == steps - 1 else None
                    link.send(TokenDelta(generation_id, token_ids, finish))
                if step == steps // 2:
                    link.fail(GenerationFailure(98, "The engine failed."))
                    link.refuse(99)
                    link.drain()
                await asyncio.sleep(0)
                highest_bytes = max(highest_bytes, transport.get_write_buffer_size())
            # The mark at which transports ask for a pause, and the frame that went over it.
            assert highest_bytes < 2 * 64 * 1024
            buffer = bytearray()
            received: dict[int, list[int]] = {each: [] for each in range(generations)}
            finished: set[int] = set()
            frames: list[StepFrame] = []
            while len(finished) < generations:
                buffer += await reader.read(65536)
                for payload in list(wire.take_frames(buffer)):
                    frames.append(decode_frame(payload))
                    for delta in frames[-1].deltas:
                        assert delta.generation_id not in finished
                        received[delta.generation_id] += delta.token_ids
                        if delta.finish_reason is not None:
                            finished.add(delta.generation_id)
            assert received == {key: list(range(steps * width)) for key in range(generations)}
            assert len(frames) < steps / 2
            failures = [failure for frame in frames for failure in frame.failures]
            assert [failure.generation_id for failure in failures] == [98]
            assert [number for frame in frames for number in frame.refused] == [99]
            assert frames[-1].draining

    async def test_a_slow_gateway_that_leaves_is_told_to_the_worker(
        self, worker: RecordingWorker
    ) -> None:
        async with self.paused(worker) as (link, transport, _):
            for _ in range(500):
                link.send(TokenDelta(1, [7] * 500))
                await asyncio.sleep(0)
            transport.abort()
            await until(lambda: link.closed)
            assert worker.gone == [link]
            link.send(TokenDelta(1, [7]))
            assert not link._pending


class TestSharing:
    async def test_all_askers_share_one_connection(
        self, links: GatewayLinks, gateway: FakeGateway
    ) -> None:
        await asyncio.gather(*(links.connect(gateway.address) for _ in range(20)))
        await links.connect(gateway.address)
        assert len(gateway.connections) == 1

    async def test_asker_that_gives_up_takes_nobody_with_it(
        self, links: GatewayLinks, gateway: FakeGateway
    ) -> None:
        asking = [asyncio.create_task(links.connect(gateway.address)) for _ in range(2)]
        await asyncio.sleep(0)
        asking[0].cancel()
        await asking[1]
        await links.connect(gateway.address)
        assert len(gateway.connections) == 1

    async def test_each_gateway_gets_its_own_tokens(
        self, links: GatewayLinks, gateway: FakeGateway
    ) -> None:
        async with FakeGateway() as other:
            one, there = await connect(links, gateway)
            two, elsewhere = await connect(links, other)
            one.send(TokenDelta(1, [1]))
            two.send(TokenDelta(1, [2]))
            assert (await there.news()).deltas == [TokenDelta(1, [1])]
            assert (await elsewhere.news()).deltas == [TokenDelta(1, [2])]

    async def test_a_new_connection_is_made_after_a_loss(
        self, links: GatewayLinks, gateway: FakeGateway
    ) -> None:
        first, there = await connect(links, gateway)
        there.writer.transport.abort()
        await until(lambda: first.closed)
        second, there = await connect(links, gateway)
        assert second is not first
        second.send(TokenDelta(1, [5]))
        assert (await there.news()).deltas == [TokenDelta(1, [5])]

    async def test_a_gateway_that_is_not_there_is_asked_each_time(
        self, links: GatewayLinks
    ) -> None:
        with socket.socket() as probe:
            probe.bind((HOST, 0))
            address = probe.getsockname()
        for _ in range(2):
            with pytest.raises(ReplicaLostError):
                await links.connect(address)

    async def test_closing_sends_what_is_pending(
        self, links: GatewayLinks, gateway: FakeGateway
    ) -> None:
        link, there = await connect(links, gateway)
        link.send(TokenDelta(1, [1], FinishReason.STOP))
        link.refuse(2)
        await links.close()
        frame = await there.news()
        assert (frame.deltas, frame.refused) == ([TokenDelta(1, [1], FinishReason.STOP)], [2])
        await there.ended()


class TestDraining:
    async def test_every_gateway_is_told(self, links: GatewayLinks, gateway: FakeGateway) -> None:
        async with FakeGateway() as other:
            _, there = await connect(links, gateway)
            _, elsewhere = await connect(links, other)
            links.drain()
            for connection in (there, elsewhere):
                assert (await connection.news()).draining
                assert (await connection.frame()).draining  # and so it stays

    @pytest.mark.parametrize("drains", ["before", "while"])
    async def test_a_gateway_that_connects_later_is_told_too(
        self, links: GatewayLinks, gateway: FakeGateway, drains: str
    ) -> None:
        if drains == "before":
            links.drain()
        connecting = asyncio.create_task(links.connect(gateway.address))
        await asyncio.sleep(0)
        if drains == "while":
            links.drain()
        await connecting
        assert (await (await gateway.connected()).news()).draining

    async def test_one_that_was_lost_keeps_no_other_from_being_told(
        self, links: GatewayLinks, gateway: FakeGateway
    ) -> None:
        async with FakeGateway() as other:
            lost, there = await connect(links, gateway)
            _, elsewhere = await connect(links, other)
            there.writer.transport.abort()
            await until(lambda: lost.closed)
            links.drain()
            assert (await elsewhere.news()).draining

"""The gateway's end of the token channel, with replicas that are none or speak wrongly."""

import asyncio
import os

import pytest
from tests.routing.conftest import HOST, SECRET, FakeReplica, RecordingWatcher, until
from tests.routing.generations import begun, last

from tera import wire
from tera.errors import ReplicaLostError
from tera.generation import Abort, ReplicaLoad, StepFrame, TokenDelta, encode
from tera.routing import link as link_module
from tera.routing.link import ReplicaLinks

OTHER = "the secret of another cluster"


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

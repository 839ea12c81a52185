"""Gateways that the tests own, as a replica's end of the token channel meets them."""

import asyncio
from contextlib import suppress
from types import TracebackType
from typing import Self

from tests.routing.conftest import HOST, SECRET

from tera import wire
from tera.engine.link import Address, GatewayLink, GatewayLinks
from tera.generation import Order, StepFrame, decode_frame, encode

NAME = "replica-1"
"""Of the replica that connects to them."""


class Connection:
    """The gateway's end of one connection, byte by byte, independent of `ReplicaLink`."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def shake_hands(self, secret: str) -> None:
        nonce_g = wire.new_nonce()
        self.writer.write(nonce_g)
        nonce_r = await self.reader.readexactly(wire.NONCE_BYTES)
        proof = await self.reader.readexactly(wire.MAC_BYTES)
        assert wire.proofs_match(proof, wire.replica_proof(SECRET, nonce_g, nonce_r, NAME))
        assert await self.payload() == NAME.encode()
        self.writer.write(wire.gateway_proof(secret, nonce_r, nonce_g))

    async def payload(self) -> bytes:
        length = int.from_bytes(await self.reader.readexactly(wire.LENGTH_BYTES), "little")
        return await self.reader.readexactly(length)

    async def frame(self) -> StepFrame:
        """Return the next frame."""
        async with asyncio.timeout(10):
            return decode_frame(await self.payload())

    async def news(self) -> StepFrame:
        """Return the next frame that is no heartbeat."""
        async with asyncio.timeout(10):
            while True:
                frame = await self.frame()
                if frame.deltas or frame.failures or frame.refused or frame.draining:
                    return frame

    def order(self, *orders: Order) -> None:
        self.writer.write(b"".join(wire.pack(encode(order)) for order in orders))

    async def ended(self) -> None:
        """Wait until the replica has closed the connection."""
        async with asyncio.timeout(10):
            with suppress(ConnectionError):
                while await self.reader.read(65536):
                    pass


class FakeGateway:
    """Gateways' listening side; `secret` None is one that never answers."""

    def __init__(self, secret: str | None = SECRET) -> None:
        self._secret = secret
        self._new: asyncio.Queue[Connection] = asyncio.Queue()
        self.connections: list[Connection] = []

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = Connection(reader, writer)
        self.connections.append(connection)
        if self._secret is not None:
            with suppress(asyncio.IncompleteReadError):
                await connection.shake_hands(self._secret)
        self._new.put_nowait(connection)

    async def connected(self) -> Connection:
        """Return the next connection, after its handshake."""
        async with asyncio.timeout(10):
            return await self._new.get()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, HOST, 0)
        self.address: Address = self._server.sockets[0].getsockname()[:2]
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._server.close()
        for connection in self.connections:
            connection.writer.close()
            with suppress(ConnectionError):
                await connection.writer.wait_closed()


def link_to(links: GatewayLinks, gateway: FakeGateway) -> GatewayLink:
    return links._links[gateway.address].result()


async def connect(links: GatewayLinks, gateway: FakeGateway) -> tuple[GatewayLink, Connection]:
    await links.connect(gateway.address)
    return link_to(links, gateway), await gateway.connected()

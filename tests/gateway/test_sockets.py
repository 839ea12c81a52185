"""Streams through a real server, whose sockets are small and whose flow control is its own."""

import asyncio
import json
import socket
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import pytest_asyncio
import uvicorn
from tests.gateway.conftest import MODEL, Gateway
from tests.gateway.test_pipeline import ENDLESS, PROMPT
from tests.routing.conftest import until

TOKENS = 2000
BODY: dict[str, Any] = {
    "model": MODEL,
    "prompt": PROMPT,
    "temperature": 0,
    "max_tokens": TOKENS,
    "stream": True,
    **ENDLESS,
}


class Connection:
    """A client's connection with one request, of whose answer it takes what it asks for."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def begun(self) -> None:
        """Wait for the answer's head."""
        assert (await self._reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 OK\r\n")

    async def events(self) -> list[bytes]:
        """Return the data of all events to come."""
        data = b""
        while size := int(await self._reader.readline(), base=16):
            data += (await self._reader.readexactly(size + 2))[:-2]
        return [event.removeprefix(b"data: ") for event in data.split(b"\n\n")[:-1]]

    def hang_up(self) -> None:
        self._writer.transport.abort()


@asynccontextmanager
async def asking(address: tuple[str, int], body: dict[str, Any]) -> AsyncGenerator[Connection]:
    """Ask for a completion with a client whose buffers are small."""
    own = socket.socket()
    own.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    own.setblocking(False)
    await asyncio.get_running_loop().sock_connect(own, address)
    reader, writer = await asyncio.open_connection(sock=own, limit=1024)
    content = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(content)}\r\n\r\n"
    writer.write(head.encode() + content)
    try:
        yield Connection(reader, writer)
    finally:
        writer.transport.abort()


def text_of(events: list[bytes]) -> str:
    *pieces, last = events
    assert last == b"[DONE]"
    return "".join(json.loads(piece)["choices"][0]["text"] for piece in pieces)


@pytest_asyncio.fixture
async def address(gateway: Gateway) -> AsyncGenerator[tuple[str, int]]:
    """Where a server listens that has the gateway's application."""
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # its connections inherit it
    server = uvicorn.Server(uvicorn.Config(gateway.app, lifespan="off", log_config=None))
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    await until(lambda: server.started)
    yield listener.getsockname()
    server.should_exit = server.force_exit = True
    await serving


async def test_s9_a_client_that_does_not_read_gets_it_all_later_in_few_events(
    gateway: Gateway, address: tuple[str, int]
) -> None:
    async with asking(address, BODY) as slow, asking(address, BODY) as quick:
        await slow.begun()
        await quick.begun()
        whole = text_of(await quick.events())
        await until(lambda: gateway.load.running == 0)
        assert len(gateway.admitter.running) == 1  # the other answer has not ended
        missed = await slow.events()
        assert text_of(missed) == whole
        assert len(missed) < TOKENS / 2
        assert gateway.admitter.running == {}
    assert [record.completion_tokens for record in gateway.admitter.settled] == [TOKENS] * 2


async def test_s8_a_client_that_does_not_read_and_leaves_is_noticed(
    gateway: Gateway, address: tuple[str, int]
) -> None:
    async with asking(address, BODY) as slow:
        await slow.begun()
        await until(lambda: gateway.load.running == 0)
        assert gateway.admitter.settled == []
        slow.hang_up()
        await until(lambda: gateway.admitter.settled != [])
    [record] = gateway.admitter.settled
    assert (record.status, record.completion_tokens) == ("cancelled", TOKENS)

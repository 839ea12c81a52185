"""A Redis whose every word a test decides, for what a real one cannot be made to do."""

import asyncio
from typing import Self

from hiredis import Reader

_LOGIN = {b"PING": b"+PONG\r\n", b"CLIENT": b"+OK\r\n"}


class ScriptedRedis:
    """Logs clients in, and leaves every other command to the test."""

    def __init__(self) -> None:
        self.asked: asyncio.Queue[bytes] = asyncio.Queue()
        """The first argument of each command, over all connections."""
        self.connections = 0
        self.lets_in = asyncio.Event()
        self.lets_in.set()

    async def __aenter__(self) -> Self:
        self._listener = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"redis://127.0.0.1:{self._listener.sockets[0].getsockname()[1]}/0"
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._listener.close()
        self.cut()

    def say(self, data: bytes) -> None:
        """Write to the client that has connected last."""
        self._writer.write(data)

    def cut(self) -> None:
        """Close the connection of the client that has connected last."""
        self._writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._writer = writer
        parser = Reader()
        while data := await reader.read(65536):
            parser.feed(data)
            while (command := parser.gets()) is not False:
                if command[0] in _LOGIN:
                    await self.lets_in.wait()
                    writer.write(_LOGIN[command[0]])
                else:
                    self.asked.put_nowait(command[0])
        writer.close()

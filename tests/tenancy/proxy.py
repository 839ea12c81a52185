"""Stands between a client and a Redis, and can be slow or lead to another one."""

import asyncio
import ssl
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Self

from tests.tenancy.conftest import RedisServer


class Proxy:
    """Leads to `server`, and lets every answer wait for `delay_s`."""

    def __init__(
        self, server: RedisServer, *, tls: ssl.SSLContext | None = None, path: Path | None = None
    ) -> None:
        """Clients come by TCP, by TLS, or to a unix socket at `path`."""
        self.server = server
        """Where new connections lead; those that are open stay."""
        self._tls, self._path = tls, path
        self._pairs: set[asyncio.Task[None]] = set()
        self.delay_s = 0.0

    async def __aenter__(self) -> Self:
        if self._path is not None:
            self._listener = await asyncio.start_unix_server(self._serve, self._path)
            self.url = f"unix://{self._path}"
            return self
        self._listener = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self._tls)
        scheme = "redis" if self._tls is None else "rediss"
        self.url = f"{scheme}://127.0.0.1:{self._listener.sockets[0].getsockname()[1]}/0"
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._listener.close()
        await self.cut()

    async def cut(self) -> None:
        """Close what is open."""
        for pair in list(self._pairs):
            pair.cancel()
        await asyncio.gather(*self._pairs, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        pair = asyncio.current_task()
        assert pair is not None
        self._pairs.add(pair)
        writers = [writer]
        try:
            with suppress(OSError):
                port = self.server.port
                from_redis, to_redis = await asyncio.open_connection("127.0.0.1", port)
                writers.append(to_redis)
                await asyncio.gather(
                    self._forward(reader, to_redis, lambda: 0.0),
                    self._forward(from_redis, writer, lambda: self.delay_s),
                )
        finally:
            self._pairs.discard(pair)
            for each in writers:
                each.transport.abort()

    async def _forward(
        self,
        source: asyncio.StreamReader,
        sink: asyncio.StreamWriter,
        delay_s: Callable[[], float],
    ) -> None:
        while data := await source.read(65536):
            await asyncio.sleep(delay_s())
            sink.write(data)
            await sink.drain()
        raise ConnectionResetError  # one end has gone, so the other shall too

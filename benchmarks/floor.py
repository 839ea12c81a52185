"""The floor of the `chain` benchmark: a bare uvloop server that writes recorded events.

It parses no more of a request than its end, and makes no decision: what any gateway in Python would
pay for the same events over the same sockets. One timer serves all streams that step together.
"""

import asyncio
import sys
from pathlib import Path

import uvloop

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


class Floor:
    """Streams the same events to everybody, one at each step; without steps, all at once."""

    def __init__(self, events: list[bytes], answer: bytes, step_s: float) -> None:
        """`answer` is what a request without `stream` gets, `step_s` the time of a token."""
        self._chunks = [b"%x\r\n%b\r\n" % (len(event), event) for event in events]
        self._answer = answer
        self._step_s = step_s
        self._open: dict[Connection, int] = {}
        self._loop = asyncio.get_running_loop()

    def answer(self, connection: "Connection", body: bytes) -> None:
        """Answer a request."""
        transport = connection.transport
        if b'"stream": true' not in body:
            length = b"content-length: %d\r\n\r\n" % len(self._answer)
            transport.write(b"HTTP/1.1 200 OK\r\n" + length + self._answer)
        elif not self._step_s:
            transport.write(HEAD)
            for chunk in self._chunks:
                transport.write(chunk)
            transport.write(b"0\r\n\r\n")
        else:
            transport.write(HEAD)
            if not self._open:
                self._loop.call_later(self._step_s, self._step)
            self._open[connection] = 0

    def _step(self) -> None:
        for connection, at in list(self._open.items()):
            connection.transport.write(self._chunks[at])
            if at + 1 == len(self._chunks):
                connection.transport.write(b"0\r\n\r\n")
                del self._open[connection]
            else:
                self._open[connection] = at + 1
        if self._open:
            self._loop.call_later(self._step_s, self._step)


class Connection(asyncio.Protocol):
    """One client."""

    def __init__(self, floor: Floor) -> None:
        self._floor = floor
        self._received = b""
        self.transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self.transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        """Answer once the request is whole."""
        self._received += data
        head, end, body = self._received.partition(b"\r\n\r\n")
        if not end:
            return
        length = next(
            (int(line[15:]) for line in head.split(b"\r\n") if line.startswith(b"content-length:")),
            0,
        )
        if len(body) >= length:
            self._received = b""
            self._floor.answer(self, body)


async def _serve(directory: Path, port: int, step_s: float) -> None:
    events = [part + b"\n\n" for part in (directory / "events").read_bytes().split(b"\n\n") if part]
    floor = Floor(events, (directory / "answer").read_bytes(), step_s)
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Connection(floor), "127.0.0.1", port)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(_serve(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])))

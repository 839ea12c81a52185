"""Streams as their client sees them: what came, when, and how it ended."""

import asyncio
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Self

import msgspec

PATH = "/v1/completions"

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@dataclass
class Choice:
    """One choice of an answer, its chunks put together."""

    text: str = ""
    finish_reason: str | None = None
    logprobs: list[Any] = field(default_factory=list)


@dataclass
class Answer:
    """One stream, from the request to its end; times are of `time.monotonic`."""

    sent_s: float
    request_id: str = ""
    arrivals_s: list[float] = field(default_factory=list)
    """When each event with a part of a choice was read."""
    choices: dict[int, Choice] = field(default_factory=dict)
    usage: dict[str, Any] | None = None
    keep_alives: int = 0
    error: str = ""
    """Why it is no whole answer; empty when it is one."""
    ended_s: float = 0.0

    @property
    def text(self) -> str:
        """The first choice's."""
        return self.choices[0].text if 0 in self.choices else ""

    def silences_s(self) -> list[float]:
        """Return the times between events."""
        return [after - before for before, after in itertools.pairwise(self.arrivals_s)]

    def take(self, event: dict[str, Any], now: float) -> None:
        """Add an event's data, which was read `now`."""
        if "error" in event:
            self.error = str(event["error"])
            return
        self.usage = event.get("usage") or self.usage
        if event["choices"]:
            self.arrivals_s.append(now)
        for part in event["choices"]:
            choice = self.choices.setdefault(part["index"], Choice())
            choice.text += part.get("text") or part.get("delta", {}).get("content") or ""
            choice.finish_reason = part["finish_reason"] or choice.finish_reason
            logprobs = part.get("logprobs") or {}
            choice.logprobs += logprobs.get("content") or logprobs.get("token_logprobs") or []


class StreamClient:
    """Asks one request after the other on one kept-alive connection, and nothing twice."""

    def __init__(self, port: int, api_key: str) -> None:
        self._port = port
        self._head = (
            "host: 127.0.0.1\r\ncontent-type: application/json\r\n"
            f"authorization: Bearer {api_key}\r\ncontent-length: "
        )
        self._connection: Connection | None = None

    async def __aenter__(self) -> Self:
        """Connect with the first request."""
        return self

    async def __aexit__(self, *exc: object) -> None:
        """Hang up."""
        self._hang_up()

    async def ask(
        self,
        body: dict[str, Any],
        path: str = PATH,
        *,
        on_event: Callable[[], None] = lambda: None,
    ) -> Answer:
        """Return the stream that answers a request; `on_event` is called at each event.

        A failure, of the connection too, is the answer's `error`.
        """
        answer = Answer(time.monotonic())
        data = msgspec.json.encode(
            {"stream_options": {"include_usage": True}, **body, "stream": True}
        )
        request = f"POST {path} HTTP/1.1\r\n{self._head}{len(data)}\r\n\r\n".encode() + data
        try:
            reused = self._connection is not None
            try:
                await self._exchange(request, answer, on_event)
            except (ConnectionError, asyncio.IncompleteReadError):
                # A server may close a connection that it keeps alive just when it is used again.
                if not reused or answer.request_id:
                    raise
                self._hang_up()
                await self._exchange(request, answer, on_event)
        except (OSError, asyncio.IncompleteReadError) as error:
            answer.error = f"the connection ended after {len(answer.arrivals_s)} events: {error!r}"
        except asyncio.CancelledError:
            self._hang_up()
            raise
        answer.ended_s = time.monotonic()
        if answer.error:
            self._hang_up()
        return answer

    async def _exchange(self, request: bytes, answer: Answer, on_event: Callable[[], None]) -> None:
        if self._connection is None:
            self._connection = await asyncio.open_connection("127.0.0.1", self._port)
        self._connection[1].write(request)
        await self._read(self._connection[0], answer, on_event)

    def _hang_up(self) -> None:
        if self._connection is not None:
            self._connection[1].close()
            self._connection = None

    async def _read(
        self, reader: asyncio.StreamReader, answer: Answer, on_event: Callable[[], None]
    ) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        headers = dict(line.split(": ", 1) for line in head.split("\r\n")[1:] if line)
        answer.request_id = headers.get("x-request-id", "")
        if not head.startswith("http/1.1 200"):
            answer.error = (await reader.readexactly(int(headers["content-length"]))).decode()
            return
        done = False
        buffer = bytearray()
        while chunk := await _chunk(reader):
            now = time.monotonic()
            buffer += chunk
            for event in _events(buffer):
                if event.startswith(b":"):
                    answer.keep_alives += 1
                elif event == b"data: [DONE]":
                    done = True
                else:
                    answer.take(msgspec.json.decode(event.removeprefix(b"data: ")), now)
                    on_event()
        if not done and not answer.error:
            answer.error = "the stream ended without [DONE]"


async def _chunk(reader: asyncio.StreamReader) -> bytes:
    """Return the next chunk of a chunked body; empty is its end."""
    size = int(await reader.readuntil(b"\r\n"), 16)
    return (await reader.readexactly(size + 2))[:-2]


def _events(buffer: bytearray) -> Iterator[bytes]:
    """Yield the whole events of a buffer and leave the rest."""
    while (end := buffer.find(b"\n\n")) >= 0:
        yield bytes(buffer[:end])
        del buffer[: end + 2]


async def ask_all(
    port: int,
    api_key: str,
    bodies: list[dict[str, Any]],
    *,
    clients: int,
    path: str = PATH,
) -> list[Answer]:
    """Return the answers to all requests, in their order, so many at a time."""
    answers: list[Answer | None] = [None] * len(bodies)
    numbers = iter(range(len(bodies)))

    async def client() -> None:
        async with StreamClient(port, api_key) as connection:
            for number in numbers:
                answers[number] = await connection.ask(bodies[number], path)

    await asyncio.gather(*(client() for _ in range(clients)))
    return [answer for answer in answers if answer is not None]

"""Streams of events under way, whose work is the test itself."""

import asyncio

from tests.gateway.conftest import Client, exchange, unused

from tera.errors import BackendFailureError, TeraError
from tera.gateway.dialects import openai
from tera.gateway.dialects.base import Streamed
from tera.gateway.pieces import Piece
from tera.gateway.relay import KEEP_ALIVE, Events, EventStream, Outbox, StreamedAnswer

DONE = b"[done]"
FAILURE = BackendFailureError("The engines failed.")
NEVER_S = 3600.0


class Written(Streamed):
    """An answer whose events are the pieces' text as it is."""

    def add(self, piece: Piece) -> None:
        self._events.write(piece.content.encode())

    def end(self) -> bytes:
        return DONE

    def failed(self, error: TeraError) -> bytes:
        return openai.failed(error)


class Relay:
    """One `EventStream` under way, and its client; the test is the work that makes the answer."""

    def __init__(
        self,
        client: Client | None = None,
        *,
        outbox: Outbox | None = None,
        keep_alive_s: float = NEVER_S,
    ) -> None:
        self.client = client or Client()
        self.exchange = exchange(self.client.send)
        self.cancelled = False
        self._end: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        stream = EventStream(
            self._answered, self._work, self.exchange, outbox or Outbox(), keep_alive_s
        )
        # The stream goes past what the framework would send by.
        self.task = asyncio.create_task(stream({"type": "http"}, self.client.receive, unused))

    def _answered(self, events: Events) -> StreamedAnswer:
        self.answer = Written(events)
        return self.answer

    async def _work(self, answer: StreamedAnswer) -> None:
        try:
            await self._end
        except asyncio.CancelledError:
            await asyncio.sleep(0)  # what stops an engine may have to wait
            self.cancelled = True
            raise

    def say(self, *events: bytes) -> None:
        """Write events, as the frame does that brings the tokens."""
        for event in events:
            self.answer.add(Piece(0, event.decode()))

    def end(self, error: Exception | None = None) -> None:
        """Let the work succeed or fail."""
        if error is None:
            self._end.set_result(None)
        else:
            self._end.set_exception(error)

    async def ended(self) -> None:
        async with asyncio.timeout(10):
            await self.task


async def begun(
    client: Client | None = None, *, outbox: Outbox | None = None, keep_alive_s: float = NEVER_S
) -> Relay:
    """Return a stream that waits for its first event."""
    relay = Relay(client, outbox=outbox, keep_alive_s=keep_alive_s)
    await turns()
    return relay


async def turns(number: int = 20) -> None:
    """Let everything happen that waits for nothing."""
    for _ in range(number):
        await asyncio.sleep(0)


def spoken(client: Client) -> bytes:
    """Return what a client was sent, without comments."""
    return client.body.replace(KEEP_ALIVE, b"")

"""From deltas to bytes: server-sent events, one JSON answer, and what a hang-up does to both."""

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from contextlib import aclosing, asynccontextmanager
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tera.contract.common import error_envelope
from tera.errors import InternalError, TeraError

log = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class ClientGoneError(Exception):
    """The client hung up; there is nobody to answer."""


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


@asynccontextmanager
async def while_connected(receive: Receive) -> AsyncIterator[None]:
    """Run the block, and cancel it as soon as the client hangs up.

    Raises:
        ClientGoneError: the client hung up.
    """
    task = asyncio.current_task()
    assert task is not None
    gone = False

    def cancel(watcher: asyncio.Task[None]) -> None:
        nonlocal gone
        if not watcher.cancelled():
            gone = True
            task.cancel()

    watcher = asyncio.create_task(_disconnect(receive))
    watcher.add_done_callback(cancel)
    try:
        yield
    except asyncio.CancelledError:
        # Ours only if nobody else asked for it too (Serve cancels when it drains).
        if gone and task.uncancel() == 0:
            raise ClientGoneError from None
        raise
    finally:
        watcher.remove_done_callback(cancel)
        watcher.cancel()


class EventStream(Response):
    """An answer as server-sent events.

    Nothing is sent before the first event exists, so an early error keeps its own status; after
    `keep_alive_s` of silence the stream begins with a comment instead, and a later error becomes
    an event. `events` is closed before the response ends, however it ends.
    """

    def __init__(
        self,
        events: AsyncGenerator[bytes],
        *,
        keep_alive_s: float,
        on_error: Callable[[TeraError], None],
    ) -> None:
        super().__init__()
        self._events = events
        self._keep_alive_s = keep_alive_s
        self._on_error = on_error
        self._started = False
        self._sent_at = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events; see the class."""
        pulse = asyncio.create_task(self._pulse(send))
        try:
            async with while_connected(receive), aclosing(self._events) as events:
                await self._relay(events, send)
        except ClientGoneError:
            pass
        finally:
            pulse.cancel()

    async def _relay(self, events: AsyncGenerator[bytes], send: Send) -> None:
        try:
            async for event in events:
                await self._send(event, send)
            await self._send(DONE, send)
        except TeraError as error:
            if not self._started:
                raise
            self._on_error(error)
            await self._send(b"data: " + error_envelope(error) + b"\n\n", send)
        except Exception:
            if not self._started:
                raise
            log.exception("A stream failed after its first event.")
            failure = InternalError("The server failed on this request.")
            self._on_error(failure)
            await self._send(b"data: " + error_envelope(failure) + b"\n\n", send)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send(self, data: bytes, send: Send) -> None:
        self._sent_at = asyncio.get_running_loop().time()
        if not self._started:
            self._started = True
            await send({"type": "http.response.start", "status": 200, "headers": [*STREAM_HEADERS]})
        await send({"type": "http.response.body", "body": data, "more_body": True})

    async def _pulse(self, send: Send) -> None:
        """Break every silence of `keep_alive_s`; one task costs less than a time-out per token."""
        loop = asyncio.get_running_loop()
        self._sent_at = loop.time()
        while True:
            silence_s = loop.time() - self._sent_at
            if silence_s >= self._keep_alive_s:
                await self._send(KEEP_ALIVE, send)
                silence_s = 0.0
            await asyncio.sleep(self._keep_alive_s - silence_s)


async def answered(receive: Receive, work: Coroutine[Any, Any, Response]) -> Response:
    """Return the response that `work` makes, and stop making it when the client hangs up.

    Raises:
        ClientGoneError: the client hung up.
    """
    async with while_connected(receive):
        return await work

"""From deltas to bytes: server-sent events, one JSON answer, and what a hang-up does to both."""

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from contextlib import aclosing, asynccontextmanager, suppress
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tera.contract.common import error_envelope
from tera.errors import InternalError, TeraError

log = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
MAX_WRITE_BYTES = 65_536
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
    gone = over = False

    def cancel(watcher: asyncio.Task[None]) -> None:
        nonlocal gone
        # A callback that is on its way already cannot be removed when the block ends.
        if not over and not watcher.cancelled():
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
        over = True
        watcher.remove_done_callback(cancel)
        watcher.cancel()


class EventStream(Response):
    """An answer as server-sent events.

    Nothing is sent before the first event exists, so an early error keeps its own status; after
    `keep_alive_s` of silence the stream begins with a comment instead, and a later error becomes
    an event. `events` is closed before the response ends, however it ends.

    Each event leaves at once; only while the next one is here already, as `next_is_here` tells,
    do they leave together: then this process is behind, and the saved writes let it catch up.
    They leave by the `send` given here, the one at the application's edge: each of the
    framework's layers would wrap every event's message once more.
    """

    def __init__(
        self,
        events: AsyncGenerator[bytes],
        *,
        send: Send,
        next_is_here: Callable[[], bool],
        keep_alive_s: float,
        on_error: Callable[[TeraError], None],
    ) -> None:
        super().__init__()
        self._events = events
        self._send_message = send
        self._next_is_here = next_is_here
        self._keep_alive_s = keep_alive_s
        self._on_error = on_error
        self._started = False
        self._sent_at = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events; see the class."""
        pulse = asyncio.create_task(self._pulse())
        try:
            async with while_connected(receive):
                async with aclosing(self._events) as events:
                    last = await self._relay(events)
                pulse.cancel()  # nothing may follow the last write, however long that takes
                await self._send(last, more_body=False)
        except ClientGoneError:
            pass
        finally:
            pulse.cancel()

    async def _relay(self, events: AsyncGenerator[bytes]) -> bytes:
        """Send the events, but for the last bytes, which are returned."""
        held = b""
        try:
            async for event in events:
                held += event
                if held and (len(held) >= MAX_WRITE_BYTES or not self._next_is_here()):
                    await self._send(held)
                    held = b""
        except ClientGoneError:
            raise
        except TeraError as error:
            if not self._started and not held:
                raise
            return held + self._failed(error)
        except Exception:
            if not self._started and not held:
                raise
            log.exception("A stream failed after its first event.")
            return held + self._failed(InternalError("The server failed on this request."))
        return held + DONE

    def _failed(self, error: TeraError) -> bytes:
        self._on_error(error)
        return b"data: " + error_envelope(error) + b"\n\n"

    async def _send(self, data: bytes, *, more_body: bool = True) -> None:
        self._sent_at = asyncio.get_running_loop().time()
        send = self._send_message
        try:
            if not self._started:
                self._started = True
                headers = [*STREAM_HEADERS]
                await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": data, "more_body": more_body})
        except OSError as error:  # what ASGI servers raise once the client has left
            raise ClientGoneError from error

    async def _pulse(self) -> None:
        """Break every silence of `keep_alive_s`; one task costs less than a time-out per token."""
        loop = asyncio.get_running_loop()
        self._sent_at = loop.time()
        while True:
            silence_s = loop.time() - self._sent_at
            if silence_s >= self._keep_alive_s:
                with suppress(ClientGoneError):  # the stream itself learns of it by itself
                    await self._send(KEEP_ALIVE)
                silence_s = 0.0
            await asyncio.sleep(self._keep_alive_s - silence_s)


async def answered(receive: Receive, work: Coroutine[Any, Any, Response]) -> Response:
    """Return the response that `work` makes, and stop making it when the client hangs up.

    Raises:
        ClientGoneError: the client hung up.
    """
    async with while_connected(receive):
        return await work

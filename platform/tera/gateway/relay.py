"""Sends an answer to the client: server-sent events, and stopping the work on a hang-up."""

import asyncio
import logging
import types
from collections.abc import AsyncIterator, Callable, Coroutine, Generator
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any, Protocol

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from tera.errors import InternalError, TeraError
from tera.gateway.exchange import Exchange
from tera.gateway.pieces import Answer

log = logging.getLogger(__name__)

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
async def while_connected(receive: Receive) -> AsyncIterator[Callable[[], None]]:
    """Run the block, and cancel it as soon as the client hangs up.

    Yields:
        A function to call if a failing write shows the hang-up first.

    Raises:
        ClientGoneError: the client hung up.
    """
    task = asyncio.current_task()
    assert task is not None
    gone = over = False

    def hang_up() -> None:
        nonlocal gone
        # Only once: each `cancel` needs one `uncancel`.
        if not over and not gone:
            gone = True
            task.cancel()

    def disconnected(watcher: asyncio.Task[None]) -> None:
        # A callback that is already scheduled cannot be removed when the block ends.
        if not watcher.cancelled():
            hang_up()

    watcher = asyncio.create_task(_disconnect(receive))
    watcher.add_done_callback(disconnected)
    try:
        yield hang_up
    except asyncio.CancelledError:
        # The cancellation is ours only if nobody else cancelled too (Serve does when it drains).
        if gone and task.uncancel() == 0:
            raise ClientGoneError from None
        raise
    finally:
        over = True
        watcher.remove_done_callback(disconnected)
        watcher.cancel()


class StreamedAnswer(Answer, Protocol):
    """An answer that writes an event for each piece."""

    def end(self) -> bytes:
        """Return what follows the last event of an answer that succeeded."""
        ...

    def failed(self, error: TeraError) -> bytes:
        """Return the event that tells the client of an error in mid-stream."""
        ...


class Outbox:
    """Streams with something to send; all are written once this turn's frames have been read.

    One frame, or several that arrive together, may bring several tokens for many streams: this way
    each stream is written to once, with one callback of the event loop for all.
    """

    def __init__(self) -> None:
        self._waiting: list[Events] = []

    def flush_soon(self, events: "Events") -> None:
        """Flush a stream after the current callback."""
        if not self._waiting:
            asyncio.get_running_loop().call_soon(self._flush)
        self._waiting.append(events)

    def _flush(self) -> None:
        waiting, self._waiting = self._waiting, []
        for events in waiting:
            events.flush()


class Events:
    """A stream of events to one client.

    Nothing is sent before the first event exists, so an early error keeps its own status; after
    `keep_alive_s` of silence the stream begins with a comment instead. An event that is written
    leaves at once. While the client does not read, `blocked` says so and what is written waits.

    ASGI's `send` is a coroutine function that waits only while the connection is full. It is run
    here by hand, without a task, and is handed to one only if it does wait.
    """

    def __init__(
        self, send: Send, outbox: Outbox, keep_alive_s: float, hang_up: Callable[[], None]
    ) -> None:
        """`hang_up` is called if sending fails, so that the generation of events stops."""
        self._send = send
        self._outbox = outbox
        self._keep_alive_s = keep_alive_s
        self._hang_up = hang_up
        self._loop = asyncio.get_running_loop()
        self._parts: list[bytes] = []
        self._started = False
        self._waiting: asyncio.Task[None] | None = None
        """Sends what the connection had no room for."""
        self.blocked = False
        """Whether the client does not keep up; looked at for each token."""
        self._sent_at = self._loop.time()
        self._pulse = self._loop.call_later(keep_alive_s, self._keep_alive)

    @property
    def begun(self) -> bool:
        """Whether the response has started, so that an error can no longer have its own status."""
        return self._started or bool(self._parts)

    async def free(self) -> None:
        """Wait until the connection has accepted what was sent."""
        while self._waiting is not None:
            await asyncio.wait([self._waiting])

    def write(self, event: bytes) -> None:
        """Send an event, together with all others written in the same turn of the event loop."""
        if not self._parts:
            self._outbox.flush_soon(self)
        self._parts.append(event)

    def flush(self) -> None:
        """Send what was written, unless earlier bytes are still waiting."""
        if self._parts and self._waiting is None:
            data = b"".join(self._parts)
            self._parts.clear()
            self._push(data)

    async def close(self, last: bytes) -> None:
        """Send the last bytes and end the stream."""
        self._pulse.cancel()  # nothing may follow the last write, however long that takes
        await self.free()
        data = b"".join([*self._parts, last])
        self._parts.clear()
        try:
            if not self._started:
                self._started = True
                await self._send(_start())
            await self._send({"type": "http.response.body", "body": data, "more_body": False})
        except OSError as error:
            raise ClientGoneError from error

    def stop(self) -> None:
        """Send nothing more, neither keep-alives nor waiting events."""
        self._pulse.cancel()
        self._parts.clear()
        if self._waiting is not None:
            self._waiting.cancel()

    def _push(self, data: bytes) -> None:
        self._sent_at = self._loop.time()
        body: Message = {"type": "http.response.body", "body": data, "more_body": True}
        if not self._started:
            self._started = True
            self._run(self._both(_start(), body))
        else:
            self._run(self._send(body))

    async def _both(self, start: Message, body: Message) -> None:
        await self._send(start)
        await self._send(body)

    def _run(self, sending: Any) -> None:
        try:
            waits_for = sending.send(None)
        except StopIteration:
            return  # it never had to wait: the connection took everything
        except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001
            # Any error concerns only this stream: the others still have to be flushed.
            self._broke(error)
            return
        self._waiting = self._loop.create_task(_finish(sending, waits_for))
        self.blocked = True
        self._waiting.add_done_callback(self._found_room)

    def _found_room(self, task: asyncio.Task[None]) -> None:
        self._waiting, self.blocked = None, False
        error = asyncio.CancelledError() if task.cancelled() else task.exception()
        if error is None:
            self.flush()
        else:
            self._broke(error)

    def _broke(self, error: BaseException) -> None:
        # ASGI servers raise the first kind once the client has left.
        if not isinstance(error, OSError | asyncio.CancelledError):
            log.error("A stream's events could not be sent.", exc_info=error)
        self._hang_up()

    def _keep_alive(self) -> None:
        """End every silence of `keep_alive_s`; checking at intervals costs nothing per token."""
        silence_s = self._loop.time() - self._sent_at
        if silence_s >= self._keep_alive_s and not self.blocked:
            self._push(KEEP_ALIVE)
            silence_s = 0.0
        wait_s = max(self._keep_alive_s - silence_s, 0.0) or self._keep_alive_s
        self._pulse = self._loop.call_later(wait_s, self._keep_alive)


def _start() -> Message:
    return {"type": "http.response.start", "status": 200, "headers": [*STREAM_HEADERS]}


async def _finish(begun: Coroutine[Any, Any, None], waits_for: Any) -> None:
    """Finish a coroutine that was started by hand and has yielded what it waits for."""
    await _rest(begun, waits_for)


@types.coroutine
def _rest(begun: Coroutine[Any, Any, None], waits_for: Any) -> Generator[Any, Any, None]:
    while True:
        try:
            value = yield waits_for
        except BaseException as error:  # noqa: BLE001  the coroutine must see a cancellation too
            step = partial(begun.throw, error)
        else:
            step = partial(begun.send, value)
        try:
            waits_for = step()
        except StopIteration:
            return


Work = Callable[[StreamedAnswer], Coroutine[Any, Any, None]]


class EventStream(Response):
    """An answer as server-sent events, which are written while `work` generates it."""

    def __init__(
        self,
        answer: Callable[[Events], StreamedAnswer],
        work: Work,
        exchange: Exchange,
        outbox: Outbox,
        keep_alive_s: float,
    ) -> None:
        super().__init__()
        self._answer = answer
        self._work = work
        self._exchange = exchange
        self._outbox = outbox
        self._keep_alive_s = keep_alive_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events; an error before the first one is raised, a later one is an event."""
        with suppress(ClientGoneError):
            async with while_connected(receive) as hang_up:
                events = Events(self._exchange.send, self._outbox, self._keep_alive_s, hang_up)
                try:
                    await events.close(await self._made(events))
                finally:
                    events.stop()

    async def _made(self, events: Events) -> bytes:
        """Run the work, which writes the events; return the last bytes."""
        answer = self._answer(events)
        try:
            await self._work(answer)
            return answer.end()
        except TeraError as error:
            if not events.begun:
                raise
            return self._failed(answer, error)
        except Exception:
            if not events.begun:
                raise
            log.exception("A stream failed after its first event.")
            return self._failed(answer, InternalError("The server failed on this request."))

    def _failed(self, answer: StreamedAnswer, error: TeraError) -> bytes:
        self._exchange.code = error.code
        return answer.failed(error)

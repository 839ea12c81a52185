"""Pipelined calls to Redis over one connection, for the calls that every request makes.

For each command, redis-py takes a connection from its pool, with locks, a task and two time-outs:
half a millisecond of CPU for a request's two calls, five times what Redis itself needs. Here a call
is a future in a queue (docs/decisions/0007):

1. The calls of one turn of the event loop are sent in one write.
2. Redis answers in the order of the calls, so each reply belongs to the first waiting call. A call
   whose caller was cancelled stays in the queue until its reply has been read.
3. One timer watches all waiting calls (`silence.py`). If Redis is silent for too long, all calls
   fail and the connection is closed, as when it is lost, since later replies could no longer be
   matched to calls.
4. The next call opens a new connection, through redis-py and as the Redis URL says.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from typing import Any, Final

from hiredis import Reader, pack_command
from redis.asyncio import ConnectionPool
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import InvalidResponse, RedisError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

from tera.tenancy.redis import is_read_only
from tera.tenancy.silence import Patience, Silence
from tera.upstream import redis as redis_py

logger = logging.getLogger(__name__)

Argument = str | bytes | int
Unheard = Callable[[Any], None]
"""Called with the reply to a call whose caller was cancelled while waiting; not with errors."""

_UNFINISHED: Final = object()
_PATIENCE: Final = Patience()


class PipelinedRedis:
    """Makes calls over one connection, which is opened when there is none.

    Callers bound how many calls wait at a time. A call is tried once: the caller decides whether to
    repeat it after an error, since Redis may or may not have executed it.
    """

    def __init__(self, pool: ConnectionPool, patience: Patience = _PATIENCE) -> None:
        """Nothing is sent yet.

        Args:
            pool: knows how to connect; from `tenancy.redis.connect`, and closed by the caller.
            patience: how long a call may wait.

        Raises:
            InternalError: the installed redis-py cannot be used this way.
        """
        redis_py.check()
        self._pool = pool
        self._patience = patience
        self._connection: _Connection | None = None
        self._opening: asyncio.Task[None]

    @property
    def waiting(self) -> int:
        """Calls that are not answered yet."""
        return 0 if self._connection is None else self._connection.waiting

    @property
    def closed(self) -> bool:
        """Whether there is no connection, open or opening: the next call opens one."""
        return self._connection is None or self._connection.error is not None

    def call(self, *command: Argument, unheard: Unheard | None = None) -> asyncio.Future[Any]:
        """Send a command; return its future reply, in which simple strings are bytes.

        The wait includes opening a connection, if there is none.

        The reply raises:
            ResponseError: Redis refuses the command.
            TimeoutError: of redis-py; no answer in time.
            ConnectionError: of redis-py; the connection was lost, or cannot be opened.
        """
        return self._open_or_opening().call(command, unheard)

    async def open(self) -> None:
        """Open the connection if there is none, in as much time as the pool's time-outs give it.

        Raises:
            RedisError: it cannot be opened.
        """
        connection = self._open_or_opening()
        await asyncio.wait([self._opening])
        if connection.error is not None:
            raise connection.error

    async def aclose(self) -> None:
        """Close the connection; waiting calls fail."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.fail(RedisConnectionError("the connection was closed"))
            await asyncio.wait([self._opening])
            await connection.lost.wait()

    def _open_or_opening(self) -> "_Connection":
        connection = self._connection
        if connection is None or connection.error is not None:
            connection = self._connection = _Connection(self._patience)
            self._opening = asyncio.create_task(self._open(connection))
            connection.opening = self._opening
        return connection

    async def _open(self, connection: "_Connection") -> None:
        try:
            stream = await redis_py.opened_stream(self._pool)
        except RedisError as error:
            connection.fail(error)
        except Exception as error:
            # Whatever the error, the callers must not wait for ever.
            logger.exception("Opening a connection to Redis failed.")
            connection.fail(RedisConnectionError(f"{type(error).__name__}: {error}"))
        else:
            connection.take_over(stream)


_Call = tuple[asyncio.Future[Any], Unheard | None, int]
"""The future reply, who gets it if that is cancelled, and the slice in which the call was made."""


class _Connection(asyncio.Protocol):
    """One connection, from the first call that needs it to its end."""

    def __init__(self, patience: Patience) -> None:
        self.error: RedisError | None = None
        """Why it can no longer be used."""
        self.opening: asyncio.Task[None] | None = None
        self.lost = asyncio.Event()
        """Set when its transport is gone, or was never opened."""
        self._loop = asyncio.get_running_loop()
        self._patience = patience
        self._silence = Silence(patience, self._loop.time)
        self._slice = 0
        self._timer: asyncio.TimerHandle | None = None
        self._reader = Reader(
            protocolError=InvalidResponse, replyError=ResponseError, notEnoughData=_UNFINISHED
        )
        self._stream: asyncio.StreamWriter | None = None
        self._unsent: list[bytes] = []
        self._waiting: deque[_Call] = deque()
        self._answered = 0

    @property
    def waiting(self) -> int:
        """Calls that are not answered yet."""
        return len(self._waiting)

    def call(self, command: tuple[Argument, ...], unheard: Unheard | None) -> asyncio.Future[Any]:
        """Send a command together with this turn's others, or once the connection is open."""
        packed = pack_command(command)  # type: ignore[arg-type]  # its stub has one argument
        reply = self._loop.create_future()
        self._waiting.append((reply, unheard, self._slice))
        if not self._unsent and self._stream is not None:
            self._loop.call_soon(self._send)
        self._unsent.append(packed)
        if self._timer is None:
            self._silence.begin(self._answered)
            self._timer = self._loop.call_later(self._patience.slice_s, self._end_slice)
        return reply

    def take_over(self, stream: asyncio.StreamWriter) -> None:
        """Take over a stream that has just been opened."""
        if self.error is not None:  # given up meanwhile
            stream.transport.abort()
            return
        self._stream = stream
        stream.transport.set_protocol(self)
        self._send()

    def _send(self) -> None:
        if self._stream is not None and self._unsent:
            self._stream.transport.write(b"".join(self._unsent))
            self._unsent.clear()

    def data_received(self, data: bytes) -> None:
        """Deliver complete replies; the reader keeps the beginning of an incomplete one."""
        self._reader.feed(data)
        try:
            while self.error is None and (answer := self._reader.gets()) is not _UNFINISHED:
                self._deliver(answer)
        except InvalidResponse as error:
            # The stream is out of step: nothing after this can be trusted.
            self.fail(error)

    def connection_lost(self, exc: Exception | None) -> None:
        """Fail the waiting calls."""
        self.lost.set()
        self.fail(RedisConnectionError(f"the connection was lost: {exc or 'closed by Redis'}"))

    def _deliver(self, answer: Any) -> None:
        if not self._waiting:
            raise InvalidResponse("a reply that nobody has asked for")
        reply, unheard, _ = self._waiting.popleft()
        self._answered += 1
        refused = isinstance(answer, ResponseError)
        if not reply.done():
            if refused:
                reply.set_exception(answer)
            else:
                reply.set_result(answer)
        elif unheard is not None and not refused:
            try:
                unheard(answer)
            except Exception:
                # One caller's defect must not cost all others the connection.
                logger.exception("A reply that came after its caller had gone is lost.")
        if refused and is_read_only(answer):
            # After a failover the address leads to another server, but this connection does not.
            self.fail(RedisConnectionError("the server has become read-only"))

    def _end_slice(self) -> None:
        self._slice += 1
        if not self._waiting:
            self._timer = None
            return
        _, _, called = self._waiting[0]
        age = self._slice - called
        if self._silence.lasts(self._answered) or age >= self._patience.most_slices:
            self.fail(RedisTimeoutError("no answer in time"))
            return
        self._timer = self._loop.call_later(self._patience.slice_s, self._end_slice)

    def fail(self, error: RedisError) -> None:
        """End the connection; every waiting call gets its own copy of the error."""
        if self.error is not None:
            return
        self.error = error
        if self._timer is not None:
            self._timer.cancel()
        if self._stream is not None:
            self._stream.transport.abort()
        else:
            self.lost.set()
            if self.opening is not None:
                self.opening.cancel()
        self._unsent.clear()
        while self._waiting:
            reply, _, _ = self._waiting.popleft()
            if not reply.done():
                reply.set_exception(type(error)(*error.args))

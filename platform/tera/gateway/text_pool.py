"""Runs long text work (parsing, templates, tokenising) in threads, fairly between tenants.

Threads and not processes: a process would have to send back up to a million token ids or thousands
of messages, and unpickling those blocks the event loop as well; vLLM's text side also takes 0.7 GB
per process. docs/decisions/0008-text-in-threads.md has the measurements.
"""

import asyncio
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from tera.errors import EngineOverloadedError

WORKERS = 2
"""Threads. Most of their work needs the GIL, so each additional thread slows down the event loop,
which may wait 5 ms for a thread to release it."""

SHORT_BYTES = 8192
"""Requests with bodies of up to this size are parsed and rendered on the event loop. The costliest,
some two hundred messages without text, takes 10 ms."""

LARGE_BYTES = 1024 * 1024
"""Larger pieces run one at a time: two at once would need twice the memory (some 100 MB to parse
10 MiB) and, because of the GIL, would be no faster."""

MOST_WAITING_BYTES = 64 * 1024 * 1024
"""Bytes of waiting texts, all of which are in memory: six of the largest, or hundreds of ordinary
long ones."""

SHORTEST_WAIT_S, LONGEST_WAIT_S = 1.0, 60.0

R = TypeVar("R")


class _Piece:
    """One piece of work of one tenant."""

    def __init__(self, tenant: str, size_bytes: int, work: Callable[[], Any]) -> None:
        self.tenant = tenant
        self.size_bytes = size_bytes
        self.work = work
        self.done: asyncio.Future[Any] = asyncio.get_running_loop().create_future()


class _Line:
    """The waiting pieces of one tenant, in order of arrival."""

    def __init__(self) -> None:
        self.pieces: dict[_Piece, None] = {}
        self.size_bytes = 0

    def add(self, piece: _Piece) -> None:
        self.pieces[piece] = None
        self.size_bytes += piece.size_bytes

    def remove(self, piece: _Piece) -> None:
        del self.pieces[piece]
        self.size_bytes -= piece.size_bytes


class TextPool:
    """A few threads that tenants use in turns.

    Waiting pieces of work start round robin over their tenants, and no tenant may occupy all the
    threads. So a piece waits for its own tenant's earlier pieces, for at most one piece of each
    other tenant, and for the pieces that are running. A waiting piece is dropped when its caller is
    cancelled; a running one cannot be stopped and keeps its thread until it ends. Only one of the
    largest pieces runs at a time.

    The bytes of waiting pieces are bounded. When there are too many, the latest piece of the tenant
    with the most is refused to make room for a tenant with fewer, as in `routing.queue`.
    """

    def __init__(
        self,
        workers: int = WORKERS,
        most_waiting_bytes: int = MOST_WAITING_BYTES,
        clock: Callable[[], float] = time.monotonic,
        executor: Executor | None = None,
    ) -> None:
        """Threads are started when there is work for them.

        Args:
            workers: pieces that run at once.
            most_waiting_bytes: of all waiting texts; a single larger one may wait alone.
            clock: monotonic seconds.
            executor: runs the pieces; by default a thread pool of its own.
        """
        self._workers = workers
        self._most_each = max(1, workers - 1)
        self._most_waiting_bytes = most_waiting_bytes
        self._clock = clock
        self._executor = executor or ThreadPoolExecutor(workers, "text")
        self._running: Counter[str] = Counter()
        """Pieces by tenant."""
        self._large_runs = False
        self._lines: OrderedDict[str, _Line] = OrderedDict()
        """By tenant; the first is the next to have a turn."""
        self._waiting_bytes = 0
        self._piece_s = 0.0
        """Moving average of how long a piece takes."""

    @property
    def waiting(self) -> int:
        """The number of waiting pieces."""
        return sum(len(line.pieces) for line in self._lines.values())

    async def run(self, tenant: str, size_bytes: int, work: Callable[[], R]) -> R:
        """Call `work` in a thread and return its result.

        Args:
            tenant: the tenant that the work is for.
            size_bytes: size of the text.
            work: must not touch anything that belongs to the event loop.

        Raises:
            EngineOverloadedError: too much is waiting already; see its `retry_after_s`.
        """
        piece = _Piece(tenant, size_bytes, work)
        if tenant not in self._lines and self._may_start(piece):
            self._start(piece)
        else:
            self._wait(piece)
        try:
            result: R = await piece.done
        finally:
            self._drop(piece)  # if the client hung up while it was waiting
        return result

    async def render(
        self, tenant: str, size_bytes: int, render: Callable[[], Coroutine[Any, Any, R]]
    ) -> R:
        """Run a coroutine in a thread with an event loop of its own; see `run`."""
        return await self.run(tenant, size_bytes, lambda: asyncio.run(render()))

    def close(self) -> None:
        """Accept no more work; running pieces are completed."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _may_start(self, piece: _Piece) -> bool:
        if self._running.total() >= self._workers or (self._large_runs and _is_large(piece)):
            return False
        return self._running[piece.tenant] < self._most_each

    def _start(self, piece: _Piece) -> None:
        loop = asyncio.get_running_loop()
        running = loop.run_in_executor(self._executor, piece.work)
        self._running[piece.tenant] += 1
        self._large_runs |= _is_large(piece)
        running.add_done_callback(partial(self._ended, piece, self._clock()))

    def _ended(self, piece: _Piece, began: float, running: asyncio.Future[Any]) -> None:
        self._piece_s += (self._clock() - began - self._piece_s) / 8
        self._running[piece.tenant] -= 1
        self._running += Counter()  # keeps those above 0
        self._large_runs &= not _is_large(piece)
        if running.cancelled():
            piece.done.cancel()
        elif (error := running.exception()) is None:
            _tell(piece, running.result())
        else:
            _fail(piece, error)
        self._start_waiting()

    def _start_waiting(self) -> None:
        """Start waiting pieces while there are threads for them."""
        while (piece := next(filter(self._may_start, self._first_ones()), None)) is not None:
            self._drop(piece)
            if piece.tenant in self._lines:
                self._lines.move_to_end(piece.tenant)
            if not piece.done.done():  # else its client has just hung up
                self._start(piece)

    def _first_ones(self) -> Iterator[_Piece]:
        return (next(iter(line.pieces)) for line in self._lines.values())

    def _wait(self, piece: _Piece) -> None:
        """Add a waiting piece; if need be, the latest one of a tenant with more is refused."""
        while self._lines and self._waiting_bytes + piece.size_bytes > self._most_waiting_bytes:
            longest = max(self._lines.values(), key=lambda line: line.size_bytes)
            mine = self._lines.get(piece.tenant)
            if longest.size_bytes <= (mine.size_bytes if mine else 0) + piece.size_bytes:
                raise self._overloaded()
            evicted = next(reversed(longest.pieces))
            self._drop(evicted)
            _fail(evicted, self._overloaded())
        self._lines.setdefault(piece.tenant, _Line()).add(piece)
        self._waiting_bytes += piece.size_bytes

    def _drop(self, piece: _Piece) -> None:
        """Remove a piece from the waiting ones, if it is among them."""
        line = self._lines.get(piece.tenant)
        if line is not None and piece in line.pieces:
            line.remove(piece)
            self._waiting_bytes -= piece.size_bytes
            if not line.pieces:
                del self._lines[piece.tenant]

    def _overloaded(self) -> EngineOverloadedError:
        wait_s = self._piece_s * self.waiting / self._workers
        wait_s = min(max(SHORTEST_WAIT_S, wait_s), LONGEST_WAIT_S)
        return EngineOverloadedError(
            f"Too many long requests are waiting here. Try again in {wait_s:.0f} s.",
            retry_after_s=wait_s,
        )


def _is_large(piece: _Piece) -> bool:
    return piece.size_bytes > LARGE_BYTES


def _tell(piece: _Piece, result: Any) -> None:
    if not piece.done.done():  # else its client has hung up
        piece.done.set_result(result)


def _fail(piece: _Piece, error: BaseException) -> None:
    if not piece.done.done():
        piece.done.set_exception(error)

"""Runs work that tenants share in turns: who may begin, who waits, and who is refused.

It knows nothing of the work but whose it is and how large. `text_pool.py` runs it in threads,
`grammars.py` in a process.
"""

import asyncio
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Final, TypeVar

from tera.errors import EngineOverloadedError

LARGE_BYTES: Final = 1024 * 1024
"""Larger pieces run one at a time: two at once would need twice the memory (some 100 MB to parse
10 MiB) and, because of the GIL, would be no faster."""

SHORTEST_WAIT_S, LONGEST_WAIT_S = 1.0, 60.0

R = TypeVar("R")


class _Piece:
    """One piece of work of one tenant."""

    def __init__(
        self, tenant: str, size_bytes: int, begin: Callable[[], asyncio.Future[Any]]
    ) -> None:
        self.tenant = tenant
        self.size_bytes = size_bytes
        self.begin = begin
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


class FairPool:
    """Places for work, which tenants use in turns.

    Waiting pieces of work start round robin over their tenants, and no tenant may occupy all the
    places. So a piece waits for its own tenant's earlier pieces, for at most one piece of each
    other tenant, and for the pieces that are running. A waiting piece is dropped when its caller is
    cancelled; a running one cannot be stopped and keeps its place until it ends. Only one of the
    largest pieces runs at a time.

    The bytes of waiting pieces are bounded. When there are too many, the latest piece of the tenant
    with the most is refused to make room for a tenant with fewer, as in `routing.queue`.
    """

    def __init__(
        self,
        places: int,
        most_waiting_bytes: int,
        what: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """A pool of `places`.

        Args:
            places: pieces that run at once.
            most_waiting_bytes: of all waiting pieces; a single larger one may wait alone.
            what: the pieces, in the error message.
            clock: monotonic seconds.
        """
        self._places = places
        self._most_each = max(1, places - 1)
        self._most_waiting_bytes = most_waiting_bytes
        self._what = what
        self._clock = clock
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

    async def run(self, tenant: str, size_bytes: int, begin: Callable[[], asyncio.Future[R]]) -> R:
        """Call `begin` once there is a place, and return the result of the work that it begins.

        Args:
            tenant: the tenant that the work is for.
            size_bytes: what it holds while it waits.
            begin: begins the work and returns its end; nobody cancels that.

        Raises:
            EngineOverloadedError: too much is waiting already; see its `retry_after_s`.
        """
        piece = _Piece(tenant, size_bytes, begin)
        if tenant not in self._lines and self._may_start(piece):
            self._start(piece)
        else:
            self._wait(piece)
        try:
            result: R = await piece.done
        finally:
            self._drop(piece)  # if the client hung up while it was waiting
        return result

    def _may_start(self, piece: _Piece) -> bool:
        if self._running.total() >= self._places or (self._large_runs and _is_large(piece)):
            return False
        return self._running[piece.tenant] < self._most_each

    def _start(self, piece: _Piece) -> None:
        running = piece.begin()
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
        """Start waiting pieces while there are places for them."""
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
        wait_s = self._piece_s * self.waiting / self._places
        wait_s = min(max(SHORTEST_WAIT_S, wait_s), LONGEST_WAIT_S)
        return EngineOverloadedError(
            f"Too many {self._what} are waiting here. Try again in {wait_s:.0f} s.",
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

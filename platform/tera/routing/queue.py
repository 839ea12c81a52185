"""The bounded queue before a model's replicas, at one gateway replica."""

from collections import deque
from collections.abc import Callable

from tera.errors import EngineOverloadedError

REMEMBERED = 64
"""Generations over which the rate is taken at which replicas take them."""
SHORTEST_WAIT_S, LONGEST_WAIT_S = 1.0, 60.0


class Place:
    """One generation's place in the queue; given up once, whatever happens to it."""

    def __init__(self, queue: "Queue") -> None:
        self._queue: Queue | None = queue

    def leave(self, *, taken: bool = False) -> None:
        """Give the place up: a replica has taken the generation, or nobody wants it any more."""
        queue, self._queue = self._queue, None
        if queue is not None:
            queue.left(taken=taken)


class Queue:
    """Generations that no replica has taken yet.

    Serve's own bound counts what is on its way to replicas too and so refuses bursts that would
    fit; this one counts what waits, and knows how fast that becomes less.
    """

    def __init__(self, most: int, clock: Callable[[], float]) -> None:
        """`clock` gives monotonic seconds."""
        self._most = most
        self._clock = clock
        self._waiting = 0
        self._taken_at: deque[float] = deque(maxlen=REMEMBERED)

    @property
    def waiting(self) -> int:
        """How many wait now."""
        return self._waiting

    def enter(self) -> Place:
        """Return a place in the queue.

        Raises:
            EngineOverloadedError: it is full; `retry_after_s` is when a place should be free.
        """
        if self._waiting >= self._most:
            wait_s = self._wait_s()
            raise EngineOverloadedError(
                f"The model is overloaded: {self._waiting} requests wait for it here. "
                f"Try again in {wait_s:.0f} s.",
                retry_after_s=wait_s,
            )
        self._waiting += 1
        return Place(self)

    def left(self, *, taken: bool) -> None:
        """Take note that a place was given up; see `Place.leave`."""
        self._waiting -= 1
        if taken:
            self._taken_at.append(self._clock())

    def _wait_s(self) -> float:
        """Return how long half of the queue should take: then there is room for a burst."""
        if len(self._taken_at) < 2:
            return LONGEST_WAIT_S if self._taken_at else SHORTEST_WAIT_S
        # To now and not to the last one: if nothing has been taken lately, the rate falls.
        each_s = (self._clock() - self._taken_at[0]) / len(self._taken_at)
        return min(max(SHORTEST_WAIT_S, each_s * self._most / 2), LONGEST_WAIT_S)

"""The bounded queue in front of a model's replicas, in one gateway replica."""

import asyncio
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tera.errors import EngineOverloadedError

REMEMBERED = 64
"""How many recent generations are used to estimate the rate at which replicas accept them."""
SHORTEST_WAIT_S, LONGEST_WAIT_S = 1.0, 60.0


class Place:
    """One generation's place in the queue; it is given up exactly once."""

    def __init__(self, queue: "Queue", tenant: str) -> None:
        self._queue: Queue | None = queue
        self.tenant = tenant
        self._eviction: EngineOverloadedError | None = None
        self._waiter: asyncio.Task[object] | None = None

    def leave(self, *, taken: bool = False) -> None:
        """Give the place up: a replica has accepted the generation, or it is no longer wanted."""
        queue, self._queue = self._queue, None
        if queue is not None:
            queue.left(self, taken=taken)

    def evict(self, error: EngineOverloadedError) -> None:
        """Take the place away for another tenant's generation."""
        self.leave()
        self._eviction = error
        if self._waiter is not None:
            self._waiter.cancel()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Run the block, which waits, while the place is kept.

        Raises:
            EngineOverloadedError: it was taken away.
        """
        if self._eviction is not None:
            raise self._eviction
        task = self._waiter = asyncio.current_task()
        assert task is not None
        try:
            yield
        except asyncio.CancelledError:
            # Ours only if nobody else cancelled too, such as for a client that hung up.
            if self._eviction is not None and task.uncancel() == 0:
                raise self._eviction from None
            raise
        finally:
            self._waiter = None


class Queue:
    """Generations that no replica has accepted yet.

    Serve's own bound also counts what is on its way to replicas, and so refuses bursts that would
    fit. This one counts only what waits, and knows how fast the queue shrinks.

    One tenant's flood does not shut others out: in a full queue, the tenant with the most
    generations loses its latest one to a tenant with fewer (longest queue drop, Suter, Lakshman,
    Stiliadis and Choudhury, 1998).
    """

    def __init__(self, most: int, clock: Callable[[], float]) -> None:
        """`clock` gives monotonic seconds."""
        self._most = most
        self._clock = clock
        self._places: dict[str, dict[Place, None]] = {}
        """By tenant, in order of arrival."""
        self._waiting = 0
        self._taken_at: deque[float] = deque(maxlen=REMEMBERED)

    @property
    def waiting(self) -> int:
        """How many generations wait now."""
        return self._waiting

    def enter(self, tenant: str) -> Place:
        """Return a place in the queue.

        Raises:
            EngineOverloadedError: it is full; `retry_after_s` is when a place should be free.
        """
        if self._waiting >= self._most:
            longest = max(self._places.values(), key=len)
            if len(longest) <= len(self._places.get(tenant, ())) + 1:
                raise self._overloaded()
            next(reversed(longest)).evict(self._overloaded())
        place = Place(self, tenant)
        self._places.setdefault(tenant, {})[place] = None
        self._waiting += 1
        return place

    def _overloaded(self) -> EngineOverloadedError:
        wait_s = self._wait_s()
        return EngineOverloadedError(
            f"The model is overloaded: {self._waiting} requests wait for it here. "
            f"Try again in {wait_s:.0f} s.",
            retry_after_s=wait_s,
        )

    def left(self, place: Place, *, taken: bool) -> None:
        """Record that a place was given up; see `Place.leave`."""
        places = self._places[place.tenant]
        del places[place]
        if not places:
            del self._places[place.tenant]
        self._waiting -= 1
        if taken:
            self._taken_at.append(self._clock())

    def _wait_s(self) -> float:
        """Return how long half of the queue should take, after which there is room for a burst."""
        if len(self._taken_at) < 2:
            return LONGEST_WAIT_S if self._taken_at else SHORTEST_WAIT_S
        # Up to now, not up to the last one: if none was accepted lately, the rate falls.
        each_s = (self._clock() - self._taken_at[0]) / len(self._taken_at)
        return min(max(SHORTEST_WAIT_S, each_s * self._most / 2), LONGEST_WAIT_S)

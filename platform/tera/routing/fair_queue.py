"""Decides whose turn it is: tenants share replicas by tokens, not by how much they ask for."""

import heapq
import itertools
from collections.abc import Callable
from typing import Generic, TypeVar

Item = TypeVar("Item")


class FairQueue(Generic[Item]):
    """Start-time fair queueing between tenants (Goyal, Vin and Cheng, 1996).

    An item's tag is the point at which its tenant's earlier items end, on a clock of tokens served;
    the item with the lowest tag is next. So a tenant with one request waits for at most one
    request of each other tenant.
    """

    def __init__(self, wanted: Callable[[Item], bool]) -> None:
        """`wanted` says whether an item is still waiting; one that is not is skipped."""
        self._wanted = wanted
        self._heap: list[tuple[float, int, Item]] = []
        self._numbers = itertools.count()
        self._clock = 0.0
        self._ends: dict[str, float] = {}

    def push(self, tenant: str, tokens: float, item: Item) -> None:
        """Queue an item behind its tenant's others; `tokens` is its largest cost, weighted."""
        # Never before the clock: a tenant that was idle has saved up nothing.
        start = max(self._clock, self._ends.get(tenant, 0.0))
        self._ends[tenant] = start + tokens
        heapq.heappush(self._heap, (start, next(self._numbers), item))

    def push_front(self, item: Item) -> None:
        """Put back an item whose turn was in vain."""
        # A negative number sorts before every other item with the same tag.
        heapq.heappush(self._heap, (self._clock, -next(self._numbers), item))

    def first(self) -> Item | None:
        """Return the item whose turn it is; None if none waits."""
        while self._heap:
            item = self._heap[0][2]
            if self._wanted(item):
                return item
            heapq.heappop(self._heap)
        # The queue is empty, so no tenant is behind or ahead any more: start afresh.
        self._ends.clear()
        return None

    def pop(self) -> None:
        """Remove the first item."""
        start, _, _ = heapq.heappop(self._heap)
        self._clock = max(self._clock, start)

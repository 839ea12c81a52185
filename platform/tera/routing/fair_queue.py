"""Whose turn it is: tenants share what is scarce by tokens, not by how much they ask for."""

import heapq
import itertools
from collections.abc import Callable
from typing import Generic, TypeVar

Item = TypeVar("Item")


class FairQueue(Generic[Item]):
    """Start-time fair queueing between tenants (Goyal, Vin and Cheng, 1996).

    An item's tag is where its tenant's earlier items end on a clock of tokens served, and the
    lowest tag is next. A tenant with one request waits for no more than one of each other tenant's.
    """

    def __init__(self, wanted: Callable[[Item], bool]) -> None:
        """`wanted` says whether an item still waits; one that does not is passed over."""
        self._wanted = wanted
        self._heap: list[tuple[float, int, Item]] = []
        self._numbers = itertools.count()
        self._clock = 0.0
        self._ends: dict[str, float] = {}

    def push(self, tenant: str, tokens: float, item: Item) -> None:
        """Put an item behind its tenant's others; `tokens` is what it may cost, weighted."""
        start = max(self._clock, self._ends.get(tenant, 0.0))
        self._ends[tenant] = start + tokens
        heapq.heappush(self._heap, (start, next(self._numbers), item))

    def push_front(self, item: Item) -> None:
        """Put an item back that has had its turn in vain."""
        heapq.heappush(self._heap, (self._clock, -next(self._numbers), item))

    def first(self) -> Item | None:
        """Return whose turn it is; None if nobody waits."""
        while self._heap:
            item = self._heap[0][2]
            if self._wanted(item):
                return item
            heapq.heappop(self._heap)
        # Nobody is owed anything any more.
        self._ends.clear()
        return None

    def pop(self) -> None:
        """Take the first item out."""
        start, _, _ = heapq.heappop(self._heap)
        self._clock = max(self._clock, start)

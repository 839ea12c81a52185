"""Decides whose turn it is: tenants share replicas by tokens, not by how much they ask for."""

import itertools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Item = TypeVar("Item")


@dataclass(slots=True, frozen=True)
class _Entry:
    tokens: float
    arrived: float
    """On the clock of tokens served."""
    number: int


@dataclass(slots=True)
class _Line(Generic[Item]):
    """One tenant's items, in order, and the point at which those that were served end."""

    end: float = 0.0
    entries: dict[Item, _Entry] = field(default_factory=dict)

    def first(self) -> tuple[Item, _Entry]:
        return next(iter(self.entries.items()))

    def start(self) -> tuple[float, int]:
        """Return the first item's tag; of equal ones, the item that came first goes first."""
        _, entry = self.first()
        return max(self.end, entry.arrived), entry.number


class FairQueue(Generic[Item]):
    """Start-time fair queueing between tenants (Goyal, Vin and Cheng, 1996).

    An item's tag is the point at which its tenant's earlier items end, on a clock of tokens served;
    the item with the lowest tag is next. So a tenant with one request waits for at most one
    request of each other tenant.

    Only an item that had its turn moves its tenant's later ones back: tags are computed when they
    are compared, so an item that gives up leaves nothing behind.
    """

    def __init__(self, wanted: Callable[[Item], bool]) -> None:
        """`wanted` says whether an item is still waiting; one that is not is skipped."""
        self._wanted = wanted
        self._again: deque[Item] = deque()
        """Items whose turn was in vain."""
        self._lines: dict[str, _Line[Item]] = {}
        """By tenant; only tenants that have items, or are ahead of the clock."""
        self._turn: _Line[Item] | None = None
        """Whose turn it is, as `first` has found."""
        self._numbers = itertools.count()
        self._clock = 0.0

    def __len__(self) -> int:
        """How many items are kept, including unwanted ones that are not removed yet."""
        return len(self._again) + sum(len(line.entries) for line in self._lines.values())

    def push(self, tenant: str, tokens: float, item: Item) -> None:
        """Queue an item behind its tenant's others; `tokens` is its largest cost, weighted."""
        # Never before the clock: a tenant that was idle has saved up nothing.
        line = self._lines.setdefault(tenant, _Line())
        line.entries[item] = _Entry(tokens, self._clock, next(self._numbers))

    def push_front(self, item: Item) -> None:
        """Put back an item whose turn was in vain."""
        self._again.appendleft(item)

    def remove(self, tenant: str, item: Item) -> None:
        """Remove an item that gives up, if it is still there; its tokens do not count."""
        line = self._lines.get(tenant)
        if line is not None:
            line.entries.pop(item, None)
            if self._is_over(line):
                del self._lines[tenant]
        if item in self._again:
            self._again.remove(item)

    def first(self) -> Item | None:
        """Return the item whose turn it is; None if none waits."""
        while self._again:
            if self._wanted(self._again[0]):
                return self._again[0]
            self._again.popleft()
        self._turn = self._next()
        if self._turn is not None:
            return self._turn.first()[0]
        # The queue is empty, so no tenant is behind or ahead any more: start afresh.
        self._lines.clear()
        return None

    def pop(self) -> None:
        """Remove the item that `first` has just returned: it has its turn."""
        if self._again:
            self._again.popleft()
            return
        line = self._turn  # as found: by now the item may no longer be wanted
        assert line is not None
        item, entry = line.first()
        start, _ = line.start()
        del line.entries[item]
        self._clock, line.end = start, start + entry.tokens
        # Forget tenants that are not ahead and have nothing waiting.
        for tenant in [each for each, it in self._lines.items() if self._is_over(it)]:
            del self._lines[tenant]

    def _is_over(self, line: _Line[Item]) -> bool:
        return not line.entries and line.end <= self._clock

    def _next(self) -> _Line[Item] | None:
        """Return the line whose first item is next; items that no longer wait are dropped."""
        best: _Line[Item] | None = None
        # A scan: a heap would have to be rebuilt for each item that gives up.
        for line in self._lines.values():
            while line.entries and not self._wanted(item := line.first()[0]):
                del line.entries[item]
            if line.entries and (best is None or line.start() < best.start()):
                best = line
        return best

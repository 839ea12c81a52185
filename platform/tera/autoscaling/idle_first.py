"""Which replicas a scale-down takes: those that run nothing before those that are busy."""

import sys
from bisect import bisect_left
from collections.abc import Callable, Set
from typing import TypeVar

R = TypeVar("R")


def idle_first(taken: Callable[[int], set[R]], count: int, busy: Set[R]) -> set[R]:
    """Return so many replicas: idle ones, then busy ones, both in the order of another choice.

    Args:
        taken: that choice of so many, of all if there are less; it grows by one with its argument,
            which shows its order and is at least 1.
        count: at least 1.
        busy: replicas that are to come last, and perhaps others.
    """
    chosen = taken(count)
    if busy.isdisjoint(chosen):
        return chosen
    everyone = taken(sys.maxsize)

    def first(number: int, of: Set[R]) -> set[R]:
        enough = bisect_left(
            range(len(everyone)), number, lo=number, key=lambda size: len(taken(size) & of)
        )
        return taken(enough) & of

    idle = everyone - busy
    if len(idle) >= count:
        return first(count, idle)
    return idle | first(count - len(idle), busy)

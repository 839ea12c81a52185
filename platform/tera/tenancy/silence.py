"""Tells whether Redis is silent, or this process was just not able to hear it.

Time is divided into slices. Redis counts as away if it leaves calls unanswered for some slices in
which this process was able to read. A slice that ends late does not count: the process was busy and
the answer may be waiting for it. Nor does a slice in which this thread had to wait for a CPU: a
Redis on this machine probably had to as well. A slice in which a call was answered restarts the
count.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

SCHEDULER_STATISTICS: Final = Path("/proc/thread-self/schedstat")


@dataclass(frozen=True, slots=True)
class Patience:
    """How long Redis may leave a call unanswered."""

    slice_s: float = 0.025
    slices: int = 3
    """75 ms; including the slice in which the call was made, never more than 100 ms."""
    most_slices: int = 40
    """A call never waits longer than this, whether the slices count or not."""

    @property
    def late_s(self) -> float:
        """How late a slice may end and still count."""
        return self.slice_s / 2

    @property
    def starved_s(self) -> float:
        """A longer wait for a CPU in a slice means an overloaded machine; normal is 0.1 ms."""
        return self.slice_s / 5


def waited_for_cpu_s() -> float:
    """Return how long this thread has waited for a CPU in all; 0 unless on Linux."""
    try:
        return int(SCHEDULER_STATISTICS.read_bytes().split()[1]) / 1e9
    except OSError:
        return 0.0


class Silence:
    """Counts consecutive slices in which Redis could have been heard but was not."""

    def __init__(
        self,
        patience: Patience,
        clock: Callable[[], float],
        waited_for_cpu_s: Callable[[], float] = waited_for_cpu_s,
    ) -> None:
        """Start without a current slice.

        Args:
            patience: how long a slice is, and how many are too many.
            clock: seconds; it decides when slices begin and end.
            waited_for_cpu_s: returns how long this thread has waited for a CPU in all.
        """
        self._patience = patience
        self._clock = clock
        self._waited_for_cpu_s = waited_for_cpu_s
        self._due = self._starved_s = 0.0
        self._answered = self._silent = 0

    def begin(self, answered: int) -> None:
        """Start counting, with a first slice.

        Args:
            answered: how many calls have been answered so far.
        """
        self._silent = 0
        self._begin_slice(answered)

    def lasts(self, answered: int) -> bool:
        """End a slice and start the next; return whether Redis has been silent for too long."""
        if answered != self._answered:
            self._silent = 0
        elif self._was_there():
            self._silent += 1
        self._begin_slice(answered)
        return self._silent >= self._patience.slices

    def _was_there(self) -> bool:
        late_s = self._clock() - self._due
        starved_s = self._waited_for_cpu_s() - self._starved_s
        return late_s < self._patience.late_s and starved_s < self._patience.starved_s

    def _begin_slice(self, answered: int) -> None:
        self._answered = answered
        self._due = self._clock() + self._patience.slice_s
        self._starved_s = self._waited_for_cpu_s()

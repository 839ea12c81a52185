"""Whether Redis is silent, or only this process was not there to hear it.

Time goes by in slices. Redis counts as away when it leaves calls unanswered for some slices in
which this process was there to read. A slice that ends late does not count, for then the process
was busy and the answer may be waiting for it; nor one in which this thread had to wait for a CPU,
for then a Redis on this machine had to as well; and one in which a call was answered begins the
count anew.
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
    """75 ms; with the slice in which the call came it is never more than 100 ms."""
    most_slices: int = 40
    """A call waits for no more of them, whether they count or not."""

    @property
    def late_s(self) -> float:
        """How late the end of a slice may be, and still this process was there."""
        return self.slice_s / 2

    @property
    def starved_s(self) -> float:
        """Wait for a CPU in one slice above which the machine is overloaded; else it is 0.1 ms."""
        return self.slice_s / 5


def waited_for_cpu_s() -> float:
    """Return how long this thread has been ready to run and without a CPU; 0 where Linux is not."""
    try:
        return int(SCHEDULER_STATISTICS.read_bytes().split()[1]) / 1e9
    except OSError:
        return 0.0


class Silence:
    """Counts the slices in a row in which Redis could have been heard, and was not."""

    def __init__(
        self,
        patience: Patience,
        clock: Callable[[], float],
        waited_for_cpu_s: Callable[[], float] = waited_for_cpu_s,
    ) -> None:
        """Begin with no slice under way.

        Args:
            patience: how long a slice is, and how many are too many.
            clock: seconds, by which slices begin and end.
            waited_for_cpu_s: seconds in all that this thread was kept from running.
        """
        self._patience = patience
        self._clock = clock
        self._waited_for_cpu_s = waited_for_cpu_s
        self._due = self._starved_s = 0.0
        self._answered = self._silent = 0

    def begin(self, answered: int) -> None:
        """Begin to count, and a first slice.

        Args:
            answered: how many calls have been answered up to now.
        """
        self._silent = 0
        self._begin_slice(answered)

    def lasts(self, answered: int) -> bool:
        """End a slice and begin the next; return whether Redis has been silent for too long."""
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

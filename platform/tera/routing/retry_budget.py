"""Bounds how much of a model's traffic may be retries, so that an outage is not multiplied."""

RETRIES_PER_GENERATION = 0.2
"""Retries stay below this fraction of the traffic."""
FIRST_BALANCE = 10.0
"""A model with little traffic may still retry a few times."""
LARGEST_BALANCE = 100.0
"""Bounds what hours of health save up: otherwise an outage would begin with everything sent three
times."""


class RetryBudget:
    """A token bucket that generations fill and retries empty; it needs no clock."""

    def __init__(self) -> None:
        self._balance = FIRST_BALANCE

    def earn(self) -> None:
        """Add a new generation's contribution."""
        self._balance = min(self._balance + RETRIES_PER_GENERATION, LARGEST_BALANCE)

    @property
    def affords_one(self) -> bool:
        """Whether another retry is paid for."""
        return self._balance >= 1

    def spend(self) -> None:
        """Pay for a retry."""
        self._balance -= 1

import pytest

from tera.routing.retry_budget import (
    FIRST_BALANCE,
    LARGEST_BALANCE,
    RETRIES_PER_GENERATION,
    RetryBudget,
)


def spent(budget: RetryBudget) -> int:
    """Return for how many retries it pays until it is empty."""
    retries = 0
    while budget.affords_one:
        budget.spend()
        retries += 1
    return retries


def test_b1_a_model_without_traffic_has_a_few_retries() -> None:
    assert spent(RetryBudget()) == FIRST_BALANCE


@pytest.mark.parametrize("generations", [5, 50, 400])
def test_b1_retries_are_a_fifth_of_the_traffic(generations: int) -> None:
    budget = RetryBudget()
    spent(budget)
    for _ in range(generations):
        budget.earn()
    assert spent(budget) == pytest.approx(generations * RETRIES_PER_GENERATION, abs=1)


def test_b1_health_saves_up_so_much_and_no_more() -> None:
    budget = RetryBudget()
    for _ in range(100_000):
        budget.earn()
    assert spent(budget) == LARGEST_BALANCE


def test_b1_an_outage_is_multiplied_by_a_fifth_at_most() -> None:
    budget = RetryBudget()
    spent(budget)
    retries = 0
    for _ in range(1000):
        budget.earn()
        retries += spent(budget)
    assert retries <= 1000 * RETRIES_PER_GENERATION

from __future__ import annotations

from datetime import UTC, datetime
from itertools import accumulate
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tera.config.limits import Limits
from tera.tenancy.limits import Allowance, Kind, Refusal, Scope, Spent
from tera.tenancy.local_limits import LocalLimiter

SECOND_US = 1_000_000
MINUTE_US = 60 * SECOND_US
EVERY_LIMIT = ("requests_per_minute", "tokens_per_minute", "concurrent_requests", "token_budget")


class Clock:
    """Microseconds that only the test moves; it begins on 2027-01-15 at 08:00 UTC."""

    def __init__(self) -> None:
        self.now_us = 1_800_000_000 * SECOND_US

    def __call__(self) -> int:
        return self.now_us


@pytest.fixture
def clock_us() -> Clock:
    return Clock()


@pytest.fixture
def limiter(clock_us: Clock) -> LocalLimiter:
    return LocalLimiter(clock_us)


def tenant(**limits: Any) -> list[Scope]:
    return [Scope("tenant", Limits(**limits))]


def burst(limiter: LocalLimiter, scopes: list[Scope], *, replicas: int, tokens: int = 1) -> int:
    """Return how many of many requests pass at once."""
    answers = [
        limiter.admit("acme", f"req-{number}", scopes, tokens, replicas=replicas)
        for number in range(300)
    ]
    return sum(answer.refusal is None for answer in answers)


@pytest.mark.parametrize("name", EVERY_LIMIT)
@pytest.mark.parametrize(
    ("limit", "replicas", "passed"),
    [
        pytest.param(100, 1, 100, id="alone"),
        pytest.param(100, 4, 25, id="a-quarter"),
        pytest.param(98, 49, 2, id="no-rounding-by-halves"),
        pytest.param(10, 4, 2, id="together-no-more-than-the-limit"),
        pytest.param(1, 4, 1, id="one-at-least"),
        pytest.param(0, 4, 0, id="a-block-is-no-share"),
    ],
)
def test_l8_a_replica_admits_its_share(
    limiter: LocalLimiter, name: str, limit: int, replicas: int, passed: int
) -> None:
    assert burst(limiter, tenant(**{name: limit}), replicas=replicas) == passed


@pytest.mark.parametrize(
    ("name", "kind", "told"),
    [
        pytest.param("tokens_per_minute", "tokens", 25, id="tokens"),
        pytest.param("token_budget", "budget", 100, id="budget"),
    ],
)
def test_l8_what_only_a_share_refuses_may_be_tried_again(
    limiter: LocalLimiter, name: str, kind: Kind, told: int
) -> None:
    scopes = tenant(**{name: 100})
    share = limiter.admit("acme", "req_1", scopes, 30, replicas=4).refusal
    assert share == Refusal(kind, "tenant", told, SECOND_US, 30)
    whole = limiter.admit("acme", "req_1", scopes, 101, replicas=4).refusal
    assert whole == Refusal(kind, "tenant", told, None, 101)


class TestKnownBudgets:
    """What Redis told of budgets before it went away."""

    @pytest.mark.parametrize(
        ("used", "held", "passed", "wait_us"),
        [
            pytest.param(0, 0, 25, SECOND_US, id="unused"),
            pytest.param(60, 0, 10, SECOND_US, id="a-quarter-of-the-rest"),
            pytest.param(60, 20, 5, SECOND_US, id="what-is-held-may-be-used"),
            pytest.param(0, 100, 0, SECOND_US, id="all-held-may-come-back"),
            pytest.param(98, 0, 1, SECOND_US, id="one-at-least"),
            pytest.param(100, 0, 0, None, id="used-up"),
            pytest.param(170, 0, 0, None, id="more-than-used-up"),
        ],
    )
    def test_l8_a_replica_admits_its_share_of_the_rest(
        self, limiter: LocalLimiter, used: int, held: int, passed: int, wait_us: int | None
    ) -> None:
        scopes = tenant(token_budget=100)
        limiter.know("acme", [Spent("tenant", "2027-01", used, held)])
        assert burst(limiter, scopes, replicas=4) == passed
        refusal = limiter.admit("acme", "req_last", scopes, 1, replicas=4).refusal
        assert refusal == Refusal("budget", "tenant", 100, wait_us, 1)

    def test_they_are_of_one_tenant_scope_and_period(
        self, limiter: LocalLimiter, clock_us: Clock
    ) -> None:
        limiter.know("acme", [Spent("tenant", "2027-01-15", 100, 0)])
        day, month = (tenant(token_budget=100, budget_period=each) for each in ("day", "month"))
        assert limiter.admit("acme", "req_1", day, 1).refusal is not None
        assert limiter.admit("acme", "req_2", month, 1).refusal is None
        assert limiter.admit("other", "req_3", day, 1).refusal is None
        of_key = [Scope("key:k", Limits(token_budget=100, budget_period="day"))]
        assert limiter.admit("acme", "req_4", of_key, 1).refusal is None
        clock_us.now_us += 24 * 60 * MINUTE_US
        assert limiter.admit("acme", "req_5", day, 1).refusal is None

    def test_what_was_used_here_counts_until_redis_has_been_told(
        self, limiter: LocalLimiter
    ) -> None:
        scopes = tenant(token_budget=100)
        limiter.know("acme", [Spent("tenant", "2027-01", 40, 0)])
        assert limiter.admit("acme", "req_1", scopes, 60).refusal is None
        limiter.settle("acme", "req_1", 50)
        assert limiter.admit("acme", "req_2", scopes, 11).refusal is not None
        limiter.know("acme", [Spent("tenant", "2027-01", 90, 0)])
        answer = limiter.admit("acme", "req_3", scopes, 10)
        assert (answer.refusal, answer.budgets) == (None, (Spent("tenant", "2027-01", 90, 10),))


def test_l8_figures_are_of_the_share(limiter: LocalLimiter) -> None:
    scopes = tenant(requests_per_minute=60, tokens_per_minute=6000)
    answer = limiter.admit("acme", "req_1", scopes, 1000, replicas=2)
    assert answer.requests == Allowance(30, 29, 2 * SECOND_US)
    assert answer.tokens == Allowance(3000, 2000, 20 * SECOND_US)


def test_settling_charges_once_what_was_used(limiter: LocalLimiter) -> None:
    scopes = tenant(tokens_per_minute=100, token_budget=200, concurrent_requests=1)
    assert limiter.admit("acme", "req_1", scopes, 100).refusal is None
    assert limiter.settle("acme", "req_1", 30)
    assert not limiter.settle("acme", "req_1", 30)
    assert not limiter.settle("nobody", "req_1", 30)
    answer = limiter.admit("acme", "req_2", scopes, 70)
    assert (answer.refusal, answer.tokens) == (None, Allowance(100, 0, MINUTE_US))


def test_tenants_do_not_count_for_each_other(limiter: LocalLimiter) -> None:
    scopes = tenant(requests_per_minute=1)
    assert limiter.admit("acme", "req_1", scopes, 1).refusal is None
    assert limiter.admit("other", "req_2", scopes, 1).refusal is None
    assert limiter.admit("acme", "req_3", scopes, 1).refusal is not None


def test_a_budget_returns_with_the_next_day(limiter: LocalLimiter, clock_us: Clock) -> None:
    scopes = tenant(token_budget=10, budget_period="day")
    assert limiter.admit("acme", "req_1", scopes, 10).refusal is None
    clock_us.now_us = round(datetime(2027, 1, 16, tzinfo=UTC).timestamp()) * SECOND_US - 1
    assert limiter.admit("acme", "req_2", scopes, 10).refusal is not None
    clock_us.now_us += 1
    assert limiter.admit("acme", "req_2", scopes, 10).refusal is None


def test_tenants_of_whom_nothing_is_owed_are_forgotten_and_no_others(
    limiter: LocalLimiter, clock_us: Clock
) -> None:
    fast, slow = tenant(requests_per_minute=60), tenant(token_budget=100)
    assert limiter.admit("running", "req", fast, 1).refusal is None
    assert limiter.admit("budget", "req", slow, 100).refusal is None
    limiter.settle("budget", "req", 100)
    for number in range(1000):
        limiter.admit(f"tenant-{number}", "req", fast, 1)
        limiter.settle(f"tenant-{number}", "req", 1)
        clock_us.now_us += SECOND_US
    assert limiter.tenants < 200
    assert limiter.settle("running", "req", 1)
    assert limiter.admit("budget", "req_2", slow, 1).refusal is not None


@settings(max_examples=100, deadline=None)
@given(
    limit=st.integers(1, 200),
    arrivals=st.lists(st.integers(0, 5 * SECOND_US), min_size=1, max_size=150),
)
def test_requests_of_any_interval_are_within_the_limit_and_what_drains_in_it(
    limit: int, arrivals: list[int]
) -> None:
    clock_us = Clock()
    limiter = LocalLimiter(clock_us)
    scopes = tenant(requests_per_minute=limit)
    passed: list[int] = []
    for number, gap_us in enumerate(arrivals):
        clock_us.now_us += gap_us
        if limiter.admit("acme", f"req-{number}", scopes, 1).refusal is None:
            passed.append(clock_us.now_us)
    for first, began_us in enumerate(passed):
        for last in range(first, len(passed)):
            allowed = limit * (MINUTE_US + passed[last] - began_us)
            assert (last - first + 1) * MINUTE_US <= allowed


@settings(max_examples=100, deadline=None)
@given(
    limit=st.integers(1, 1000),
    requests=st.lists(
        st.tuples(
            st.integers(0, 5 * SECOND_US),
            st.integers(1, 300),
            st.floats(0, 1),
            st.integers(0, 10 * SECOND_US),
        ),
        min_size=1,
        max_size=60,
    ),
)
def test_tokens_used_in_any_interval_are_within_the_limit_and_what_drains_in_it(
    limit: int, requests: list[tuple[int, int, float, int]]
) -> None:
    clock_us = Clock()
    limiter = LocalLimiter(clock_us)
    scopes = tenant(tokens_per_minute=limit)
    arrivals = accumulate(gap_us for gap_us, *_ in requests)
    begins = [(clock_us() + at, 1, number) for number, at in enumerate(arrivals)]
    ends = [(at + requests[number][3], 0, number) for at, _, number in begins]
    used: list[tuple[int, int]] = []
    for at, begin, number in sorted(begins + ends):
        clock_us.now_us = at
        _, tokens, ratio, _ = requests[number]
        if begin:
            limiter.admit("acme", f"req-{number}", scopes, tokens)
        elif limiter.settle("acme", f"req-{number}", int(tokens * ratio)):
            used.append((at, int(tokens * ratio)))
    for first, (began_us, _) in enumerate(used):
        total = 0
        for at, tokens in used[first:]:
            total += tokens
            assert total * MINUTE_US <= limit * (MINUTE_US + at - began_us)

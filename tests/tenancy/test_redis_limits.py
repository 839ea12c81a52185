from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import pytest
from tests.tenancy.limiting import (
    EVERY_LIMIT,
    SECOND_US,
    admitted,
    everything,
    ledger,
    moved,
    record,
    refused,
    tenant,
)

from tera.config.limits import LARGEST_LIMIT, Limits
from tera.tenancy.limits import MOST, Admission, Allowance, Refusal, Scope
from tera.tenancy.local_limits import LocalLimiter
from tera.tenancy.redis_limits import RedisLimiter
from tera.tenancy.usage import UsageLedger

if TYPE_CHECKING:
    from redis.asyncio import Redis

DAY_US = 86_400 * SECOND_US

BLOCKERS = [
    pytest.param({"requests_per_minute": 1}, 10, "requests", id="requests"),
    pytest.param({"tokens_per_minute": 15}, 10, "tokens", id="tokens-held"),
    pytest.param({"tokens_per_minute": 9}, 10, "tokens", id="tokens-for-ever"),
    pytest.param({"concurrent_requests": 1}, 10, "concurrency", id="concurrency"),
    pytest.param({"token_budget": 15}, 10, "budget", id="budget-held"),
    pytest.param({"token_budget": 9}, 10, "budget", id="budget-for-ever"),
    pytest.param({"requests_per_minute": 0}, 10, "requests", id="no-requests"),
    pytest.param({"tokens_per_minute": 0}, 10, "tokens", id="no-tokens"),
    pytest.param({"concurrent_requests": 0}, 10, "concurrency", id="no-concurrency"),
    pytest.param({"token_budget": 0, "budget_period": "day"}, 10, "budget", id="no-budget"),
]


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize(("blocking", "tokens", "kind"), BLOCKERS)
async def test_l2_a_refused_request_has_spent_nothing(
    redis: Redis,
    limiter: RedisLimiter,
    blocking: dict[str, Any],
    tokens: int,
    kind: str,
    place: int,
) -> None:
    names = ["tenant", "model:llama-8b", "key:key_1"]
    wide = [Scope(name, Limits(**EVERY_LIMIT)) for name in names]
    narrow = list(wide)
    narrow[place] = Scope(names[place], Limits(**{**EVERY_LIMIT, **blocking}))
    await admitted(limiter, "first", wide, tokens)
    moved(limiter, 1000)
    before = await everything(redis)
    answer = await limiter.admit("acme", "second", narrow, tokens, record("second"))
    assert answer.refusal is not None
    assert (answer.refusal.kind, answer.refusal.scope) == (kind, names[place])
    assert await everything(redis) == before
    # Neither has a tenant that was never seen.
    assert (await limiter.admit("nobody", "third", tenant(requests_per_minute=0), 1, b"{}")).refusal
    assert await everything(redis) == before


async def test_the_longest_wait_is_told_and_for_ever_is_longest(limiter: RedisLimiter) -> None:
    await admitted(limiter, "first", tenant(requests_per_minute=6, tokens_per_minute=60), 60)
    await limiter.settle("acme", "first", 60, record())
    slow = tenant(requests_per_minute=1, tokens_per_minute=60, concurrent_requests=1)
    await admitted(limiter, "open", tenant(concurrent_requests=1))
    waiting = await refused(limiter, slow, 10)
    assert (waiting.kind, waiting.wait_us) == ("requests", 60 * SECOND_US)
    for_ever = await refused(limiter, [*slow, Scope("key:k", Limits(tokens_per_minute=9))], 10)
    assert (for_ever.kind, for_ever.scope, for_ever.limit) == ("tokens", "key:k", 9)
    assert for_ever.wait_us is None
    # Of two alike it is the first.
    both = [*tenant(concurrent_requests=1), Scope("key:k", Limits(concurrent_requests=0))]
    await admitted(limiter, "other", [Scope("key:k", Limits(concurrent_requests=1))])
    assert (await refused(limiter, both)).scope == "key:k"
    both[1] = Scope("key:k", Limits(concurrent_requests=1))
    assert (await refused(limiter, both)).scope == "tenant"


async def test_a_request_that_is_admitted_again_while_it_is_open_spends_nothing_more(
    redis: Redis, limiter: RedisLimiter
) -> None:
    scopes = tenant(requests_per_minute=1, concurrent_requests=1, token_budget=10)
    first = await admitted(limiter, "req_1", scopes, 10)
    before = await everything(redis)
    assert await admitted(limiter, "req_1", scopes, 10) == first
    assert await everything(redis) == before


# What is told


async def test_l5_figures_are_of_the_scope_with_the_least_part_remaining(
    limiter: RedisLimiter,
) -> None:
    scopes = [
        Scope("tenant", Limits(requests_per_minute=60, tokens_per_minute=6000)),
        Scope("key:key_1", Limits(requests_per_minute=10, tokens_per_minute=60_000)),
    ]
    answer = await admitted(limiter, "req_1", scopes, 3000)
    assert answer.requests == Allowance(limit=10, remaining=9, reset_us=6 * SECOND_US)
    assert answer.tokens == Allowance(limit=6000, remaining=3000, reset_us=30 * SECOND_US)


async def test_l5_a_refusal_tells_the_figures_too(limiter: RedisLimiter) -> None:
    await admitted(limiter, "req_1", tenant(requests_per_minute=1, tokens_per_minute=100), 40)
    answer = await limiter.admit(
        "acme", "req_2", tenant(requests_per_minute=1, tokens_per_minute=100), 10, record()
    )
    assert answer == Admission(
        requests=Allowance(1, 0, 60 * SECOND_US),
        tokens=Allowance(100, 60, 24 * SECOND_US),
        refusal=Refusal("requests", "tenant", 1, 60 * SECOND_US, 10),
    )


async def test_l5_there_are_no_figures_without_a_limit(limiter: RedisLimiter) -> None:
    answer = await admitted(limiter, "req_1", tenant(concurrent_requests=1, token_budget=10))
    assert (answer.requests, answer.tokens) == (None, None)
    assert await admitted(limiter, "req_2", []) == Admission(None, None)


@pytest.mark.parametrize(
    ("limit", "used", "tokens"),
    [
        pytest.param(60, 60, 1, id="round"),
        pytest.param(7, 7, 1, id="a-prime"),
        pytest.param(7, 5, 6, id="some-left"),
        pytest.param(1_000_003, 1_000_003, 17, id="fast"),
        pytest.param(LARGEST_LIMIT, LARGEST_LIMIT, LARGEST_LIMIT, id="as-large-as-it-gets"),
        pytest.param(999_999_937, 999_999_936, 123_456_789, id="large-prime"),
    ],
)
async def test_l6_after_the_told_wait_a_request_passes_and_not_a_microsecond_before(
    limiter: RedisLimiter, limit: int, used: int, tokens: int
) -> None:
    scopes = tenant(tokens_per_minute=limit)
    await admitted(limiter, "first", scopes, used)
    await limiter.settle("acme", "first", used, record())
    refusal = await refused(limiter, scopes, tokens)
    assert refusal.wait_us is not None
    assert refusal.wait_us == -(-(used + tokens - limit) * 60 * SECOND_US // limit)
    moved(limiter, refusal.wait_us - 1)
    assert (await refused(limiter, scopes, tokens)).wait_us == 1
    moved(limiter, 1)
    await admitted(limiter, "second", scopes, tokens)


@pytest.mark.parametrize("limit", [1, 7, 60, 1001])
async def test_l6_the_same_for_requests(limiter: RedisLimiter, limit: int) -> None:
    scopes = tenant(requests_per_minute=limit)
    for number in range(limit):
        await admitted(limiter, f"first-{number}", scopes)
    refusal = await refused(limiter, scopes)
    assert refusal.wait_us == -(-60 * SECOND_US // limit)
    moved(limiter, refusal.wait_us - 1)
    assert (await refused(limiter, scopes)).wait_us == 1
    moved(limiter, 1)
    await admitted(limiter, "second", scopes)
    assert (await refused(limiter, scopes)).kind == "requests"


async def test_l6_the_wait_for_tokens_counts_on_no_hold_to_drain(limiter: RedisLimiter) -> None:
    scopes = tenant(tokens_per_minute=600)
    await admitted(limiter, "done", scopes, 100)
    await limiter.settle("acme", "done", 100, record())
    await admitted(limiter, "running", scopes, 200)
    assert (await refused(limiter, scopes, 400)).wait_us == 10 * SECOND_US
    moved(limiter, 10 * SECOND_US)
    await admitted(limiter, "next", scopes, 400)
    assert (await refused(limiter, scopes, 1)).wait_us == SECOND_US


@pytest.mark.parametrize(
    ("limits", "kind"),
    [
        pytest.param({"concurrent_requests": 1}, "concurrency", id="concurrency"),
        pytest.param({"token_budget": 15}, "budget", id="budget"),
        pytest.param({"tokens_per_minute": 15}, "tokens", id="tokens"),
    ],
)
async def test_l6_what_running_requests_hold_may_return_any_second(
    limiter: RedisLimiter, limits: dict[str, Any], kind: str
) -> None:
    await admitted(limiter, "first", tenant(**limits), 10)
    refusal = await refused(limiter, tenant(**limits), 10)
    assert (refusal.kind, refusal.wait_us) == (kind, SECOND_US)


@pytest.mark.parametrize(
    ("limits", "kind"),
    [
        pytest.param({"requests_per_minute": 0}, "requests", id="no-requests"),
        pytest.param({"tokens_per_minute": 0}, "tokens", id="no-tokens"),
        pytest.param({"concurrent_requests": 0}, "concurrency", id="no-concurrency"),
        pytest.param({"token_budget": 0}, "budget", id="no-budget"),
        pytest.param({"tokens_per_minute": 99}, "tokens", id="more-than-a-minute-has"),
        pytest.param({"token_budget": 99}, "budget", id="more-than-the-budget"),
    ],
)
async def test_l4_what_can_never_pass_is_not_told_to_wait(
    limiter: RedisLimiter, limits: dict[str, Any], kind: str
) -> None:
    refusal = await refused(limiter, tenant(**limits), 100)
    assert (refusal.kind, refusal.wait_us, refusal.retryable) == (kind, None, False)
    assert not refusal.error().should_retry


# Settling


async def test_l3_settling_returns_what_was_not_used(redis: Redis, limiter: RedisLimiter) -> None:
    scopes = tenant(tokens_per_minute=100, token_budget=100, concurrent_requests=1)
    await admitted(limiter, "req_1", scopes, 100)
    assert await limiter.settle("acme", "req_1", 30, record())
    answer = await admitted(limiter, "req_2", scopes, 70)
    assert answer.tokens == Allowance(100, 0, 60 * SECOND_US)
    assert await redis.hgetall("tera:{acme}:budget:2027-01") == {b"tenant": b"30 70"}


async def test_e3_a_request_that_used_nothing_leaves_nothing_but_itself(
    limiter: RedisLimiter,
) -> None:
    scopes = tenant(
        requests_per_minute=2, tokens_per_minute=100, token_budget=100, concurrent_requests=1
    )
    await admitted(limiter, "req_1", scopes, 100)
    await limiter.settle("acme", "req_1", 0, record())
    answer = await admitted(limiter, "req_2", scopes, 100)
    assert answer.requests == Allowance(2, 0, 60 * SECOND_US)


# U-1: one record, however often a request is settled.
async def test_settling_twice_charges_once_and_the_last_record_stands(
    redis: Redis, limiter: RedisLimiter
) -> None:
    scopes = tenant(tokens_per_minute=100, token_budget=100)
    await admitted(limiter, "req_1", scopes, 50)
    assert await limiter.settle("acme", "req_1", 30, record(status="failed"))
    before = await everything(redis)
    assert not await limiter.settle("acme", "req_1", 30, record(status="finished"))
    after = await everything(redis)
    assert {key for key in after if after[key] != before[key]} == {b"tera:{acme}:usage"}
    assert [entry.status for _, entry in await ledger(redis)] == ["failed", "finished"]
    kept = [entry async for entry in UsageLedger(redis).records("acme")]
    assert [entry.status for entry in kept] == ["finished"]


async def test_a_request_that_redis_forgot_is_recorded_and_not_charged(
    redis: Redis, limiter: RedisLimiter
) -> None:
    await admitted(limiter, "req_1", tenant(tokens_per_minute=100), 50)
    await redis.flushall()
    assert not await limiter.settle("acme", "req_1", 50, record(status="finished"))
    assert await redis.keys("*") == [b"tera:{acme}:usage"]
    assert [request_id for request_id, _ in await ledger(redis)] == [b"req_1"]


async def test_the_order_of_settling_does_not_matter(redis: Redis, limiter: RedisLimiter) -> None:
    scopes = tenant(tokens_per_minute=100, concurrent_requests=9, token_budget=1000)
    outcomes = set()
    for number, order in enumerate(itertools.permutations([("a", 30), ("b", 0), ("c", 20)])):
        name = f"tenant-{number}"
        for request_id in "abc":
            await limiter.admit(name, request_id, scopes, 30, b"{}")
        for request_id, used in order:
            assert await limiter.settle(name, request_id, used, b"{}")
        outcomes.add(await redis.hget(f"tera:{{{name}}}:limits", "tenant"))
        assert await redis.hgetall(f"tera:{{{name}}}:budget:2027-01") == {b"tenant": b"50 0"}
    assert len(outcomes) == 1


async def test_a_debt_outlives_an_edit_of_the_limit(limiter: RedisLimiter) -> None:
    await admitted(limiter, "req_1", tenant(tokens_per_minute=100), 100)
    await limiter.settle("acme", "req_1", 100, record())
    assert (await refused(limiter, tenant(tokens_per_minute=50))).wait_us == 61.2 * SECOND_US
    answer = await admitted(limiter, "req_2", tenant(tokens_per_minute=200))
    assert answer.tokens == Allowance(200, 99, 30_300_000)


async def test_requests_that_run_when_a_limit_is_set_count_against_it(
    limiter: RedisLimiter,
) -> None:
    await admitted(limiter, "req_1", tenant(requests_per_minute=100), 40)
    scopes = tenant(concurrent_requests=1, tokens_per_minute=50)
    assert (await refused(limiter, scopes, 5)).kind == "concurrency"
    assert (await refused(limiter, tenant(tokens_per_minute=50), 11)).kind == "tokens"


async def test_a_clock_that_was_set_back_gives_no_minute_twice_and_honest_waits(
    limiter: RedisLimiter,
) -> None:
    scopes = tenant(requests_per_minute=60)
    for number in range(60):
        await admitted(limiter, f"req-{number}", scopes)
    moved(limiter, -5 * SECOND_US)
    assert (await refused(limiter, scopes)).wait_us == 6 * SECOND_US
    moved(limiter, 5_999_999)
    assert (await refused(limiter, scopes)).wait_us == 1
    moved(limiter, 1)
    await admitted(limiter, "next", scopes)


async def test_a_clock_that_was_a_day_ahead_for_one_request_keeps_nobody_out(
    limiter: RedisLimiter,
) -> None:
    local = LocalLimiter(lambda: limiter.now_us or 0)
    scopes = tenant(requests_per_minute=60)
    moved(limiter, DAY_US)
    for number in range(60):
        await admitted(limiter, f"req-{number}", scopes)
        local.admit("acme", f"req-{number}", scopes, 1)
    moved(limiter, -DAY_US)
    for wait_us in (SECOND_US, 600_000, 200_000):
        told = await limiter.admit("acme", "next", scopes, 1, record())
        assert told.refusal is not None
        assert told.refusal.wait_us == wait_us
        assert told == local.admit("acme", "next", scopes, 1)
        moved(limiter, 400_000)
    told = await limiter.admit("acme", "next", scopes, 1, record())
    assert told.refusal is None
    assert told == local.admit("acme", "next", scopes, 1)


async def test_l9_a_lease_that_was_taken_by_a_clock_a_day_ahead_ends_as_others_do(
    limiter: RedisLimiter,
) -> None:
    scopes = tenant(concurrent_requests=1)
    moved(limiter, DAY_US)
    await admitted(limiter, "lost", scopes)
    moved(limiter, -DAY_US)
    assert await limiter.reclaim("acme") == 0
    moved(limiter, 31 * SECOND_US)
    assert await limiter.reclaim("acme") == 1
    await admitted(limiter, "next", scopes)


async def test_no_wait_is_longer_than_numbers_are_exact_by_a_clock_set_back_least_of_all(
    limiter: RedisLimiter,
) -> None:
    """The wait to the end of a huge debt, and what the clock was set back by, make one number."""
    local = LocalLimiter(lambda: limiter.now_us or 0)
    scopes = tenant(tokens_per_minute=LARGEST_LIMIT)
    await admitted(limiter, "huge", scopes)
    await limiter.settle("acme", "huge", MOST, record())
    local.admit("acme", "huge", scopes, 1)
    local.settle("acme", "huge", MOST)
    moved(limiter, -2)
    slow = tenant(tokens_per_minute=1)
    told = await limiter.admit("acme", "next", slow, 0, record())
    assert told.refusal is not None
    assert told.refusal.wait_us == MOST
    assert told == local.admit("acme", "next", slow, 0)

from __future__ import annotations

import asyncio
import itertools
import json
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test
from redis import Redis as BlockingRedis
from redis.crc import key_slot

from tera.config.limits import LARGEST_BUDGET, LARGEST_LIMIT, Limits, TenantLimits
from tera.errors import (
    ConcurrencyLimitError,
    QuotaError,
    RequestRateLimitError,
    TokenRateLimitError,
)
from tera.tenancy.limits import (
    MOST,
    Admission,
    Allowance,
    Progress,
    RedisLimiter,
    Refusal,
    Scope,
    scopes_of,
)
from tera.tenancy.local_limits import LocalLimiter
from tera.tenancy.redis import connect
from tera.tenancy.usage import UsageLedger, UsageRecord, decode_record, encode_record

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from redis.asyncio import Redis
    from tests.tenancy.conftest import RedisServer

NOW_US = 1_800_000_000_000_000
"""2027-01-15 08:00 UTC."""
SECOND_US = 1_000_000


@pytest.fixture
def limiter(redis: Redis) -> RedisLimiter:
    """A limiter whose clock only the test moves."""
    return RedisLimiter(redis, now_us=NOW_US)


def moved(limiter: RedisLimiter, micros: int) -> None:
    assert limiter.now_us is not None
    limiter.now_us += micros


def tenant(**limits: Any) -> list[Scope]:
    return [Scope("tenant", Limits(**limits))]


def record(request_id: str = "req_1", **members: Any) -> bytes:
    known = {
        "request_id": request_id,
        "tenant": "acme",
        "key_id": "key_1",
        "model": "llama-8b",
        "route": "/v1/completions",
        "status": "lost",
        "started_s": 1_799_999_999.123,
    }
    return encode_record(UsageRecord(**{**known, **members}))


async def admitted(
    limiter: RedisLimiter, request_id: str, scopes: Sequence[Scope], tokens: int = 1
) -> Admission:
    answer = await limiter.admit("acme", request_id, scopes, tokens, record(request_id))
    assert answer.refusal is None
    return answer


async def refused(
    limiter: RedisLimiter, scopes: Sequence[Scope], tokens: int = 1, request_id: str = "refused"
) -> Refusal:
    answer = await limiter.admit("acme", request_id, scopes, tokens, record(request_id))
    assert answer.refusal is not None
    return answer.refusal


async def everything(redis: Redis) -> dict[bytes, bytes]:
    return {key: await redis.dump(key) for key in sorted(await redis.keys("*"))}


async def ledger(redis: Redis) -> list[tuple[bytes, UsageRecord]]:
    entries = await redis.xrange("tera:{acme}:usage")
    return [(fields[b"id"], decode_record(fields[b"r"])) for _, fields in entries]


# Many gateway replicas at once


class Processes:
    """Four processes, each of which admits from many tasks."""

    def __init__(self) -> None:
        program = [sys.executable, str(Path(__file__).with_name("admitting.py"))]
        self._processes = [
            subprocess.Popen(  # noqa: S603  our own file
                program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            for _ in range(4)
        ]

    def admit(self, **order: Any) -> int:
        """Return how many requests passed in all of them."""
        for number, process in enumerate(self._processes):
            assert process.stdin is not None
            process.stdin.write(json.dumps({**order, "name": f"req-{number}"}) + "\n")
            process.stdin.flush()
        total = 0
        for process in self._processes:
            assert process.stdout is not None
            total += int(process.stdout.readline())
        return total

    def end(self) -> None:
        for process in self._processes:
            process.communicate()


@pytest.fixture(scope="module")
def processes() -> Iterator[Processes]:
    started = Processes()
    try:
        yield started
    finally:
        started.end()


@pytest.mark.parametrize(
    ("limits", "tokens", "expected"),
    [
        pytest.param({"requests_per_minute": 123}, 1, 123, id="requests"),
        pytest.param({"tokens_per_minute": 1000}, 7, 142, id="tokens"),
        pytest.param({"concurrent_requests": 77}, 1, 77, id="concurrency"),
        pytest.param({"token_budget": 1000}, 9, 111, id="budget"),
        pytest.param(
            {
                "requests_per_minute": 110,
                "tokens_per_minute": 999,
                "concurrent_requests": 105,
                "token_budget": 100_000,
                "budget_period": "day",
            },
            10,
            99,
            id="all",
        ),
    ],
)
def test_l2_four_processes_admit_exactly_the_limit(
    redis_server: RedisServer,
    processes: Processes,
    limits: dict[str, Any],
    tokens: int,
    expected: int,
) -> None:
    passed = processes.admit(
        url=redis_server.url, limits=limits, tokens=tokens, requests=100, now_us=NOW_US
    )
    assert passed == expected


def test_l2_four_processes_stay_within_the_limit_and_what_drains_meanwhile(
    redis_server: RedisServer, processes: Processes
) -> None:
    limit = 300
    with BlockingRedis.from_url(redis_server.url) as redis:
        began = redis.time()
        passed = processes.admit(
            url=redis_server.url,
            limits={"requests_per_minute": limit},
            tokens=1,
            requests=300,
            now_us=None,
        )
        ended = redis.time()
    took_us = (ended[0] - began[0]) * SECOND_US + ended[1] - began[1]
    assert limit <= passed <= limit + limit * took_us / (60 * SECOND_US)


# All or nothing

EVERY_LIMIT = {
    "requests_per_minute": 100,
    "tokens_per_minute": 10_000,
    "concurrent_requests": 10,
    "token_budget": 100_000,
}
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


@pytest.mark.parametrize(
    ("refusal", "kind", "message"),
    [
        pytest.param(
            Refusal("requests", "tenant", 60, 1_234_567, 10),
            RequestRateLimitError,
            "This tenant has reached its limit of 60 requests per minute. Try again in 1.23 s.",
            id="requests",
        ),
        pytest.param(
            Refusal("tokens", "model:llama-8b", 6000, 20_000, 10),
            TokenRateLimitError,
            "This tenant's use of the model llama-8b has reached its limit of 6,000 tokens per "
            "minute. Try again in 0.02 s.",
            id="tokens",
        ),
        pytest.param(
            Refusal("tokens", "key:key_1", 6000, None, 7000),
            TokenRateLimitError,
            "This request may use 7,000 tokens, prompt and completion together. This API key has "
            "a limit of 6,000 tokens per minute, so it can never pass; send a shorter prompt or a "
            "lower max_tokens.",
            id="tokens-for-ever",
        ),
        pytest.param(
            Refusal("concurrency", "key:key_1", 4, 1_000_000, 10),
            ConcurrencyLimitError,
            "This API key has reached its limit of 4 concurrent requests. Try again in 1 s.",
            id="concurrency",
        ),
        pytest.param(
            Refusal("budget", "tenant", 50_000, None, 10, "day"),
            QuotaError,
            "This tenant has too little left of its budget of 50,000 tokens per day for the 10 "
            "tokens that this request may use.",
            id="budget",
        ),
        pytest.param(
            Refusal("requests", "tenant", 0, None, 10),
            RequestRateLimitError,
            "This tenant is blocked: it has a limit of 0 requests per minute.",
            id="blocked",
        ),
    ],
)
def test_a_refusal_is_told_with_its_number_and_wait(
    refusal: Refusal, kind: type[Exception], message: str
) -> None:
    error = refusal.error()
    assert type(error) is kind
    assert error.message == message
    assert error.retry_after_s == (None if refusal.wait_us is None else refusal.wait_us / 1e6)


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


# Leases


async def test_l9_a_request_that_nobody_renews_returns_what_it_holds_and_is_recorded_once(
    redis: Redis, limiter: RedisLimiter
) -> None:
    scopes = tenant(concurrent_requests=1, tokens_per_minute=600, token_budget=1000)
    await admitted(limiter, "req_1", scopes, 600)
    moved(limiter, 29_999_999)
    assert (await refused(limiter, scopes)).wait_us is not None
    moved(limiter, 1)
    answer = await admitted(limiter, "req_2", scopes, 600)
    assert answer.tokens == Allowance(600, 0, 60 * SECOND_US)
    assert await redis.hgetall("tera:{acme}:budget:2027-01") == {b"tenant": b"0 600"}
    [(request_id, lost)] = await ledger(redis)
    assert request_id == b"req_1"
    assert lost == decode_record(record())


async def test_a_lost_request_is_charged_what_it_had_used_when_it_was_renewed(
    redis: Redis, limiter: RedisLimiter
) -> None:
    scopes = tenant(tokens_per_minute=600, token_budget=1000, concurrent_requests=1)
    opening = record(prompt_tokens=70, user='Ünïcode \u0000\u2028 / "quoted"')
    await limiter.admit("acme", "req_1", scopes, 600, opening)
    moved(limiter, 10 * SECOND_US)
    assert await limiter.renew("acme", {"req_1": Progress(70, 30)}) == frozenset()
    moved(limiter, 30 * SECOND_US)
    assert await limiter.reclaim("acme") == 1
    assert await limiter.reclaim("acme") == 0
    answer = await admitted(limiter, "req_2", scopes)
    assert answer.tokens == Allowance(600, 499, 10_100_000)
    assert await redis.hgetall("tera:{acme}:budget:2027-01") == {b"tenant": b"100 1"}
    [(_, lost)] = await ledger(redis)
    expected = decode_record(opening)
    assert (lost.status, lost.completion_tokens, lost.prompt_tokens) == ("lost", 30, 70)
    assert (lost.started_s, lost.user, lost.first_token_s) == (
        expected.started_s,
        expected.user,
        None,
    )


async def test_an_opening_record_says_lost_whatever_it_said(
    redis: Redis, limiter: RedisLimiter
) -> None:
    await limiter.admit("acme", "req_1", [], 1, record(status="finished"))
    await limiter.admit("acme", "req_2", [], 1, b"no JSON")
    moved(limiter, 30 * SECOND_US)
    assert await limiter.reclaim("acme") == 2
    entries = await redis.xrange("tera:{acme}:usage")
    assert [fields[b"id"] for _, fields in entries] == [b"req_1", b"req_2"]
    assert decode_record(entries[0][1][b"r"]).status == "lost"
    assert entries[1][1][b"r"] == b"no JSON"


async def test_a_lost_request_that_ends_after_all_is_recorded_as_it_ended(
    redis: Redis, limiter: RedisLimiter
) -> None:
    await admitted(limiter, "req_1", tenant(tokens_per_minute=600), 600)
    moved(limiter, 30 * SECOND_US)
    await limiter.reclaim("acme")
    assert not await limiter.settle("acme", "req_1", 600, record(status="finished"))
    kept = [entry async for entry in UsageLedger(redis).records("acme")]
    assert [entry.status for entry in kept] == ["finished"]
    assert (await admitted(limiter, "req_2", tenant(tokens_per_minute=600), 600)).tokens


async def test_a_request_that_is_renewed_in_time_stays_open(limiter: RedisLimiter) -> None:
    scopes = tenant(concurrent_requests=1)
    await admitted(limiter, "req_1", scopes)
    for completion_tokens in range(10):
        moved(limiter, 29 * SECOND_US)
        await limiter.renew("acme", {"req_1": Progress(1, completion_tokens)})
    assert await limiter.reclaim("acme") == 0
    assert (await refused(limiter, scopes)).kind == "concurrency"


async def test_renewing_tells_which_requests_are_not_open(limiter: RedisLimiter) -> None:
    for number in range(1200):
        await admitted(limiter, f"req-{number}", [])
    progress = {f"req-{number}": Progress(0, 0) for number in range(1201)}
    assert await limiter.renew("acme", progress) == {"req-1200"}
    moved(limiter, 29 * SECOND_US)
    assert await limiter.reclaim("acme") == 0
    assert await limiter.renew("acme", {}) == frozenset()


async def test_everything_that_a_dead_replica_left_is_reclaimed_of_all_tenants(
    redis: Redis, limiter: RedisLimiter
) -> None:
    scopes = tenant(concurrent_requests=250)
    for number in range(250):
        assert (await limiter.admit("a.b-c", f"a-{number}", scopes, 1, b"{}")).refusal is None
    await limiter.admit("other", "b", scopes, 1, b"{}")
    moved(limiter, 30 * SECOND_US)
    await limiter.admit("alive", "c", scopes, 1, b"{}")
    assert await limiter.reclaim_all() == 251
    assert await redis.xlen("tera:{a.b-c}:usage") == 250
    assert await redis.hget("tera:{a.b-c}:limits", "tenant") == (
        f"{limiter.now_us} 0 0 0 0 0 0 0 0".encode()
    )
    assert await redis.keys("*:leases") == [b"tera:{alive}:leases"]


# Budgets


def micros(*date: int) -> int:
    return round(datetime(*date, tzinfo=UTC).timestamp()) * SECOND_US  # type: ignore[misc, arg-type]


@pytest.mark.parametrize(
    ("period", "last", "name"),
    [
        pytest.param("day", micros(2027, 1, 16), "2027-01-15", id="day"),
        pytest.param("day", micros(2027, 1, 1), "2026-12-31", id="last-day-of-a-year"),
        pytest.param("day", micros(2028, 3, 1), "2028-02-29", id="leap-day"),
        pytest.param("month", micros(2027, 2, 1), "2027-01", id="month"),
        pytest.param("month", micros(2028, 3, 1), "2028-02", id="leap-month"),
        pytest.param("month", micros(2100, 3, 1), "2100-02", id="no-leap-year"),
        pytest.param("month", micros(2029, 1, 1), "2028-12", id="end-of-a-leap-year"),
        pytest.param(None, micros(2027, 2, 1), "2027-01", id="a-month-unless-said"),
    ],
)
async def test_a_budget_is_of_a_calendar_day_or_month_in_utc(
    redis: Redis, period: str | None, last: int, name: str
) -> None:
    scopes = tenant(token_budget=10, budget_period=period)
    limiter = RedisLimiter(redis, now_us=last - 1)
    await admitted(limiter, "req_1", scopes, 10)
    assert await redis.hgetall(f"tera:{{acme}}:budget:{name}") == {b"tenant": b"0 10"}
    assert (await refused(limiter, scopes)).kind == "budget"
    moved(limiter, 1)
    await admitted(limiter, "req_2", scopes, 10)
    # The hold is settled where it was taken.
    await limiter.settle("acme", "req_1", 4, record())
    assert await redis.hgetall(f"tera:{{acme}}:budget:{name}") == {b"tenant": b"4 0"}
    assert (await refused(limiter, scopes)).kind == "budget"


async def test_every_day_has_the_name_that_the_calendar_gives_it(
    redis: Redis, limiter: RedisLimiter
) -> None:
    both = [
        Scope("tenant", Limits(token_budget=10**9, budget_period="day")),
        Scope("key:k", Limits(token_budget=10**9)),
    ]
    names = set()
    for days in range(0, 4 * 366, 5):
        limiter.now_us = micros(2026, 12, 30) + days * 86_400 * SECOND_US
        await admitted(limiter, f"req-{days}", both)
        await limiter.settle("acme", f"req-{days}", 1, b"{}")
        day = datetime.fromtimestamp(limiter.now_us / SECOND_US, UTC)
        names |= {day.strftime("tera:{acme}:budget:%Y-%m-%d").encode()}
        names |= {day.strftime("tera:{acme}:budget:%Y-%m").encode()}
    assert set(await redis.keys("*:budget:*")) == names


async def test_a_spent_budget_is_no_reason_to_wait_and_a_held_one_is(
    limiter: RedisLimiter,
) -> None:
    scopes = tenant(token_budget=100)
    await admitted(limiter, "req_1", scopes, 60)
    assert (await refused(limiter, scopes, 50)).retryable
    await limiter.settle("acme", "req_1", 60, record())
    assert not (await refused(limiter, scopes, 50)).retryable
    await admitted(limiter, "req_2", scopes, 40)


# Requests that were admitted while Redis was away


async def test_a_request_that_ran_without_redis_is_charged_once(
    redis: Redis, limiter: RedisLimiter
) -> None:
    scopes = tenant(tokens_per_minute=100, requests_per_minute=10, token_budget=1000)
    assert await limiter.charge("acme", "req_1", scopes, 60, record(status="finished"))
    assert not await limiter.charge("acme", "req_1", scopes, 60, record(status="finished"))
    answer = await admitted(limiter, "req_2", scopes)
    assert answer.requests == Allowance(10, 8, 12 * SECOND_US)
    assert answer.tokens == Allowance(100, 39, 36_600_000)
    assert await redis.hgetall("tera:{acme}:budget:2027-01") == {b"tenant": b"60 1"}
    assert [request_id for request_id, _ in await ledger(redis)] == [b"req_1", b"req_1"]


async def test_charges_of_a_long_outage_owe_one_minute_at_the_most(
    redis: Redis, limiter: RedisLimiter
) -> None:
    scopes = tenant(tokens_per_minute=100, requests_per_minute=10, token_budget=100_000)
    for number in range(50):
        assert await limiter.charge("acme", f"req-{number}", scopes, 60, b"{}")
    assert (await refused(limiter, scopes, 100)).wait_us == 60 * SECOND_US
    moved(limiter, 60 * SECOND_US)
    await admitted(limiter, "next", scopes, 100)
    assert await redis.hgetall("tera:{acme}:budget:2027-01") == {b"tenant": b"3000 100"}


async def test_charging_a_request_that_is_open_after_all_settles_it(
    redis: Redis, limiter: RedisLimiter
) -> None:
    scopes = tenant(tokens_per_minute=100, requests_per_minute=10, concurrent_requests=1)
    await admitted(limiter, "req_1", scopes, 50)
    assert await limiter.charge("acme", "req_1", scopes, 30, record(status="finished"))
    assert not await limiter.charge("acme", "req_1", scopes, 30, record(status="finished"))
    answer = await admitted(limiter, "req_2", scopes)
    assert answer.requests == Allowance(10, 8, 12 * SECOND_US)
    assert answer.tokens == Allowance(100, 69, 18_600_000)


# Redis


async def test_a_call_is_one_command_and_the_script_is_sent_when_redis_does_not_know_it(
    redis: Redis, limiter: RedisLimiter
) -> None:
    await admitted(limiter, "req_1", tenant(requests_per_minute=10))
    await redis.script_flush()
    await admitted(limiter, "req_2", tenant(requests_per_minute=10))
    await redis.config_resetstat()
    await admitted(limiter, "req_3", tenant(requests_per_minute=10))
    called: Any = await redis.info("commandstats")
    assert called["cmdstat_evalsha"]["calls"] == 1
    assert "cmdstat_eval" not in called


async def leave_one_of_each_key(limiter: RedisLimiter) -> None:
    scopes = tenant(**EVERY_LIMIT)
    for request_id in ("running", "renewed", "settled", "lost"):
        await admitted(limiter, request_id, scopes)
    await limiter.charge("acme", "charged", scopes, 1, b"{}")
    await limiter.settle("acme", "settled", 1, b"{}")
    moved(limiter, 20 * SECOND_US)
    await limiter.renew("acme", {name: Progress(0, 0) for name in ("running", "renewed")})
    moved(limiter, 10 * SECOND_US)
    await limiter.reclaim("acme")


async def test_all_keys_of_a_tenant_lie_in_one_slot_of_a_cluster(
    redis: Redis, limiter: RedisLimiter
) -> None:
    await leave_one_of_each_key(limiter)
    keys = await redis.keys("*")
    assert len(keys) == 6
    assert {key_slot(key) for key in keys} == {key_slot(b"acme")}


async def test_every_key_expires_but_the_ledger(redis: Redis, limiter: RedisLimiter) -> None:
    for step in (leave_one_of_each_key(limiter), limiter.settle("acme", "running", 1, b"{}")):
        await step
        lasting = {key for key in await redis.keys("*") if await redis.ttl(key) < 0}
        assert lasting == {b"tera:{acme}:usage"}
    assert await redis.ttl("tera:{acme}:limits") > 24 * 3600
    await limiter.settle("acme", "renewed", 1, b"{}")
    assert set(await redis.keys("*")) == {
        b"tera:{acme}:" + name
        for name in (b"limits", b"budget:2027-01", b"charged:charged", b"usage")
    }
    # The buckets are full again within a second or so; a minute is spare.
    assert 55 < await redis.ttl("tera:{acme}:limits") <= 62
    assert 17 < await redis.ttl("tera:{acme}:budget:2027-01") / 86_400 < 18


async def test_limits_expire_when_the_last_bucket_is_full_and_not_before(
    redis: Redis, limiter: RedisLimiter
) -> None:
    slow = [Scope("key:slow", Limits(tokens_per_minute=60))]
    await admitted(limiter, "req_1", slow, 60)
    await limiter.settle("acme", "req_1", 60, b"{}")
    assert 115 < await redis.ttl("tera:{acme}:limits") <= 121
    await admitted(limiter, "req_2", tenant(requests_per_minute=6000))
    await limiter.settle("acme", "req_2", 1, b"{}")
    assert 115 < await redis.ttl("tera:{acme}:limits") <= 121
    await admitted(limiter, "req_3", [])
    await limiter.settle("acme", "req_3", 1, b"{}")
    assert 115 < await redis.ttl("tera:{acme}:limits") <= 121


# Scopes


@pytest.mark.parametrize(
    ("of_tenant", "of_key", "expected"),
    [
        pytest.param({}, None, [], id="nothing-is-limited"),
        pytest.param(
            {"requests_per_minute": 60},
            None,
            [("tenant", {"requests_per_minute": 60})],
            id="tenant",
        ),
        pytest.param(
            {
                "requests_per_minute": 60,
                "tokens_per_minute": 6000,
                "token_budget": 10,
                "budget_period": "day",
                "models": {"llama-8b": Limits(tokens_per_minute=100)},
            },
            None,
            [
                (
                    "tenant",
                    {"requests_per_minute": 60, "token_budget": 10, "budget_period": "day"},
                ),
                ("model:llama-8b", {"tokens_per_minute": 100}),
            ],
            id="a-model's-limit-in-the-place-of-the-tenant's",
        ),
        pytest.param(
            {
                "requests_per_minute": 0,
                "token_budget": 5,
                "budget_period": "day",
                "models": {"llama-8b": Limits(requests_per_minute=5, token_budget=7)},
            },
            None,
            [("model:llama-8b", {"requests_per_minute": 5, "token_budget": 7})],
            id="all-of-it-in-the-model's-place",
        ),
        pytest.param(
            {"requests_per_minute": 60, "models": {"llama-8b": Limits(requests_per_minute=0)}},
            None,
            [("model:llama-8b", {"requests_per_minute": 0})],
            id="a-blocked-model",
        ),
        pytest.param(
            {"requests_per_minute": 60, "models": {"other": Limits(requests_per_minute=5)}},
            {"requests_per_minute": 10, "concurrent_requests": 1},
            [
                ("tenant", {"requests_per_minute": 60}),
                ("key:key_1", {"requests_per_minute": 10, "concurrent_requests": 1}),
            ],
            id="a-key's-beside",
        ),
        pytest.param(
            {"budget_period": "day", "models": {"llama-8b": Limits(budget_period="month")}},
            {"budget_period": "day"},
            [],
            id="a-period-is-no-limit",
        ),
    ],
)
def test_l1_scopes_by_precedence(
    of_tenant: dict[str, Any],
    of_key: dict[str, Any] | None,
    expected: list[tuple[str, dict[str, Any]]],
) -> None:
    key_limits = None if of_key is None else Limits(**of_key)
    scopes = scopes_of(TenantLimits(**of_tenant), key_limits, "key_1", "llama-8b")
    found = [(scope.name, scope.limits.model_dump(exclude_none=True)) for scope in scopes]
    assert found == expected


async def test_l1_a_model_with_a_limit_of_its_own_counts_apart(limiter: RedisLimiter) -> None:
    limits = TenantLimits(requests_per_minute=1, models={"llama-8b": Limits(requests_per_minute=1)})
    await admitted(limiter, "req_1", scopes_of(limits, None, "key_1", "llama-8b"))
    await admitted(limiter, "req_2", scopes_of(limits, None, "key_1", "qwen-7b"))
    refusal = await refused(limiter, scopes_of(limits, None, "key_1", "llama-8b"))
    assert refusal.scope == "model:llama-8b"
    assert (await refused(limiter, scopes_of(limits, None, "key_1", "qwen-7b"))).scope == "tenant"


# The script against the same in whole numbers of any size

NUMBERS = st.one_of(
    st.none(),
    st.integers(0, 20),
    st.integers(0, 100_000),
    st.integers(2**29, LARGEST_LIMIT),
    st.integers(LARGEST_LIMIT - 3, LARGEST_LIMIT),
)
BUDGETS = st.one_of(
    st.none(),
    st.integers(0, 100_000),
    st.integers(2**40, LARGEST_BUDGET),
    st.integers(LARGEST_BUDGET - 3, LARGEST_BUDGET),
)
TOKENS = st.one_of(st.integers(0, 20), st.integers(0, 100_000), st.integers(2**40, 2**54))
MICROS = st.one_of(
    st.integers(0, 3),
    st.integers(0, 3 * SECOND_US),
    st.integers(0, 120 * SECOND_US),
    st.integers(0, 86_400 * SECOND_US),
    st.integers(-3 * SECOND_US, 0),
)
LIMITS = st.builds(
    Limits,
    requests_per_minute=NUMBERS,
    tokens_per_minute=NUMBERS,
    concurrent_requests=st.one_of(st.none(), st.none(), st.integers(0, 5)),
    token_budget=BUDGETS,
    budget_period=st.sampled_from(["day", "month", None]),
)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    limits=st.tuples(st.integers(2**24, LARGEST_LIMIT), st.integers(2**24, LARGEST_LIMIT)),
    parts=st.tuples(st.floats(0, 1), st.floats(0, 1.1), st.floats(0, 1)),
    elapsed_us=st.integers(0, 70 * SECOND_US),
)
async def test_large_numbers_are_exact(
    redis: Redis,
    limits: tuple[int, int],
    parts: tuple[float, float, float],
    elapsed_us: int,
) -> None:
    await redis.flushall()
    limiter = RedisLimiter(redis, lease_s=1e6, now_us=NOW_US)
    local = LocalLimiter(lambda: limiter.now_us or 0)
    tokens = [round(limits[0] * part) for part in parts]
    for number in range(3):
        scopes = tenant(tokens_per_minute=limits[number > 0])
        request_id = f"req-{number}"
        ours = local.admit("acme", request_id, scopes, tokens[number])
        theirs = await limiter.admit("acme", request_id, scopes, tokens[number], b"{}")
        assert theirs == ours
        used = max(0, tokens[number] - number)
        assert local.settle("acme", request_id, used) == (
            await limiter.settle("acme", request_id, used, b"{}")
        )
        moved(limiter, elapsed_us)


def state_machine(url: str) -> type[RuleBasedStateMachine]:
    class SameDecisions(RuleBasedStateMachine):
        def __init__(self) -> None:
            super().__init__()
            self._runner = asyncio.Runner()
            self._redis = connect(url, timeout_s=5)
            self._runner.run(self._redis.flushall())
            self._limiter = RedisLimiter(self._redis, lease_s=1e9, now_us=NOW_US)
            self._local = LocalLimiter(lambda: self._limiter.now_us or 0)
            self._open: list[tuple[str, int]] = []
            self._requests = itertools.count()
            self._scopes: list[Scope] = []
            self._wait_us: int | None = None

        @rule(
            limits=LIMITS,
            of_model=st.one_of(st.none(), LIMITS),
            of_key=st.one_of(st.none(), LIMITS),
        )
        def edit(self, limits: Limits, of_model: Limits | None, of_key: Limits | None) -> None:
            models = {} if of_model is None else {"m": of_model}
            limits = TenantLimits(**limits.model_dump(), models=models)
            self._scopes = scopes_of(limits, of_key, "k", "m")

        @rule(tokens=TOKENS)
        def admit(self, tokens: int) -> None:
            request_id = f"req-{next(self._requests)}"
            ours = self._local.admit("acme", request_id, self._scopes, tokens)
            theirs = self._runner.run(
                self._limiter.admit("acme", request_id, self._scopes, tokens, b"{}")
            )
            assert theirs == ours
            if ours.refusal is None:
                self._open.append((request_id, tokens))
            elif ours.refusal.wait_us:
                self._wait_us = ours.refusal.wait_us

        @precondition(lambda self: self._open)
        @rule(number=st.integers(0), ratio=st.floats(0, 2))
        def settle(self, number: int, ratio: float) -> None:
            request_id, tokens = self._open.pop(number % len(self._open))
            used = round(tokens * ratio)
            assert self._local.settle("acme", request_id, used)
            assert self._runner.run(self._limiter.settle("acme", request_id, used, b"{}"))

        @rule(elapsed_us=MICROS)
        def advance(self, elapsed_us: int) -> None:
            moved(self._limiter, elapsed_us)

        @precondition(lambda self: self._wait_us is not None and self._wait_us < 2**45)
        @rule(sooner=st.booleans())
        def wait(self, sooner: bool) -> None:
            assert self._wait_us is not None
            moved(self._limiter, self._wait_us - sooner)
            self._wait_us = None

        def teardown(self) -> None:
            self._runner.run(self._redis.aclose())
            self._runner.close()

    return SameDecisions


def test_the_script_decides_as_the_same_in_whole_numbers_of_any_size(
    redis_server: RedisServer,
) -> None:
    run_state_machine_as_test(
        state_machine(redis_server.url),
        settings=settings(
            max_examples=60,
            stateful_step_count=30,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )

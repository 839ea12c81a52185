"""The script against the same in whole numbers of any size."""

from __future__ import annotations

import asyncio
import itertools
from typing import TYPE_CHECKING, Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test
from tests.tenancy.conftest import PATIENT
from tests.tenancy.limiting import (
    NOW_US,
    SECOND_US,
    moved,
    tenant,
)

from tera.config.limits import LARGEST_BUDGET, LARGEST_LIMIT, Limits, TenantLimits
from tera.tenancy.limits import Scope, scopes_of
from tera.tenancy.local_limits import LocalLimiter
from tera.tenancy.pipelined import PipelinedRedis
from tera.tenancy.redis import connect
from tera.tenancy.redis_limits import RedisLimiter

if TYPE_CHECKING:
    from redis.asyncio import Redis
    from tests.tenancy.conftest import RedisServer


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
    calls: PipelinedRedis,
    limits: tuple[int, int],
    parts: tuple[float, float, float],
    elapsed_us: int,
) -> None:
    await redis.flushall()
    limiter = RedisLimiter(calls, lease_s=1e6, now_us=NOW_US)
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
            flushing: Any = self._redis.flushall()
            self._runner.run(flushing)
            self._calls = PipelinedRedis(self._redis.connection_pool, PATIENT)
            self._limiter = RedisLimiter(self._calls, lease_s=1e9, now_us=NOW_US)
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
            self._runner.run(self._calls.aclose())
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

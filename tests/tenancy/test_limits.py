from __future__ import annotations

from typing import Any

import pytest
from tests.tenancy.limiting import (
    admitted,
    refused,
)

from tera.config.limits import Limits, TenantLimits
from tera.errors import (
    ConcurrencyLimitError,
    QuotaError,
    RequestRateLimitError,
    TokenRateLimitError,
)
from tera.tenancy.limits import Refusal, scopes_of
from tera.tenancy.redis_limits import RedisLimiter


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

"""Limits of requests and tokens: what a request is counted for, and the answers of limits.

A request is admitted against *scopes*: its tenant, its model if the tenant has separate limits for
it, and its key. `redis_limits.py` counts them over all gateway replicas, and `local_limits.py` in
this process only, while Redis is away.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final, Literal

import msgspec

from tera.config.limits import Limits, TenantLimits
from tera.errors import (
    ConcurrencyLimitError,
    QuotaError,
    RateLimitError,
    RequestRateLimitError,
    TokenRateLimitError,
)

MOST: Final = 2**53 - 1
"""Larger numbers are cut to this: Redis's scripts count in doubles, which are exact up to here."""

Kind = Literal["requests", "tokens", "concurrency", "budget"]


@dataclass(frozen=True)
class Scope:
    """Something that requests are counted for, and its limits."""

    name: str
    """`tenant`, `model:<short name>` or `key:<key id>`."""
    limits: Limits

    @property
    def blocks(self) -> bool:
        """Whether one of its limits is 0, so that no request can pass."""
        return any(getattr(self.limits, name) == 0 for name in _COUNTED)

    @cached_property
    def line(self) -> str:
        """Its form for `limits.lua`; cached, since a scope lives as long as its limits."""
        limits = self.limits
        period = limits.budget_period or "month"
        numbers = (
            limits.requests_per_minute,
            limits.tokens_per_minute,
            limits.concurrent_requests,
            limits.token_budget,
        )
        written = " ".join("-" if number is None else str(number) for number in numbers)
        return f"{self.name} {written} {period}"


# Structs where every request creates some: that is ten times as fast as with frozen dataclasses.


class Allowance(msgspec.Struct, frozen=True, gc=False):
    """What is left of a per-minute limit, for the headers."""

    limit: int
    remaining: int
    reset_us: int
    """Time until all of it is back, if running requests use what they hold; 0 for a limit of 0."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """The limit that refuses a request; of several, the one with the longest wait."""

    kind: Kind
    scope: str
    limit: int
    wait_us: int | None
    """Time after which the request passes, if no others come; None means never."""
    tokens: int
    """The most that the request could use."""
    period: Literal["day", "month"] = "month"
    """The period of a budget."""

    @property
    def retryable(self) -> bool:
        """Whether waiting helps."""
        return self.wait_us is not None

    def error(self) -> RateLimitError:
        """Return the error that the client sees."""
        wait_s = None if self.wait_us is None else self.wait_us / 1e6
        return _ERRORS[self.kind](self._message(wait_s), retry_after_s=wait_s)

    def _message(self, wait_s: float | None) -> str:
        what = _WORDS[self.kind].format(limit=f"{self.limit:,}", period=self.period)
        whose = _whose(self.scope)
        if wait_s is not None:
            return f"{whose} has reached its limit of {what}. Try again in {wait_s:.3g} s."
        if self.limit == 0:
            return f"{whose} is blocked: it has a limit of {what}."
        if self.kind == "budget":
            return (
                f"{whose} has too little left of its budget of {what} for the {self.tokens:,} "
                "tokens that this request may use."
            )
        return (
            f"This request may use {self.tokens:,} tokens, prompt and completion together. "
            f"{whose} has a limit of {what}, so it can never pass; send a shorter prompt or a "
            "lower max_tokens."
        )


class Spent(msgspec.Struct, frozen=True, gc=False):
    """What a scope has used of its budget, and what its open requests hold of it."""

    scope: str
    period: str
    """The month or day in UTC, such as 2027-01 or 2027-01-31."""
    used: int
    held: int


class Admission(msgspec.Struct, frozen=True):
    """The answer to a request, and what is then left of the limits."""

    requests: Allowance | None
    """For the scope with the smallest share remaining; None if there is no limit."""
    tokens: Allowance | None
    refusal: Refusal | None = None
    """None if it was admitted; otherwise nothing was spent."""
    budgets: tuple[Spent, ...] = ()
    """For the scopes that have a budget."""


@dataclass(frozen=True, slots=True)
class Progress:
    """What a running request has used so far, which is charged if its end is never reported."""

    prompt_tokens: int
    """Prompt tokens that would be charged if it ended now."""
    completion_tokens: int


def scopes_of(
    tenant_limits: TenantLimits, key_limits: Limits | None, key_id: str, model_name: str | None
) -> list[Scope]:
    """Return the scopes that a request is counted for; without a model, those of every request.

    A limit that the tenant has for this model counts only the model's requests, and replaces the
    tenant's own; a key's limits apply in addition. Scopes without any limit are left out.

    Args:
        tenant_limits: the limits in force for the tenant.
        key_limits: the key's own limits; None means none.
        key_id: the key's id.
        model_name: the model's short name; None leaves out what a limit of some model replaces.
    """
    if model_name is None:
        of_model, of_models = _UNLIMITED, list(tenant_limits.models.values())
    else:
        of_model = tenant_limits.models.get(model_name, _UNLIMITED)
        of_models = [of_model]
    replaced = {name for name in _COUNTED for own in of_models if getattr(own, name) is not None}
    of_tenant = Limits(
        **{name: None if name in replaced else getattr(tenant_limits, name) for name in _COUNTED},
        budget_period=tenant_limits.budget_period,
    )
    scopes = (
        Scope("tenant", of_tenant),
        Scope(f"model:{model_name}", of_model),
        Scope(f"key:{key_id}", key_limits or _UNLIMITED),
    )
    return [
        scope
        for scope in scopes
        if any(getattr(scope.limits, name) is not None for name in _COUNTED)
    ]


def refusal_of(
    kind: Kind, name: str, limit: int, wait_us: int | None, tokens: int, scopes: Sequence[Scope]
) -> Refusal:
    """Return the refusal by a limit of one of the scopes."""
    period = next(scope.limits.budget_period for scope in scopes if scope.name == name)
    return Refusal(kind, name, limit, wait_us, tokens, period or "month")


_COUNTED: Final = (
    "requests_per_minute",
    "tokens_per_minute",
    "concurrent_requests",
    "token_budget",
)
_UNLIMITED: Final = Limits()
_ERRORS: Final[Mapping[Kind, type[RateLimitError]]] = {
    "requests": RequestRateLimitError,
    "tokens": TokenRateLimitError,
    "concurrency": ConcurrencyLimitError,
    "budget": QuotaError,
}
_WORDS: Final[Mapping[Kind, str]] = {
    "requests": "{limit} requests per minute",
    "tokens": "{limit} tokens per minute",
    "concurrency": "{limit} concurrent requests",
    "budget": "{limit} tokens per {period}",
}


def _whose(scope: str) -> str:
    kind, _, name = scope.partition(":")
    if kind == "model":
        return f"This tenant's use of the model {name}"
    return "This API key" if kind == "key" else "This tenant"

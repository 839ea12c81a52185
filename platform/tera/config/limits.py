"""What tenants and keys may use at the most."""

from typing import Final, Literal

from pydantic import Field

from tera.config.names import ModelName, TenantName
from tera.config.section import Section

LARGEST_LIMIT: Final = 1_000_000_000
"""Largest limit of requests or tokens a minute, and of requests at once.

With it, what Redis's script computes in microseconds stays within what a double holds exactly.
"""
LARGEST_BUDGET: Final = 1_000_000_000_000_000
"""Largest budget in tokens; below 2**53, so that the doubles of Redis's scripts hold it exactly."""


class Limits(Section):
    """What may be used at most: 0 blocks, absent is unlimited."""

    requests_per_minute: int | None = Field(default=None, ge=0, le=LARGEST_LIMIT)
    """Requests that are admitted in a minute."""
    tokens_per_minute: int | None = Field(default=None, ge=0, le=LARGEST_LIMIT)
    """Prompt and completion tokens together."""
    concurrent_requests: int | None = Field(default=None, ge=0, le=LARGEST_LIMIT)
    """Requests in flight at once."""
    token_budget: int | None = Field(default=None, ge=0, le=LARGEST_BUDGET)
    """Prompt and completion tokens of one `budgetPeriod`."""
    budget_period: Literal["day", "month"] | None = None
    """A calendar day or month in UTC; a month unless said."""


class TenantLimits(Limits):
    """The limits of one tenant, over all of its keys."""

    weight: int | None = Field(default=None, ge=1, le=100)
    """The tenant's share in tokens while requests wait for replicas, beside those of other tenants
    that wait; 1 unless said."""
    models: dict[ModelName, Limits] = Field(default_factory=dict)
    """By a model's short name. A limit given here counts that model's requests alone, in the
    place of the tenant's own."""


class LimitsConfig(Section):
    """Limits of tenants; editing them restarts nothing."""

    default: TenantLimits = TenantLimits()
    """Where neither `tenants` nor `tera tenants set` says anything of a tenant's limit."""
    tenants: dict[TenantName, TenantLimits] = Field(default_factory=dict)
    """By tenant; each limit that is absent here is `default`'s."""
    on_redis_error: Literal["local", "closed"] = "local"
    """While Redis is away: `local` goes on with this gateway replica's share of each limit,
    `closed` refuses every request."""

"""How much tenants and keys may use."""

from typing import Final, Literal

from pydantic import Field

from tera.config.names import ModelName, TenantName
from tera.config.section import Section

LARGEST_LIMIT: Final = 1_000_000_000
"""Largest possible limit on requests or tokens per minute, and on concurrent requests.

It keeps the microseconds that Redis's script computes within what a double holds exactly.
"""
LARGEST_BUDGET: Final = 1_000_000_000_000_000
"""Largest token budget; below 2**53, so that the doubles of Redis's scripts hold it exactly."""


class Limits(Section):
    """Upper bounds on use: 0 blocks all requests, absent means unlimited."""

    requests_per_minute: int | None = Field(default=None, ge=0, le=LARGEST_LIMIT)
    """Requests admitted per minute."""
    tokens_per_minute: int | None = Field(default=None, ge=0, le=LARGEST_LIMIT)
    """Prompt plus completion tokens per minute."""
    concurrent_requests: int | None = Field(default=None, ge=0, le=LARGEST_LIMIT)
    """Requests in flight at once."""
    token_budget: int | None = Field(default=None, ge=0, le=LARGEST_BUDGET)
    """Prompt plus completion tokens per `budgetPeriod`."""
    budget_period: Literal["day", "month"] | None = None
    """A calendar day or month in UTC; absent means a month."""


class TenantLimits(Limits):
    """The limits of one tenant, shared by all its keys."""

    weight: int | None = Field(default=None, ge=1, le=100)
    """The tenant's share of tokens, relative to other waiting tenants, while requests wait for
    replicas; absent means 1."""
    models: dict[ModelName, Limits] = Field(default_factory=dict)
    """By a model's short name. A limit given here counts only that model's requests, and replaces
    the tenant's own for them."""


class LimitsConfig(Section):
    """Tenants' limits; editing them restarts nothing."""

    default: TenantLimits = TenantLimits()
    """Used for each limit of a tenant that neither `tenants` nor `tera tenants set` gives."""
    tenants: dict[TenantName, TenantLimits] = Field(default_factory=dict)
    """By tenant; a limit that is absent here comes from `default`."""
    on_redis_error: Literal["local", "closed"] = "local"
    """What to do while Redis cannot be reached: with `local` each gateway replica enforces its
    share of each limit, with `closed` it refuses every request."""
    stale_keys_seconds: float = Field(default=86_400, gt=0)
    """How long a gateway replica that cannot reach Redis accepts the keys it knows, some of which
    may have been revoked; after that it refuses every request."""

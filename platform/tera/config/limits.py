"""What tenants and keys may use at the most."""

from typing import Literal

from pydantic import Field

from tera.config.names import ModelName, TenantName
from tera.config.section import Section


class Limits(Section):
    """What may be used at most: 0 blocks, absent is unlimited."""

    requests_per_minute: int | None = Field(default=None, ge=0)
    """Requests that are admitted in a minute."""
    tokens_per_minute: int | None = Field(default=None, ge=0)
    """Prompt and completion tokens together."""
    concurrent_requests: int | None = Field(default=None, ge=0)
    """Requests in flight at once."""
    token_budget: int | None = Field(default=None, ge=0)
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

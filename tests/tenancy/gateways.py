"""One gateway replica's admissions, and what requests do with them."""

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from redis.asyncio import Redis

from tera.config.limits import LimitsConfig, TenantLimits
from tera.errors import RequestRateLimitError
from tera.tenancy.admission import Admissions, Intervals, Reservation
from tera.tenancy.keys import ApiKey
from tera.tenancy.limits import Admission, Progress
from tera.tenancy.redis import connect
from tera.tenancy.usage import UsageLedger, UsageRecord

KEY = ApiKey("key_1", "acme", "", "", None, 0.0)
INTERVALS = Intervals()
STREAM, LIMITS = "tera:{acme}:usage", "tera:{acme}:limits"


@dataclass
class Gateway:
    """One gateway replica's admissions, and what a request does with them."""

    admissions: Admissions
    told: list[Admission] = field(default_factory=list)
    made: int = 0

    async def admit(self, tokens: int = 10, key: ApiKey = KEY) -> Reservation:
        self.made += 1
        request_id = f"req_{id(self)}_{self.made}"
        opening = UsageRecord(request_id, key.tenant, key.key_id, "m", "/v1", "lost", time.time())
        return await self.admissions.admit(
            key, opening, tokens, progress=lambda: Progress(3, 4), told=self.told.append
        )

    def finish(self, held: Reservation, prompt_tokens: int = 5, completion_tokens: int = 2) -> None:
        opening = held.opening
        held.settle(
            UsageRecord(
                opening.request_id,
                opening.tenant,
                opening.key_id,
                opening.model,
                opening.route,
                "finished",
                opening.started_s,
                prompt_tokens,
                0,
                completion_tokens,
            )
        )


class Keyring:
    """A snapshot in which nothing is stored of tenants."""

    def tenant_limits(self, name: str) -> TenantLimits | None:
        return None


@asynccontextmanager
async def gateway(
    url: str, name: str = "one", intervals: Intervals = INTERVALS, **config: Any
) -> AsyncIterator[Gateway]:
    limits = LimitsConfig(**config)
    redis = connect(url, timeout_s=1.0)
    try:
        async with Admissions(
            redis, Keyring(), lambda: limits, name, intervals=intervals
        ) as admissions:
            yield Gateway(admissions)
    finally:
        await redis.aclose()


async def records(redis: Redis) -> list[UsageRecord]:
    return [record async for record in UsageLedger(redis).records(since_s=0, until_s=4e9)]


async def counted(redis: Redis) -> dict[str, int]:
    """Return how often Redis has run each command."""
    stats = await redis.info("commandstats")
    return {name.removeprefix("cmdstat_"): found["calls"] for name, found in stats.items()}


def tenant(**limits: int) -> TenantLimits:
    return TenantLimits(**limits)  # type: ignore[arg-type]


async def has_records(redis: Redis, count: int) -> bool:
    return await redis.xlen(STREAM) == count


async def admitted_in_a_row(one: Gateway) -> int:
    """Return how many requests are admitted before the first that is not."""
    for count in range(1000):
        try:
            await one.admit()
        except RequestRateLimitError:
            return count
    raise AssertionError("nothing is refused")


async def has_all(redis: Redis, request_ids: set[str]) -> bool:
    return request_ids <= {record.request_id for record in await records(redis)}

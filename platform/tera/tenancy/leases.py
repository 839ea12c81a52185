"""Leases: renews those of running requests, and reclaims what dead gateway replicas held."""

import asyncio
import random
from collections.abc import Callable, Mapping
from typing import Final

from redis.asyncio import Redis

from tera.background import Background
from tera.tenancy.limits import Progress
from tera.tenancy.redis import Attempts
from tera.tenancy.redis_limits import RedisLimiter, tenants_with_leases
from tera.tenancy.redis_watch import RedisWatch

RECLAIMING: Final = "tera:reclaiming"
"""Lock of the replica that looks for requests that others have left behind."""

Running = Mapping[str, Mapping[str, Progress]]
"""What the requests admitted by Redis have used so far, by tenant and request id."""


class LeaseRenewal(Background):
    """Reports every few seconds that this replica's requests still run, and what they have used."""

    def __init__(
        self,
        limiter: RedisLimiter,
        watch: RedisWatch,
        running: Callable[[], Running],
        interval_s: float,
    ) -> None:
        """`interval_s` should be a third of a lease, so that two renewals may be lost."""
        self._limiter = limiter
        self._watch = watch
        self._running = running
        self._interval_s = interval_s
        self._attempts = Attempts("Renewing the leases of running requests")

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._interval_s)
            await self._watch.wait_until_back()
            for tenant, progress in self._running().items():
                renewed = await self._attempts.make(self._limiter.renew(tenant, progress))
                if renewed is None:
                    break


class Reclaimer(Background):
    """Closes requests of dead replicas for tenants that send no more; one replica does it."""

    def __init__(
        self, redis: Redis, limiter: RedisLimiter, replica_id: str, interval_s: float
    ) -> None:
        """Looks once per `interval_s`, over all replicas; the caller closes `redis`."""
        self._redis = redis
        self._limiter = limiter
        self._replica_id = replica_id
        self._interval_s = interval_s
        self._attempts = Attempts("Closing the requests of replicas that are gone")

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._interval_s * random.uniform(0.5, 1))  # noqa: S311  not a secret
            await self._attempts.make(self._reclaim())

    async def _reclaim(self) -> None:
        mine = await self._redis.set(
            RECLAIMING, self._replica_id, nx=True, px=int(1000 * self._interval_s)
        )
        if mine:
            async for tenant in tenants_with_leases(self._redis):
                await self._limiter.reclaim(tenant)

"""Counts the gateway replicas by the heartbeat that each of them writes to Redis."""

import asyncio
import logging
from collections.abc import Callable
from types import TracebackType
from typing import Final

from redis.asyncio import Redis
from redis.exceptions import RedisError

from tera.background import Background
from tera.tenancy.redis import Attempts

logger = logging.getLogger(__name__)

REPLICAS: Final = "tera:gateways"
"""Sorted set: gateway replica → Unix second until which it counts as alive."""
LIFE_S: Final = 10.0


class Heartbeat(Background):
    """Keeps this replica counted as alive while its block runs, and counts the others."""

    def __init__(
        self, redis: Redis, replica_id: str, clock: Callable[[], float], interval_s: float
    ) -> None:
        """The caller closes `redis`; `clock` gives Unix seconds."""
        self._redis = redis
        self._replica_id = replica_id
        self._clock = clock
        self._interval_s = interval_s
        self._attempts = Attempts("The heartbeat of this gateway replica")
        self.replicas = 1
        """How many were alive when Redis was last asked, including this one."""

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop, and count as gone at once."""
        await super().__aexit__(exc_type, exc, traceback)
        try:
            await self._redis.zrem(REPLICAS, self._replica_id)
        except RedisError as error:
            logger.info("This replica counts as alive for %.0f s more: %s", LIFE_S, error)

    async def _run(self) -> None:
        while True:
            alive = await self._attempts.make(self._beat())
            if alive is not None:
                self.replicas = max(1, alive)
            await asyncio.sleep(self._interval_s)

    async def _beat(self) -> int:
        now_s = self._clock()
        pipeline = self._redis.pipeline(transaction=True)
        pipeline.zadd(REPLICAS, {self._replica_id: now_s + LIFE_S})
        pipeline.zremrangebyscore(REPLICAS, "-inf", now_s)
        pipeline.zcard(REPLICAS)
        return int((await pipeline.execute())[-1])

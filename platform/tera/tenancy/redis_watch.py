"""Tracks whether Redis is away, as seen by one gateway replica."""

import asyncio
import logging
from collections.abc import Callable
from typing import Final

from redis.exceptions import RedisError

from tera.background import Background
from tera.tenancy.pipelined import PipelinedRedis

logger = logging.getLogger(__name__)

PROBE: Final = "tera:probe:"
"""Prefix of the key that a probe writes; the replica's id follows."""
_PROBE_LIFE_S: Final = 10


class RedisWatch(Background):
    """Is told when a call finds Redis away, and probes once a second until it is back.

    A probe is a write, over the connection that requests will use: a server that is full, or has
    become a replica, answers but is of no use.
    """

    def __init__(
        self,
        redis: PipelinedRedis,
        replica_id: str,
        clock: Callable[[], float],
        probe_interval_s: float,
    ) -> None:
        """Redis counts as available until a call fails.

        Args:
            redis: the connection to probe.
            replica_id: part of the key that is written.
            clock: seconds, for the log.
            probe_interval_s: time from finding it away to the first probe, and between probes.
        """
        self._redis = redis
        self._key = PROBE + replica_id
        self._clock = clock
        self._probe_interval_s = probe_interval_s
        self._gone, self._back = asyncio.Event(), asyncio.Event()
        self._back.set()
        self.outages = 0
        """How often Redis has been found to be away since the start."""

    @property
    def away(self) -> bool:
        """Whether Redis is away, so that nothing should wait for it."""
        return self._gone.is_set()

    async def wait_until_back(self) -> None:
        """Return when Redis is available, at once if it is."""
        await self._back.wait()

    def mark_away(self, error: BaseException) -> None:
        """Report that a call has failed in a way that the next one would too."""
        if not self.away:
            self.outages += 1
            self._back.clear()
            self._gone.set()
            logger.warning("Redis is away (%s); limits hold by this replica's share.", error)

    async def _run(self) -> None:
        while True:
            await self._gone.wait()
            began = self._clock()
            await self._probe_until_it_answers()
            logger.info("Redis is back after %.1f s.", self._clock() - began)
            self._gone.clear()
            self._back.set()

    async def _probe_until_it_answers(self) -> None:
        while True:
            await asyncio.sleep(self._probe_interval_s)
            try:
                # Connect before the write: a login may take longer than any call may wait.
                await self._redis.open()
                await self._redis.call("SET", self._key, 1, "EX", _PROBE_LIFE_S)
            except RedisError as error:
                logger.debug("Redis is still away: %s", error)
            else:
                return

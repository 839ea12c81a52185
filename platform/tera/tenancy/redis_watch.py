"""Whether Redis is away, as one gateway replica finds out."""

import asyncio
import logging
from collections.abc import Callable
from typing import Final

from redis.exceptions import RedisError

from tera.background import Background
from tera.tenancy.pipelined import PipelinedRedis

logger = logging.getLogger(__name__)

PROBE: Final = "tera:probe:"
"""Key that a probe writes, with the replica's id after it."""
_PROBE_LIFE_S: Final = 10


class RedisWatch(Background):
    """Is told when a call finds Redis away, and finds out by one probe a second when it is back.

    A probe is a write, over the connection that requests will use: a server that is full, or was
    made a replica, answers and is of no use.
    """

    def __init__(
        self,
        redis: PipelinedRedis,
        replica_id: str,
        clock: Callable[[], float],
        probe_interval_s: float,
    ) -> None:
        """Redis counts as there, until somebody finds that it is not.

        Args:
            redis: what is probed.
            replica_id: names the key that is written.
            clock: seconds, for the log.
            probe_interval_s: from finding it away to the first probe, and between two of them.
        """
        self._redis = redis
        self._key = PROBE + replica_id
        self._clock = clock
        self._probe_interval_s = probe_interval_s
        self._gone, self._back = asyncio.Event(), asyncio.Event()
        self._back.set()
        self.outages = 0
        """Times since the start that Redis was found to be away."""

    @property
    def away(self) -> bool:
        """Redis is away: nobody is to wait for it."""
        return self._gone.is_set()

    async def wait_until_back(self) -> None:
        """Return when Redis is not away, at once if it is not."""
        await self._back.wait()

    def mark_away(self, error: BaseException) -> None:
        """Tell that a call has failed as the next one would."""
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
                # Apart from the write, for a login may take longer than any call may wait.
                await self._redis.open()
                await self._redis.call("SET", self._key, 1, "EX", _PROBE_LIFE_S)
            except RedisError as error:
                logger.debug("Redis is still away: %s", error)
            else:
                return

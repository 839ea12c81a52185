"""When keys were last used, written down once a minute."""

import logging
import math
from collections.abc import Callable
from typing import Final

from redis.asyncio import Redis
from redis.exceptions import ResponseError

from tera.tenancy.keys import KEYS, LAST_USED
from tera.tenancy.redis import is_full

logger = logging.getLogger(__name__)

_INTERVAL_S: Final = 60.0
_AT_A_TIME: Final = 1000
"""Keys in one call of the script: about two milliseconds of Redis's time."""

# Gateway replicas write in any order, so the later use wins; a key that was revoked meanwhile
# leaves nothing behind.
_TOUCH_SCRIPT: Final = """
for i = 1, #ARGV, 2 do
  local known = tonumber(redis.call('HGET', KEYS[2], ARGV[i]) or '-inf')
  if redis.call('HEXISTS', KEYS[1], ARGV[i]) == 1 and tonumber(ARGV[i + 1]) > known then
    redis.call('HSET', KEYS[2], ARGV[i], ARGV[i + 1])
  end
end
"""


class LastUsed:
    """The last use of each key that Redis does not know of yet."""

    def __init__(self, redis: Redis, clock: Callable[[], float]) -> None:
        """`redis` stays the caller's to close; `clock` gives Unix seconds."""
        self._redis = redis
        self._clock = clock
        self._used_s: dict[str, float] = {}
        self._written_s = -math.inf

    def note(self, key_id: str, now_s: float) -> None:
        """Take note that a key is used now."""
        self._used_s[key_id] = now_s

    async def write_due(self) -> None:
        """Write what there is, unless that was done less than a minute ago.

        Raises:
            RedisError: Redis cannot be reached; what is not written yet is kept.
        """
        if self._used_s and self._clock() - self._written_s >= _INTERVAL_S:
            self._written_s = self._clock()
            await self.write()

    async def write(self) -> None:
        """Write what there is; see `write_due`."""
        rest = list(self._used_s.items())
        self._used_s = {}
        try:
            while rest:
                pairs = [part for name, used_s in rest[:_AT_A_TIME] for part in (name, used_s)]
                await self._redis.eval(_TOUCH_SCRIPT, 2, KEYS, LAST_USED, *pairs)
                del rest[:_AT_A_TIME]
        except ResponseError as error:
            # A full Redis must not keep anybody from following the keys.
            if not is_full(error):
                raise
            logger.debug("When keys were last used is not written down now: %s", error)
        finally:
            for name, used_s in rest:
                self._used_s.setdefault(name, used_s)

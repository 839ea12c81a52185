"""How full Redis is, and whether it would give up keys or limits to make room."""

import asyncio
import logging
from dataclasses import dataclass
from typing import Any, Final

from redis.asyncio import Redis

from tera.background import Background
from tera.tenancy.redis import Attempts

logger = logging.getLogger(__name__)

INTERVAL_S: Final = 15.0
_KEEPS_ALL: Final = "noeviction"


@dataclass(frozen=True, slots=True)
class Memory:
    """What Redis said last."""

    used_bytes: int = 0
    max_bytes: int = 0
    """`maxmemory`; 0 is none."""


class RedisMemory(Background):
    """Asks Redis for its memory a few times a minute, as long as the block runs."""

    def __init__(self, redis: Redis, interval_s: float = INTERVAL_S) -> None:
        """`redis` stays the caller's to close."""
        self._redis = redis
        self._interval_s = interval_s
        self._attempts = Attempts("Asking Redis for its memory")
        self._warned = False
        self.memory = Memory()
        """Zeros before Redis was asked."""

    async def _run(self) -> None:
        while True:
            info = await self._attempts.make(self._redis.info("memory"))
            if info is not None:
                self._read(info)
            await asyncio.sleep(self._interval_s)

    def _read(self, info: dict[str, Any]) -> None:
        self.memory = Memory(int(info.get("used_memory", 0)), int(info.get("maxmemory", 0)))
        policy = info.get("maxmemory_policy", _KEEPS_ALL)
        evicts = self.memory.max_bytes > 0 and policy != _KEEPS_ALL
        if evicts and not self._warned:
            logger.warning(
                "Redis may evict limits and keys when it is full (maxmemory-policy %s): "
                "set it to %s.",
                policy,
                _KEEPS_ALL,
            )
        self._warned = evicts

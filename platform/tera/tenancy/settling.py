"""Reports ended requests to Redis: soon, or when it is back."""

import asyncio
import logging
from collections import deque
from collections.abc import Sequence
from typing import Final, NamedTuple

from redis.exceptions import RedisError

from tera.background import Background
from tera.tenancy.limits import Scope
from tera.tenancy.redis import is_refusal
from tera.tenancy.redis_limits import Ended, RedisLimiter
from tera.tenancy.redis_watch import RedisWatch
from tera.tenancy.usage import UsageRecord, encode_record

logger = logging.getLogger(__name__)

MAX_UNSETTLED: Final = 100_000
"""Ended requests kept while Redis is away, about 100 MB; after that the oldest are given up."""
BATCH: Final = 100
"""Requests settled in one round trip, which keeps Redis busy for a few milliseconds."""
GATHER_S: Final = 0.01
DRAIN_S: Final = 5.0


class _Unsettled(NamedTuple):
    record: UsageRecord
    scopes: Sequence[Scope] | None
    """The scopes of a request that ran without Redis."""

    def ended(self) -> Ended:
        record = self.record
        return Ended(
            record.tenant,
            record.request_id,
            record.prompt_tokens + record.completion_tokens,
            encode_record(record),
            self.scopes,
        )


class Settler(Background):
    """Settles ended requests in the order in which they ended, many in one round trip.

    Settling twice charges once, so if in doubt, a request is settled again.
    """

    def __init__(
        self,
        limiter: RedisLimiter,
        watch: RedisWatch,
        *,
        most_unsettled: int = MAX_UNSETTLED,
        drain_s: float = DRAIN_S,
    ) -> None:
        """Start with no ended requests.

        Args:
            limiter: settles them.
            watch: says when to wait for Redis, and is told when it fails.
            most_unsettled: if there are more, the oldest are given up.
            drain_s: how long leaving the block may take.
        """
        self._limiter = limiter
        self._watch = watch
        self._most_unsettled = most_unsettled
        self._drain_s = drain_s
        self._unsettled: deque[_Unsettled] = deque()
        self._settling: list[_Unsettled] = []
        self._work = asyncio.Event()
        self.given_up = 0
        """Records given up since the start: they are in the log but not in the ledger."""

    @property
    def unsettled(self) -> int:
        """Ended requests whose record is not in the ledger yet."""
        return len(self._unsettled) + len(self._settling)

    def add(self, record: UsageRecord, scopes: Sequence[Scope] | None) -> None:
        """Add an ended request, with its `scopes` if it ran without Redis."""
        self._unsettled.append(_Unsettled(record, scopes))
        if len(self._unsettled) > self._most_unsettled:
            self._give_up(self._unsettled.popleft(), "Redis has been away for too long")
        self._work.set()

    async def drain(self) -> None:
        """Settle what is left, for some seconds at most; the rest is given up."""
        before = len(self._unsettled) + 1
        try:
            async with asyncio.timeout(self._drain_s):
                while 0 < len(self._unsettled) < before:  # as long as there is progress
                    before = len(self._unsettled)
                    await self._settle_some()
        except TimeoutError:
            logger.warning("Settling ended requests takes longer than %.0f s.", self._drain_s)
        while self._unsettled:
            self._give_up(self._unsettled.popleft(), "this replica ends while Redis is away")

    async def _run(self) -> None:
        while True:
            await self._watch.wait_until_back()
            if not self._unsettled:
                self._work.clear()
                await self._work.wait()
                # Nobody waits for this, and settling many at a time is cheaper for Redis and for
                # us.
                await asyncio.sleep(GATHER_S)
                continue
            try:
                await self._settle_some()
            except Exception:
                # The edge of this task: if it ended, nothing would be settled any more.
                logger.exception("Settling failed; trying again.")
                await asyncio.sleep(1.0)

    async def _settle_some(self) -> None:
        batch = self._settling = [
            self._unsettled.popleft() for _ in range(min(BATCH, len(self._unsettled)))
        ]
        again = batch  # unless the outcome of each is known
        try:
            failures = await self._limiter.end_all(each.ended() for each in batch)
            again = [
                each
                for each, failure in zip(batch, failures, strict=True)
                if failure is not None and not self._is_final(each, failure)
            ]
        finally:
            self._settling = []
            self._unsettled.extendleft(reversed(again))  # first in line again

    def _is_final(self, each: _Unsettled, failure: RedisError) -> bool:
        """Return whether a request can never be settled, so that its record is given up."""
        if is_refusal(failure):
            self._give_up(each, failure)
            return True
        self._watch.mark_away(failure)
        return False

    def _give_up(self, each: _Unsettled, reason: object) -> None:
        """Write a record only to the log, from which it can be added to the ledger by hand."""
        self.given_up += 1
        logger.error("Not in the ledger (%s): %s", reason, encode_record(each.record).decode())

"""Decides which requests may start now, and keeps what each one holds until it is settled.

With Redis, a request makes one call to be admitted and one, which no client waits for, to be
settled. Without it (away, frozen, slow or full) this replica enforces its share of every limit, or
refuses requests, as `limits.onRedisError` says.
"""

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self

from msgspec import structs
from redis.asyncio import Redis
from redis.exceptions import RedisError

from tera.config.limits import LimitsConfig
from tera.errors import InternalError
from tera.tenancy.heartbeat import Heartbeat
from tera.tenancy.keys import ApiKey
from tera.tenancy.leases import LeaseRenewal, Reclaimer
from tera.tenancy.limits import Admission, Progress, Scope, refusal_of
from tera.tenancy.local_limits import LocalLimiter
from tera.tenancy.pipelined import PipelinedRedis
from tera.tenancy.redis import is_refusal
from tera.tenancy.redis_limits import RedisLimiter
from tera.tenancy.redis_watch import RedisWatch
from tera.tenancy.refusals import Refusals
from tera.tenancy.scopes import EffectiveScopes, Keyring
from tera.tenancy.settling import Settler
from tera.tenancy.usage import UsageRecord, encode_record

logger = logging.getLogger(__name__)

AT_A_TIME: Final = 256
"""Requests being admitted at a time: a few tens of milliseconds of Redis's time. More would only
wait in Redis, and use memory there and here."""


CONCURRENCY_WAIT_US: Final = 1_000_000
"""How long a client waits after a refusal by concurrency, the same as in `limits.lua`: nobody knows
when a running request will end."""


@dataclass(frozen=True, slots=True)
class Intervals:
    """Intervals of the background work, in seconds."""

    probe_s: float = 1.0
    renew_s: float = 10.0
    """A third of a lease: two renewals may be lost."""
    heartbeat_s: float = 2.0
    reclaim_s: float = 10.0


_INTERVALS: Final = Intervals()


class Reservation:
    """What one running request holds; it must be settled, whatever happened to the request."""

    def __init__(
        self,
        admissions: "Admissions",
        opening: UsageRecord,
        progress: Callable[[], Progress],
        admission: Admission,
        local_scopes: list[Scope] | None,
    ) -> None:
        self.opening = opening
        self.admission = admission
        """What was left of the limits when it was admitted."""
        self.progress = progress
        """What has been used so far."""
        self.local_scopes = local_scopes
        """The scopes, if it was counted only by this replica, while Redis was away; else None."""
        self._admissions = admissions
        self._settled = False

    @property
    def local(self) -> bool:
        """Whether it was admitted by this replica alone."""
        return self.local_scopes is not None

    def settle(self, record: UsageRecord) -> None:
        """Release what is held, charge what `record` says, and write it to the ledger.

        Returns at once; the work is done soon, or when Redis is back. Only the first call counts.
        """
        if not self._settled:
            self._settled = True
            self._admissions.settle(self, record)


class Admissions:
    """Admits requests of this gateway replica; an async context manager with its own tasks."""

    def __init__(
        self,
        redis: Redis,
        keyring: Keyring,
        config: Callable[[], LimitsConfig],
        replica_id: str,
        clock: Callable[[], float] = time.time,
        intervals: Intervals = _INTERVALS,
    ) -> None:
        """`redis` is a client with a time-out, which the caller closes.

        Args:
            redis: holds limits and ledger; requests use a separate connection to it.
            keyring: knows what is stored about tenants.
            config: returns the limits in the values, called for each request.
            replica_id: names this replica's heartbeat.
            clock: Unix seconds.
            intervals: of the background work.
        """
        self._config = config
        self._calls = PipelinedRedis(redis.connection_pool)
        self._limiter = limiter = RedisLimiter(self._calls)
        self._local = LocalLimiter()
        self._scopes = EffectiveScopes(keyring, config)
        self._refusals = Refusals()
        self._at_a_time = asyncio.Semaphore(AT_A_TIME)
        self._running: dict[str, Reservation] = {}
        self._watch = watch = RedisWatch(self._calls, replica_id, clock, intervals.probe_s)
        self._settler = Settler(limiter, watch)
        self._heartbeat = Heartbeat(redis, replica_id, clock, intervals.heartbeat_s)
        self._beside = (
            self._heartbeat,
            LeaseRenewal(limiter, watch, self._progress, intervals.renew_s),
            Reclaimer(redis, limiter, replica_id, intervals.reclaim_s),
        )
        self._stack: AsyncExitStack

    @property
    def degraded(self) -> bool:
        """Whether Redis is away, so that this replica enforces its share of the limits."""
        return self._watch.away

    @property
    def outages(self) -> int:
        """How often Redis has been found to be away since the start."""
        return self._watch.outages

    @property
    def replicas(self) -> int:
        """How many gateway replicas were alive when Redis was last asked."""
        return self._heartbeat.replicas

    @property
    def unsettled(self) -> int:
        """Ended requests whose record is not in the ledger yet."""
        return self._settler.unsettled

    @property
    def given_up(self) -> int:
        """Records given up since the start, because Redis was away for too long."""
        return self._settler.given_up

    async def __aenter__(self) -> Self:
        """Connect, and start the background work.

        Raises:
            InternalError: the installed redis-py cannot be used.
        """
        async with AsyncExitStack() as stack:
            stack.push_async_callback(self._calls.aclose)
            try:
                await self._calls.open()
            except RedisError as error:
                self._watch.mark_away(error)
            # Left in reverse order: ended requests are settled after everything else has stopped.
            stack.push_async_callback(self._settler.drain)
            for part in (self._watch, self._settler, *self._beside):
                await stack.enter_async_context(part)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Settle ended requests, for some seconds at most, and stop."""
        await self._stack.aclose()

    async def admit(
        self,
        key: ApiKey,
        opening: UsageRecord,
        tokens: int,
        *,
        progress: Callable[[], Progress],
        told: Callable[[Admission], None],
    ) -> Reservation:
        """Admit a request; return what it holds until it is settled.

        Args:
            key: whose request it is.
            opening: its record, which remains if it is never settled.
            tokens: the most that it can use.
            progress: returns what it has used so far.
            told: called with what is left of the limits, whether it is admitted or not.

        Raises:
            TeraError: a limit is reached (429), or Redis is away and the policy is `closed`.
        """
        scopes = self.scopes(key, opening.model)
        asked_at = asyncio.get_running_loop().time()
        admission = self._refusals.again(key, opening.model, scopes, asked_at)
        if admission is None and not self._watch.away:
            admission = await self._ask(key, opening, scopes, tokens)
            if admission is not None and admission.refusal is not None:
                self._refusals.remember(key, opening.model, scopes, admission, asked_at)
                # If no limit depends on the model, the next body need not be read to be refused.
                whatever = self._scopes.of(key, None)
                if whatever == scopes:
                    self._refusals.remember(key, None, whatever, admission, asked_at)
        local_scopes = None
        if admission is None:
            local_scopes = scopes
            admission = self._admit_here(key.tenant, opening, scopes, tokens)
        # Should Redis be away next, this replica knows how much of each budget is left.
        elif admission.budgets:
            self._local.know(key.tenant, admission.budgets)
        told(admission)
        if admission.refusal is not None:
            raise admission.refusal.error()
        held = Reservation(self, opening, progress, admission, local_scopes)
        self._running[opening.request_id] = held
        return held

    async def refuse_early(
        self, key: ApiKey, opening: UsageRecord, *, told: Callable[[Admission], None]
    ) -> None:
        """Raise if the limits refuse every request of this key, whichever model it names.

        Nothing is spent, and Redis is asked only about a blocked key. A request that passes here
        may still be refused by `admit`. See docs/decisions/0009-limits-before-a-body.md.

        Args:
            key: the key that sent the request.
            opening: the request's record, without a model yet.
            told: receives what is left of the limits if the request is refused.

        Raises:
            TeraError: as `admit` does.
        """
        scopes = self._scopes.of(key, None)
        asked_at = asyncio.get_running_loop().time()
        admission = self._refusals.again(key, None, scopes, asked_at)
        if admission is None and any(scope.blocks for scope in scopes):
            # A limit of 0 admits nothing, so this cannot spend anything.
            admission = None if self._watch.away else await self._ask(key, opening, scopes, 1)
            if admission is not None:
                self._refusals.remember(key, None, scopes, admission, asked_at)
            else:
                admission = self._admit_here(key.tenant, opening, scopes, 1)
        elif admission is None:
            admission = self._as_many_as_may_run(key, scopes)
        if admission is not None and admission.refusal is not None:
            told(admission)
            raise admission.refusal.error()

    def _as_many_as_may_run(self, key: ApiKey, scopes: list[Scope]) -> Admission | None:
        """Return a refusal if this replica alone already runs as many requests as are allowed."""
        limits = {scope.name: scope.limits.concurrent_requests for scope in scopes}
        if not any(limits.values()):
            return None
        mine = [held for held in self._running.values() if held.opening.tenant == key.tenant]
        of_key = [held for held in mine if held.opening.key_id == key.key_id]
        running = {"tenant": len(mine), f"key:{key.key_id}": len(of_key)}
        full = [name for name, limit in limits.items() if limit and running[name] >= limit]
        # The other limits' figures are those of the key's last request, if it has the same limits.
        if not full or not of_key or self.scopes(key, of_key[-1].opening.model) != scopes:
            return None
        limit = limits[full[0]]
        assert limit is not None
        refusal = refusal_of("concurrency", full[0], limit, CONCURRENCY_WAIT_US, 0, scopes)
        return structs.replace(of_key[-1].admission, refusal=refusal, budgets=())

    def scopes(self, key: ApiKey, model: str) -> list[Scope]:
        """Return the scopes that now limit a request of this key for this model."""
        return self._scopes.of(key, model)

    def weight(self, key: ApiKey, model: str) -> int:
        """Return the current weight of the key's tenant in the queue for replicas."""
        return self._scopes.weight(key, model)

    def most_tokens(self, key: ApiKey, model: str) -> int | None:
        """Return the most tokens that the limits can ever admit; None means no limit."""
        return self._scopes.most_tokens(key, model)

    def settle(self, held: Reservation, record: UsageRecord) -> None:
        """See `Reservation.settle`."""
        # No longer renewed: if it cannot be settled soon, its lease ends and it is charged as lost.
        self._running.pop(record.request_id, None)
        if held.local:
            used_tokens = record.prompt_tokens + record.completion_tokens
            self._local.settle(record.tenant, record.request_id, used_tokens)
        self._settler.add(record, held.local_scopes)

    async def _ask(
        self, key: ApiKey, opening: UsageRecord, scopes: list[Scope], tokens: int
    ) -> Admission | None:
        """Return Redis's answer to a request, or None if Redis is away."""

        def give_back(admission: Admission) -> None:
            """Settle a request that was admitted after its client had left."""
            if admission.refusal is None:
                record = structs.replace(opening, status="cancelled", prompt_tokens=0)
                self._settler.add(record, None)

        # Turns are taken here and not in Redis, where a request that gives up would still be run.
        async with self._at_a_time:
            if self._watch.away:
                return None  # found to be away while this request waited for its turn
            try:
                return await self._limiter.admit(
                    key.tenant,
                    opening.request_id,
                    scopes,
                    tokens,
                    encode_record(opening),
                    unheard=give_back,
                )
            except RedisError as error:
                if is_refusal(error):
                    logger.exception(
                        "Limits of tenant %r cannot be read; its share holds.", key.tenant
                    )
                else:
                    self._watch.mark_away(error)
                return None

    def _admit_here(
        self, tenant: str, opening: UsageRecord, scopes: list[Scope], tokens: int
    ) -> Admission:
        """Return the answer of this replica's share of the limits."""
        if self._config().on_redis_error == "closed":
            raise InternalError("The platform cannot check limits at the moment.")
        return self._local.admit(
            tenant, opening.request_id, scopes, tokens, replicas=self._heartbeat.replicas
        )

    def _progress(self) -> dict[str, dict[str, Progress]]:
        """Return what the running requests admitted by Redis have used, by tenant and id."""
        by_tenant: dict[str, dict[str, Progress]] = defaultdict(dict)
        for request_id, held in self._running.items():
            if not held.local:
                by_tenant[held.opening.tenant][request_id] = held.progress()
        return by_tenant

"""Who may start a request now, and what becomes of what it holds, with Redis and without it.

With Redis a request makes one call to be admitted and one, which nobody waits for, to be settled.
Without it (away, frozen, slow or full) this replica goes on with its share of every limit, or
refuses, as `limits.onRedisError` says; one probe a second finds out when it is back.
"""

import asyncio
import logging
import random
import re
import time
from collections import defaultdict, deque
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Final, Protocol, Self, TypeVar

from msgspec import structs
from redis.asyncio import Redis
from redis.exceptions import OutOfMemoryError, ReadOnlyError, RedisError, ResponseError

from tera.background import end
from tera.config.limits import LimitsConfig, TenantLimits
from tera.errors import InternalError
from tera.tenancy.keys import ApiKey
from tera.tenancy.limits import Admission, Allowance, Progress, RedisLimiter, Scope, scopes_of
from tera.tenancy.local_limits import LocalLimiter
from tera.tenancy.tenants import effective_limits
from tera.tenancy.usage import UsageRecord, encode_record

logger = logging.getLogger(__name__)

SLICE_S: Final = 0.025
SLICES: Final = 3
MOST_SLICES: Final = 40
"""Redis counts as away when it leaves a call unanswered for three slices: 75 ms in which this
process was there to read. A slice that ends late does not count, for then the process was busy and
the answer may be waiting for it; nor one in which this thread had to wait for a CPU, for then a
Redis on this machine had to as well; and one in which another call was answered begins the count
anew. But at most these many are waited for."""
STARVED_S: Final = SLICE_S / 5
"""Wait for a CPU in one slice above which the machine counts as overloaded; else it is 0.1 ms."""
SCHEDULER_STATISTICS: Final = Path("/proc/thread-self/schedstat")
CONNECTIONS: Final = 8
"""Calls to admit at a time, each on a connection; more of them would only wait in Redis."""
PROBE_INTERVAL_S: Final = 1.0
BACKGROUND_TIMEOUT_S: Final = 2.0
RENEW_INTERVAL_S: Final = 10.0
"""A third of a lease: two renewals may be lost."""
HEARTBEAT_INTERVAL_S: Final = 2.0
HEARTBEAT_LIFE_S: Final = 10.0
RECLAIM_INTERVAL_S: Final = 10.0
DRAIN_S: Final = 5.0
MAX_UNSETTLED: Final = 100_000
"""Ended requests kept while Redis is away, about 100 MB; after that the oldest are given up."""
GATHER_S: Final = 0.01
BATCH: Final = 100
"""Requests settled in one round trip: Redis does nothing else meanwhile, a few milliseconds."""
BLOCKED_S: Final = 1.0
"""How long a refusal by a limit of 0 is repeated without asking Redis."""
MAX_RESOLVED: Final = 50_000
"""Pairs of key and model whose scopes are kept, about 30 MB."""

REPLICAS: Final = "tera:gateways"
"""Sorted set: gateway replica → Unix second until which it counts as alive."""
PROBE: Final = "tera:probe:"
RECLAIMING: Final = "tera:reclaiming"

_CANNOT_SERVE: Final = re.compile(
    r"(?:^|-)(?:OOM|READONLY|LOADING|MISCONF|MASTERDOWN|NOREPLICAS|CLUSTERDOWN|BUSY|NOAUTH|NOPERM)\b"
)
"""In an error that the next call would meet as well; a script's is quoted by older servers."""

T = TypeVar("T")


class Keyring(Protocol):
    """What admission asks of the key snapshot."""

    def tenant_limits(self, name: str) -> TenantLimits | None:
        """Return what is stored of a tenant's limits; one object until it changes."""
        ...


@dataclass(frozen=True, slots=True)
class _Resolved:
    """The scopes of a key and a model, and what they were resolved from."""

    config: LimitsConfig
    stored: TenantLimits | None
    key: ApiKey
    scopes: list[Scope]
    weight: int

    def made_of(self, config: LimitsConfig, stored: TenantLimits | None, key: ApiKey) -> bool:
        return self.config is config and self.stored is stored and self.key is key


@dataclass(frozen=True, slots=True)
class _Refused:
    """What Redis said to a request over its limit, which holds for all until it has drained."""

    scopes: list[Scope]
    admission: Admission
    at: float
    """Loop time before Redis was asked."""
    until: float

    def again(self, now: float) -> Admission:
        """Return what Redis would say now."""
        passed_us = round(1e6 * (now - self.at))
        refusal = self.admission.refusal
        assert refusal is not None
        wait_us = None if refusal.wait_us is None else max(1, refusal.wait_us - passed_us)
        return Admission(
            _later(self.admission.requests, passed_us),
            _later(self.admission.tokens, passed_us),
            replace(refusal, wait_us=wait_us),
        )


def _later(allowance: Allowance | None, passed_us: int) -> Allowance | None:
    if allowance is None:
        return None
    return replace(allowance, reset_us=max(0, allowance.reset_us - passed_us))


class RedisAwayError(Exception):
    """Redis did not answer in time, or answered that it cannot."""


class Reservation:
    """What one running request holds; `settle` gives it back, whatever came of the request."""

    def __init__(
        self,
        admissions: "Admissions",
        opening: UsageRecord,
        scopes: list[Scope],
        progress: Callable[[], Progress],
        *,
        local: bool,
    ) -> None:
        self.opening = opening
        self.scopes = scopes
        self.local = local
        """It was admitted by this replica alone, while Redis was away."""
        self.progress = progress
        """What has been used so far."""
        self._admissions = admissions
        self._settled = False

    def settle(self, record: UsageRecord) -> None:
        """Give back what is held, charge what `record` says, and write it to the ledger.

        Returns at once: it is done soon, or as soon as Redis is back. Only the first call counts.
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
    ) -> None:
        """`redis` is a client with a time-out; it stays the caller's to close.

        Args:
            redis: where limits and ledger are.
            keyring: what is stored of tenants.
            config: what the values say, asked at each request.
            replica_id: under which this replica counts as alive.
            clock: Unix seconds.
        """
        self._redis = redis
        self._keyring = keyring
        self._config = config
        self._replica_id = replica_id
        self._clock = clock
        self._limiter = RedisLimiter(redis)
        self._local = LocalLimiter()
        self._slots = asyncio.Semaphore(CONNECTIONS)
        self._running: dict[str, Reservation] = {}
        self._unsettled: deque[tuple[Reservation, UsageRecord]] = deque()
        self._work = asyncio.Event()
        self._back = asyncio.Event()
        self._back.set()
        self._replicas = 1
        self._scopes: dict[tuple[str, str], _Resolved] = {}
        self._refused: dict[tuple[str, str], _Refused] = {}
        self._stack = AsyncExitStack()
        self._probing: asyncio.Task[None] | None = None
        self.outages = 0
        """Times since the start that Redis was found to be away."""
        self.given_up = 0
        """Records given up since the start, because Redis was away for too long."""

    @property
    def degraded(self) -> bool:
        """Redis is away: limits hold by this replica's share of them."""
        return not self._back.is_set()

    @property
    def replicas(self) -> int:
        """Gateway replicas that were alive when Redis was last asked."""
        return self._replicas

    @property
    def unsettled(self) -> int:
        """Ended requests whose record is not in the ledger yet."""
        return len(self._unsettled)

    async def __aenter__(self) -> Self:
        """Start renewing, settling and looking after what dead replicas left."""
        # A burst right after the start would otherwise begin with as many logins.
        await asyncio.gather(*(self._in_background(self._redis.ping()) for _ in range(CONNECTIONS)))
        for work in (self._renew, self._beat, self._reclaim, self._settle_all):
            self._stack.push_async_callback(end, asyncio.create_task(work()))
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Settle what has ended, for some seconds at the most, and stop."""
        await self._stack.aclose()
        if self._probing is not None:
            await end(self._probing)
        with suppress(RedisError, TimeoutError):
            async with asyncio.timeout(DRAIN_S):
                while self._unsettled:
                    await self._settle(*self._unsettled[0])
                    self._unsettled.popleft()
                await self._redis.zrem(REPLICAS, self._replica_id)

    async def admit(
        self,
        key: ApiKey,
        opening: UsageRecord,
        tokens: int,
        *,
        progress: Callable[[], Progress],
        told: Callable[[Admission], None],
    ) -> Reservation:
        """Return what the request holds from now on, until it is settled.

        Args:
            key: whose request it is.
            opening: its record, as it stands if nobody ever settles it.
            tokens: the most that it can use.
            progress: tells what it has used so far.
            told: hears what is left of the limits, whether it is admitted or not.

        Raises:
            TeraError: a limit is reached (429), or Redis is away and the policy is `closed`.
        """
        scopes = self.scopes(key, opening.model)
        admission = self._refused_again(key, opening.model, scopes)
        if admission is None and self._back.is_set():
            asked_at = asyncio.get_running_loop().time()
            admission = await self._ask(key.tenant, opening, scopes, tokens)
            if admission is not None and admission.refusal is not None:
                self._remember(key, opening.model, scopes, admission, asked_at)
        local = admission is None
        if admission is not None and admission.budgets:
            self._local.know(key.tenant, admission.budgets)
        if admission is None:
            if self._config().on_redis_error == "closed":
                raise InternalError("The platform cannot check limits at the moment.")
            admission = self._local.admit(
                key.tenant, opening.request_id, scopes, tokens, replicas=self._replicas
            )
        told(admission)
        if admission.refusal is not None:
            raise admission.refusal.error()
        held = Reservation(self, opening, scopes, progress, local=local)
        self._running[opening.request_id] = held
        return held

    def _refused_again(self, key: ApiKey, model: str, scopes: list[Scope]) -> Admission | None:
        """Return the refusal that Redis would give: a flood need not ask it each time."""
        known = self._refused.get((key.key_id, model))
        if known is None:
            return None
        now = asyncio.get_running_loop().time()
        if now < known.until and known.scopes is scopes:
            return known.again(now)
        del self._refused[key.key_id, model]
        return None

    def _remember(
        self, key: ApiKey, model: str, scopes: list[Scope], refused: Admission, asked_at: float
    ) -> None:
        """Keep a refusal while nothing but time can end it.

        That is one by requests per minute, whose debt only drains, and one by a limit of 0. Tokens
        and slots come back when a request ends.
        """
        refusal = refused.refusal
        assert refusal is not None
        if refusal.limit == 0:
            lasts_s = BLOCKED_S
        elif refusal.kind == "requests" and refusal.wait_us is not None:
            lasts_s = refusal.wait_us / 1e6
        else:
            return
        if len(self._refused) >= MAX_RESOLVED:
            self._refused.clear()
        until = asked_at + lasts_s
        self._refused[key.key_id, model] = _Refused(scopes, refused, asked_at, until)

    def scopes(self, key: ApiKey, model: str) -> list[Scope]:
        """Return what limits a request of this key for this model, as of now."""
        return self._resolve(key, model).scopes

    def weight(self, key: ApiKey, model: str) -> int:
        """Return the share of the key's tenant while requests wait for replicas, as of now."""
        return self._resolve(key, model).weight

    def _resolve(self, key: ApiKey, model: str) -> _Resolved:
        config = self._config()
        stored = self._keyring.tenant_limits(key.tenant)
        known = self._scopes.get((key.key_id, model))
        # The same objects, not equal ones: comparing would cost as much as resolving them.
        if known is not None and known.made_of(config, stored, key):
            return known
        tenant = effective_limits(config.default, config.tenants.get(key.tenant), stored)
        scopes = scopes_of(tenant, key.limits, key.key_id, model)
        if len(self._scopes) >= MAX_RESOLVED:
            self._scopes.clear()
        resolved = _Resolved(config, stored, key, scopes, tenant.weight or 1)
        self._scopes[key.key_id, model] = resolved
        return resolved

    def most_tokens(self, key: ApiKey, model: str) -> int | None:
        """Return how many tokens a request can ever be admitted with; None is any number."""
        bounds = [
            scope.limits.tokens_per_minute
            for scope in self.scopes(key, model)
            if scope.limits.tokens_per_minute is not None
        ]
        return min(bounds, default=None)

    def settle(self, reservation: Reservation, record: UsageRecord) -> None:
        """See `Reservation.settle`."""
        self._running.pop(record.request_id, None)
        if reservation.local:
            self._local.settle(record.tenant, record.request_id, _used_tokens(record))
        self._unsettled.append((reservation, record))
        if len(self._unsettled) > MAX_UNSETTLED:
            _, oldest = self._unsettled.popleft()
            self._give_up(oldest, "Redis has been away for too long")
        self._work.set()

    def _give_up(self, record: UsageRecord, reason: object) -> None:
        """Leave a record to the log alone, so that it can be put into the ledger by hand."""
        self.given_up += 1
        logger.error("Not in the ledger (%s): %s", reason, encode_record(record).decode())

    async def _settle_all(self) -> None:
        while True:
            await self._back.wait()
            if not self._unsettled:
                self._work.clear()
                await self._work.wait()
                # Nobody waits for it, and many at a time cost Redis and this process less.
                await asyncio.sleep(GATHER_S)
                continue
            batch = [self._unsettled.popleft() for _ in range(min(BATCH, len(self._unsettled)))]
            try:
                outcomes = await asyncio.gather(
                    *(self._settle(*each) for each in batch), return_exceptions=True
                )
            except asyncio.CancelledError:
                self._unsettled.extendleft(reversed(batch))
                raise
            # First in line again: settling twice charges once.
            again = [
                each
                for each, outcome in zip(batch, outcomes, strict=True)
                if not self._is_done(each[1], outcome)
            ]
            self._unsettled.extendleft(reversed(again))

    def _is_done(self, record: UsageRecord, outcome: BaseException | None) -> bool:
        """Return whether a record is in the ledger, or never will be."""
        if outcome is None:
            return True
        if isinstance(outcome, RedisError) and not _is_refusal(outcome):
            self._mark_away(outcome)
            return False
        self._give_up(record, outcome)
        return True

    async def _settle(self, reservation: Reservation, record: UsageRecord) -> None:
        encoded, used = encode_record(record), _used_tokens(record)
        if reservation.local:
            await self._limiter.charge(
                record.tenant, record.request_id, reservation.scopes, used, encoded
            )
        else:
            await self._limiter.settle(record.tenant, record.request_id, used, encoded)

    async def _ask(
        self, tenant: str, opening: UsageRecord, scopes: list[Scope], tokens: int
    ) -> Admission | None:
        """Return what Redis says of a request, or None if it is away."""
        async with self._slots:
            if not self._back.is_set():
                return None  # found out while this request waited for its turn
            call = asyncio.create_task(
                self._limiter.admit(
                    tenant, opening.request_id, scopes, tokens, encode_record(opening)
                )
            )
            try:
                return await self._in_time(call)
            except RedisAwayError as error:
                self._mark_away(error)
                return None
            except RedisError:
                logger.exception("Limits of tenant %r cannot be read; its share holds.", tenant)
                return None
            except asyncio.CancelledError:
                call.add_done_callback(lambda done: self._give_back(opening, done))
                raise

    def _give_back(self, opening: UsageRecord, call: asyncio.Task[Admission]) -> None:
        """Settle what a request was admitted to after its client had left."""
        if not call.cancelled() and call.exception() is None and call.result().refusal is None:
            record = structs.replace(opening, status="cancelled", prompt_tokens=0)
            self.settle(Reservation(self, opening, [], _nothing, local=False), record)

    async def _in_time(self, call: asyncio.Task[T]) -> T:
        """Return what a call to Redis gives, if that takes no longer than `SLICES`.

        The call itself goes on to its own end, which the client's time-outs bound: Redis may
        do later what it was asked for.

        Raises:
            RedisAwayError: it took longer, or Redis cannot serve.
            RedisError: Redis serves, but not this call.
        """
        loop = asyncio.get_running_loop()
        unanswered = 0
        for _ in range(MOST_SLICES):
            due, answered = loop.time() + SLICE_S, self._limiter.answered
            starved_s = _waited_for_cpu_s()
            await asyncio.wait({call}, timeout=SLICE_S)
            if call.done():
                break
            if self._limiter.answered != answered:
                unanswered = 0
            elif loop.time() < due + SLICE_S / 2 and _waited_for_cpu_s() < starved_s + STARVED_S:
                unanswered += 1
            if unanswered == SLICES:
                break
        if not call.done():
            # Whatever it still says is of no interest, an error least of all.
            call.add_done_callback(lambda done: done.cancelled() or done.exception())
            raise RedisAwayError("no answer in time")
        try:
            return call.result()
        except RedisError as error:
            if _is_refusal(error):
                raise
            raise RedisAwayError(f"{type(error).__name__}: {error}") from error

    def _mark_away(self, error: BaseException) -> None:
        if self._back.is_set():
            self._back.clear()
            self.outages += 1
            logger.warning(
                "Redis is away (%s); limits hold by this replica's share, 1 of %d.",
                error,
                self._replicas,
            )
            self._probing = asyncio.create_task(self._probe())

    async def _probe(self) -> None:
        """Ask once a second until Redis takes a write again."""
        began = self._clock()
        while True:
            await asyncio.sleep(PROBE_INTERVAL_S)
            with suppress(RedisAwayError):
                write = self._redis.set(PROBE + self._replica_id, 1, ex=10)
                await self._in_time(asyncio.ensure_future(write))
                break
        logger.info("Redis is back after %.1f s.", self._clock() - began)
        self._back.set()

    async def _renew(self) -> None:
        """Say every few seconds that this replica's requests still run, and what they used."""
        while True:
            await asyncio.sleep(RENEW_INTERVAL_S)
            by_tenant: dict[str, dict[str, Progress]] = defaultdict(dict)
            for request_id, held in self._running.items():
                if not held.local:
                    by_tenant[held.opening.tenant][request_id] = held.progress()
            for tenant, progress in by_tenant.items():
                if not await self._in_background(self._limiter.renew(tenant, progress)):
                    break

    async def _beat(self) -> None:
        """Count as alive, and know how many gateway replicas do."""
        while True:
            now_s = self._clock()
            pipeline = self._redis.pipeline(transaction=True)
            pipeline.zadd(REPLICAS, {self._replica_id: now_s + HEARTBEAT_LIFE_S})
            pipeline.zremrangebyscore(REPLICAS, "-inf", now_s)
            pipeline.zcard(REPLICAS)
            answers = await self._in_background(pipeline.execute())
            if answers:
                self._replicas = max(1, answers[-1])
            await asyncio.sleep(HEARTBEAT_INTERVAL_S)

    async def _reclaim(self) -> None:
        """Close what dead replicas left of tenants that send nothing more; one replica does it."""
        while True:
            await asyncio.sleep(RECLAIM_INTERVAL_S * random.uniform(0.5, 1))  # noqa: S311  no secret
            await self._in_background(self._reclaim_once())

    async def _reclaim_once(self) -> None:
        mine = await self._redis.set(
            RECLAIMING, self._replica_id, nx=True, px=int(1000 * RECLAIM_INTERVAL_S)
        )
        if mine:
            await self._limiter.reclaim_all()

    async def _in_background(self, work: Awaitable[T]) -> T | None:
        """Return what the work gives; nothing, when Redis fails: it is tried again later."""
        try:
            async with asyncio.timeout(BACKGROUND_TIMEOUT_S):
                return await work
        except (RedisError, TimeoutError):
            return None


def _used_tokens(record: UsageRecord) -> int:
    return record.prompt_tokens + record.completion_tokens


def _is_refusal(error: RedisError) -> bool:
    """Return whether Redis refuses one call, and is not away for all of them.

    Data of another kind under one tenant's keys must not take the limits from everybody.
    """
    if not isinstance(error, ResponseError) or isinstance(error, OutOfMemoryError | ReadOnlyError):
        return False
    return _CANNOT_SERVE.search(str(error)) is None


def _waited_for_cpu_s() -> float:
    """Return how long this thread has been ready to run and without a CPU; 0 where Linux is not."""
    try:
        return int(SCHEDULER_STATISTICS.read_bytes().split()[1]) / 1e9
    except OSError:
        return 0.0


def _nothing() -> Progress:
    return Progress(0, 0)

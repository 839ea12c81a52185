"""Limits over all gateway replicas: one call to Redis admits a request, one settles it.

`limits.lua` checks and spends all of a request's limits together; in Redis, of each tenant:

    tera:{<tenant>}:limits           hash    scope → debts, tokens held, requests open
    tera:{<tenant>}:open             hash    request id → what it holds, and its opening record
    tera:{<tenant>}:leases           zset    request id → µs at which it counts as lost
    tera:{<tenant>}:budget:<period>  hash    scope → tokens used and held of a day or month
    tera:{<tenant>}:charged:<id>     string  this request was charged without having been open
    tera:{<tenant>}:usage            stream  the ledger; see `usage.py`

The braces keep a tenant's keys on one node of a cluster. All keys but the stream expire, so an
idle tenant costs nothing.
"""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping, Sequence
from hashlib import sha1
from pathlib import Path
from typing import Any, Final, Protocol

import msgspec
from redis.asyncio import Redis
from redis.exceptions import RedisError, ResponseError

from tera.tenancy.limits import MOST, Admission, Allowance, Progress, Scope, Spent, refusal_of
from tera.tenancy.usage import stream_of

LEASE_S: Final = 30.0
LEASES: Final = "tera:{*}:leases"
"""Matches the leases of all tenants; braces have no meaning in Redis's patterns."""
_LEASES_AFFIXES: Final = (len("tera:{"), -len("}:leases"))
_RENEWALS: Final = 500
"""Most renewals in one call, which keeps Redis busy for some milliseconds."""

_SCRIPT: Final = Path(__file__).with_name("limits.lua").read_text(encoding="utf-8")
_SCRIPT_SHA: Final = sha1(_SCRIPT.encode(), usedforsecurity=False).hexdigest()

_FIGURES: Final = 10
"""How many figures the script returns for every request; spent budgets come after them."""

Argument = str | bytes | int
Given = tuple[Argument, ...]
"""Arguments of the script: the number of keys, the keys, and the arguments proper."""
Unheard = Callable[[Any], None]


class Calls(Protocol):
    """Makes the limiter's calls to Redis; implemented by `PipelinedRedis`."""

    def call(self, *command: Argument, unheard: Unheard | None = None) -> asyncio.Future[Any]:
        """Send a command; return its future reply, which `unheard` gets if that is cancelled."""
        ...


class Ended(msgspec.Struct, frozen=True):
    """A request that has ended, in the form that is sent to Redis."""

    tenant: str
    request_id: str
    used_tokens: int
    record: bytes
    """Its final record, for the ledger."""
    scopes: Sequence[Scope] | None = None
    """The scopes of a request that ran without Redis and is charged now; None for a request that
    Redis admitted, which is settled."""


class RedisLimiter:
    """Admits and settles requests against limits that Redis keeps.

    Time is Redis's. Every method may raise RedisError; the operation may have succeeded
    nevertheless, and may be repeated: a request is admitted, settled and charged only once.
    """

    def __init__(self, redis: Calls, lease_s: float = LEASE_S, now_us: int | None = None) -> None:
        """The caller closes `redis`.

        Args:
            redis: makes the calls.
            lease_s: how long a request is open without being renewed.
            now_us: a time to use instead of Redis's, in µs since 1970; for tests.
        """
        self._redis = redis
        self._lease_us = round(lease_s * 1e6)
        self.now_us = now_us

    async def admit(
        self,
        tenant: str,
        request_id: str,
        scopes: Sequence[Scope],
        tokens: int,
        record: bytes,
        *,
        unheard: Callable[[Admission], None] | None = None,
    ) -> Admission:
        """Admit a request, which is then open until it is settled, or refuse it.

        Args:
            tenant: whose request it is.
            request_id: unique; admitting an open request again succeeds and costs nothing.
            scopes: from `scopes_of`.
            tokens: the most that it can use; held until it is settled.
            record: the ledger's record in case the request is lost.
            unheard: gets the answer if the caller is cancelled before it arrives.
        """

        def read(reply: Any) -> None:
            if unheard is not None:
                unheard(_admission(reply, tokens, scopes))

        lines = [scope.line for scope in scopes]
        # More than Lua can count exactly would not be refused for its size, but miscounted.
        held = min(tokens, MOST)
        given = self._given("admit", tenant, (request_id, held, self._lease_us, record, *lines))
        return _admission(await self._call(given, read), tokens, scopes)

    async def settle(self, tenant: str, request_id: str, used_tokens: int, record: bytes) -> bool:
        """End a request: release what it holds, charge what it used, write its final record.

        A request that is not open (already settled, or counted as lost) is not charged; its record
        is written nevertheless, and replaces the earlier one.

        Returns:
            whether it was open.
        """
        return bool(await self._call(self._ending(Ended(tenant, request_id, used_tokens, record))))

    async def end_all(self, requests: Iterable[Ended]) -> list[RedisError | None]:
        """Settle or charge several requests in one round trip; see `settle` and `charge`.

        Returns:
            For each request the error, or None.
        """
        given = [self._ending(each) for each in requests]
        # All are sent before the first reply is awaited, so that they share a round trip.
        replies = [self._send(each) for each in given]
        try:
            return [
                await self._failure(each, reply) for each, reply in zip(given, replies, strict=True)
            ]
        finally:
            for reply in replies:
                reply.cancel()  # those no longer awaited, if this was cancelled

    async def _failure(self, given: Given, reply: asyncio.Future[Any]) -> RedisError | None:
        try:
            await self._reply(given, reply)
        except RedisError as error:
            return error
        return None

    async def renew(self, tenant: str, progress: Mapping[str, Progress]) -> frozenset[str]:
        """Renew a tenant's open requests, by id; return the ids of those that are not open."""
        gone: set[str] = set()
        requests = list(progress.items())
        for first in range(0, len(requests), _RENEWALS):
            arguments: list[Any] = [self._lease_us]
            for request_id, so_far in requests[first : first + _RENEWALS]:
                arguments += (request_id, so_far.prompt_tokens, so_far.completion_tokens)
            reply = await self._call(self._given("renew", tenant, arguments))
            gone.update(request_id.decode() for request_id in reply)
        return frozenset(gone)

    async def reclaim(self, tenant: str) -> int:
        """End those of a tenant's requests that were not renewed in time; return how many.

        Their holds are released, what they had used at the last renewal is charged, and their
        opening record is written as `lost`. `admit` also does this, for a few at a time.
        """
        ended = 0
        # In batches, each a script of its own: Redis serves nobody else while a script runs.
        while batch := await self._call(self._given("reclaim", tenant, (self._lease_us,))):
            ended += batch
        return ended

    async def charge(
        self,
        tenant: str,
        request_id: str,
        scopes: Sequence[Scope],
        used_tokens: int,
        record: bytes,
    ) -> bool:
        """Charge a request that ran without Redis, and write its final record.

        It is counted once, however often this is called within a day, and as of now, whenever it
        ran. What exceeds a per-minute limit does not become debt: most of it was used earlier.

        Returns:
            whether it was counted.
        """
        ended = Ended(tenant, request_id, used_tokens, record, scopes)
        return bool(await self._call(self._ending(ended)))

    def _ending(self, request: Ended) -> Given:
        tenant, request_id = request.tenant, request.request_id
        arguments = (request_id, min(request.used_tokens, MOST), request.record)
        if request.scopes is None:
            return self._given("settle", tenant, arguments)
        lines = [scope.line for scope in request.scopes]
        marker = f"tera:{{{tenant}}}:charged:{request_id}"
        return self._given("charge", tenant, (*arguments, *lines), marker)

    def _given(
        self, operation: str, tenant: str, arguments: Sequence[Argument], *more_keys: str
    ) -> Given:
        base = f"tera:{{{tenant}}}:"
        keys = (base + "limits", base + "open", base + "leases", stream_of(tenant))
        return (
            5 + len(more_keys),
            *keys,
            base + "budget:",
            *more_keys,
            operation,
            "" if self.now_us is None else self.now_us,
            *arguments,
        )

    def _call(self, given: Given, unheard: Unheard | None = None) -> Awaitable[Any]:
        return self._reply(given, self._send(given, unheard), unheard)

    def _send(self, given: Given, unheard: Unheard | None = None) -> asyncio.Future[Any]:
        return self._redis.call("EVALSHA", _SCRIPT_SHA, *given, unheard=unheard)

    async def _reply(
        self, given: Given, reply: asyncio.Future[Any], unheard: Unheard | None = None
    ) -> Any:
        try:
            return await reply
        except ResponseError as error:
            if not str(error).startswith("NOSCRIPT"):
                raise
        # A Redis that has just started, or another one, does not know the script yet.
        return await self._redis.call("EVAL", _SCRIPT, *given, unheard=unheard)


async def tenants_with_leases(redis: Redis) -> AsyncGenerator[str]:
    """Yield each tenant that has open requests; SCAN may return one twice."""
    start, end = _LEASES_AFFIXES
    async for key in redis.scan_iter(match=LEASES, count=1000, _type="ZSET"):
        yield key.decode()[start:end]


def _admission(reply: Sequence[Any], tokens: int, scopes: Sequence[Scope]) -> Admission:
    """Return the script's answer to a request that could use `tokens` tokens."""
    requests, requests_left, requests_reset, limit, left, reset = reply[:6]
    kind, name, reached, wait_us = reply[6:10]
    return Admission(
        None if requests is None else Allowance(requests, requests_left, requests_reset),
        None if limit is None else Allowance(limit, left, reset),
        None
        if kind is None
        else refusal_of(kind.decode(), name.decode(), reached, wait_us, tokens, scopes),
        _budgets(reply, scopes) if len(reply) > _FIGURES else (),
    )


def _budgets(reply: Sequence[Any], scopes: Sequence[Scope]) -> tuple[Spent, ...]:
    names = [scope.name for scope in scopes if scope.limits.token_budget is not None]
    return tuple(
        Spent(name, reply[place].decode(), reply[place + 1], reply[place + 2])
        for name, place in zip(names, range(_FIGURES, len(reply), 3), strict=True)
    )

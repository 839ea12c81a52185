"""Limits that hold over all gateway replicas: one call to Redis admits a request, one settles it.

A request is admitted against *scopes*: its tenant, its model where the tenant has limits of its
own for it, and its key. `limits.lua` checks and spends them together; in Redis, of each tenant:

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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha1
from pathlib import Path
from typing import Any, Final, Literal

from redis.asyncio import Redis
from redis.exceptions import NoScriptError

from tera.config.limits import Limits, TenantLimits
from tera.errors import (
    ConcurrencyLimitError,
    QuotaError,
    RateLimitError,
    RequestRateLimitError,
    TokenRateLimitError,
)
from tera.tenancy.usage import stream_of

MOST: Final = 2**53 - 1
"""Numbers over it are taken for it: Redis's scripts count in doubles, exact up to here."""
LEASE_S: Final = 30.0
LEASES: Final = "tera:{*}:leases"
"""Matches the leases of all tenants; braces mean nothing to Redis's patterns."""
_LEASES_AFFIXES: Final = (len("tera:{"), -len("}:leases"))
_RENEWALS: Final = 500
"""At most this many in one call: Redis does nothing else meanwhile, some milliseconds here."""

_SCRIPT: Final = Path(__file__).with_name("limits.lua").read_text(encoding="utf-8")
_SCRIPT_SHA: Final = sha1(_SCRIPT.encode(), usedforsecurity=False).hexdigest()

Kind = Literal["requests", "tokens", "concurrency", "budget"]


@dataclass(frozen=True, slots=True)
class Scope:
    """Something that requests are counted for, and what it may use at most."""

    name: str
    """`tenant`, `model:<short name>` or `key:<key id>`."""
    limits: Limits


@dataclass(frozen=True, slots=True)
class Allowance:
    """What is left of a limit of a minute, for the headers."""

    limit: int
    remaining: int
    reset_us: int
    """Until all of it is, if running requests use what they hold; 0 for a limit of 0."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """The limit that refuses a request; of several the one with the longest wait."""

    kind: Kind
    scope: str
    limit: int
    wait_us: int | None
    """The request passes after it, if it is alone; None never lets it pass."""
    tokens: int
    """The most that the request could use."""
    period: Literal["day", "month"] = "month"
    """Of a budget."""

    @property
    def retryable(self) -> bool:
        """Whether waiting helps."""
        return self.wait_us is not None

    def error(self) -> RateLimitError:
        """Return it as the client sees it."""
        wait_s = None if self.wait_us is None else self.wait_us / 1e6
        return _ERRORS[self.kind](self._message(wait_s), retry_after_s=wait_s)

    def _message(self, wait_s: float | None) -> str:
        what = _WORDS[self.kind].format(limit=f"{self.limit:,}", period=self.period)
        whose = _whose(self.scope)
        if wait_s is not None:
            return f"{whose} has reached its limit of {what}. Try again in {wait_s:.3g} s."
        if self.limit == 0:
            return f"{whose} is blocked: it has a limit of {what}."
        if self.kind == "budget":
            return (
                f"{whose} has too little left of its budget of {what} for the {self.tokens:,} "
                "tokens that this request may use."
            )
        return (
            f"This request may use {self.tokens:,} tokens, prompt and completion together. "
            f"{whose} has a limit of {what}, so it can never pass; send a shorter prompt or a "
            "lower max_tokens."
        )


@dataclass(frozen=True, slots=True)
class Spent:
    """What a scope has used of its budget, and what its open requests hold of it."""

    scope: str
    period: str
    """Such as 2027-01 or 2027-01-31, in UTC."""
    used: int
    held: int


@dataclass(frozen=True, slots=True)
class Admission:
    """The answer to a request, and what is left of the limits after it."""

    requests: Allowance | None
    """Of the scope with the least part remaining; None where there is no limit."""
    tokens: Allowance | None
    refusal: Refusal | None = None
    """None if it was admitted; otherwise nothing was spent."""
    budgets: tuple[Spent, ...] = ()
    """Of the scopes that have one."""


@dataclass(frozen=True, slots=True)
class Progress:
    """What a running request has used so far: what it is charged if its end is never told."""

    prompt_tokens: int
    """Those that would be charged, if it ended now."""
    completion_tokens: int


def scopes_of(
    tenant_limits: TenantLimits, key_limits: Limits | None, key_id: str, model_name: str
) -> list[Scope]:
    """Return the scopes that a request is counted in.

    A limit that the tenant has for this model counts the model's requests alone, in the place of
    the tenant's own; a key's limits count beside both. A scope without any limit is left out.

    Args:
        tenant_limits: what is in force for the tenant.
        key_limits: of the key alone; None has none.
        key_id: the key's.
        model_name: the model's short name.
    """
    of_model = tenant_limits.models.get(model_name, _UNLIMITED)
    of_tenant = Limits(
        **{
            name: None if getattr(of_model, name) is not None else getattr(tenant_limits, name)
            for name in _COUNTED
        },
        budget_period=tenant_limits.budget_period,
    )
    scopes = (
        Scope("tenant", of_tenant),
        Scope(f"model:{model_name}", of_model),
        Scope(f"key:{key_id}", key_limits or _UNLIMITED),
    )
    return [
        scope
        for scope in scopes
        if any(getattr(scope.limits, name) is not None for name in _COUNTED)
    ]


class _Together:
    """Sends the script calls of one turn of the event loop in one round trip.

    A call alone costs redis-py five times what it costs among others.
    """

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._waiting: list[tuple[tuple[Any, ...], asyncio.Future[Any]]] = []
        self._sending: set[asyncio.Task[None]] = set()
        self.answered = 0
        """Round trips that came to their end."""

    async def run(self, sha: str, given: tuple[Any, ...]) -> Any:
        """Return the script's answer; `given` is the number of keys, the keys, the arguments.

        Raises:
            RedisError: as a call alone would.
        """
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Any] = loop.create_future()
        if not self._waiting:
            loop.call_soon(self._send_waiting)
        self._waiting.append(((sha, *given), answer))
        return await answer

    def _send_waiting(self) -> None:
        calls, self._waiting = self._waiting, []
        sending = asyncio.create_task(self._send(calls))
        self._sending.add(sending)
        sending.add_done_callback(self._sending.discard)

    async def _send(self, calls: list[tuple[tuple[Any, ...], asyncio.Future[Any]]]) -> None:
        answers: list[Any]
        try:
            if len(calls) == 1:
                ((given, _),) = calls
                answers = [await self._redis.evalsha(*given)]
            else:
                pipeline = self._redis.pipeline(transaction=False)
                for given, _ in calls:
                    pipeline.evalsha(*given)
                answers = await pipeline.execute(raise_on_error=False)
            self.answered += 1
        except Exception as error:  # noqa: BLE001  each of those who wait gets it
            answers = [error] * len(calls)
        for (_, future), answer in zip(calls, answers, strict=True):
            if future.done():
                continue  # whoever asked has been cancelled
            if isinstance(answer, Exception):
                future.set_exception(answer)
            else:
                future.set_result(answer)


class RedisLimiter:
    """Admits and settles requests against limits that Redis keeps.

    Time is Redis's. Every method lets RedisError pass; what it asked for may have been done
    nevertheless, and may be asked for again: a request is admitted, settled and charged once.
    """

    def __init__(self, redis: Redis, lease_s: float = LEASE_S, now_us: int | None = None) -> None:
        """`redis` stays the caller's to close.

        Args:
            redis: as `tenancy.redis.connect` makes it.
            lease_s: how long a request is open without being renewed.
            now_us: the time in the place of Redis's, in µs since 1970; for tests.
        """
        self._redis = redis
        self._together = _Together(redis)
        self._lease_us = round(lease_s * 1e6)
        self.now_us = now_us

    @property
    def answered(self) -> int:
        """Round trips that Redis has answered."""
        return self._together.answered

    async def admit(
        self, tenant: str, request_id: str, scopes: Sequence[Scope], tokens: int, record: bytes
    ) -> Admission:
        """Admit a request, which is then open until it is settled, or refuse it.

        Args:
            tenant: whose request it is.
            request_id: unique; an open request that is admitted again is told so, at no cost.
            scopes: as `scopes_of` has them.
            tokens: the most that it can use; held until it is settled.
            record: the ledger's, as it is if the request is lost.
        """
        lines = [_line(scope) for scope in scopes]
        held = min(tokens, MOST)
        reply = await self._call(
            "admit", tenant, (request_id, held, self._lease_us, record, *lines)
        )
        *figures, kind, name, limit, wait_us = reply[:10]
        requests = None if figures[0] is None else Allowance(*figures[:3])
        of_tokens = None if figures[3] is None else Allowance(*figures[3:])
        budgets = _budgets(scopes, reply[10:])
        if kind is None:
            return Admission(requests, of_tokens, None, budgets)
        refusal = refusal_of(kind.decode(), name.decode(), limit, wait_us, tokens, scopes)
        return Admission(requests, of_tokens, refusal, budgets)

    async def settle(self, tenant: str, request_id: str, used_tokens: int, record: bytes) -> bool:
        """End a request: return what it holds, charge what it used, write its final record.

        A request that is not open (settled before, or counted as lost) is not charged; its record
        is written nevertheless, and is the one that counts.

        Returns:
            whether it was open.
        """
        arguments = (request_id, min(used_tokens, MOST), record)
        return bool(await self._call("settle", tenant, arguments))

    async def renew(self, tenant: str, progress: Mapping[str, Progress]) -> frozenset[str]:
        """Keep a tenant's requests open, by id; return the ids of those that are not open."""
        gone: set[str] = set()
        requests = list(progress.items())
        for first in range(0, len(requests), _RENEWALS):
            arguments: list[Any] = [self._lease_us]
            for request_id, so_far in requests[first : first + _RENEWALS]:
                arguments += (request_id, so_far.prompt_tokens, so_far.completion_tokens)
            reply = await self._call("renew", tenant, arguments)
            gone.update(request_id.decode() for request_id in reply)
        return frozenset(gone)

    async def reclaim(self, tenant: str) -> int:
        """End a tenant's requests that were not renewed in time; return how many.

        What they hold returns, what they had used when they were last renewed is charged, and
        their opening record is written, as `lost`. `admit` does the same for some at a time.
        """
        ended = 0
        while batch := await self._call("reclaim", tenant, ()):
            ended += batch
        return ended

    async def reclaim_all(self) -> int:
        """End the requests of all tenants that were not renewed in time; return how many."""
        ended = 0
        async for key in self._redis.scan_iter(match=LEASES, count=1000, _type="ZSET"):
            start, end = _LEASES_AFFIXES
            ended += await self.reclaim(key.decode()[start:end])
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

        It is counted once, however often it is charged within a day, and now, whenever it ran.
        What is over a limit of a minute is not owed: most of it was used longer ago.

        Returns:
            whether it was counted.
        """
        lines = [_line(scope) for scope in scopes]
        arguments = (request_id, min(used_tokens, MOST), record, *lines)
        marker = f"tera:{{{tenant}}}:charged:{request_id}"
        return bool(await self._call("charge", tenant, arguments, marker))

    async def _call(
        self, operation: str, tenant: str, arguments: Sequence[Any], *more_keys: str
    ) -> Any:
        base = f"tera:{{{tenant}}}:"
        keys = (base + "limits", base + "open", base + "leases", stream_of(tenant))
        given = (
            5 + len(more_keys),
            *keys,
            base + "budget:",
            *more_keys,
            operation,
            "" if self.now_us is None else self.now_us,
            *arguments,
        )
        try:
            return await self._together.run(_SCRIPT_SHA, given)
        except NoScriptError:
            return await self._redis.eval(_SCRIPT, *given)


def refusal_of(
    kind: Kind, name: str, limit: int, wait_us: int | None, tokens: int, scopes: Sequence[Scope]
) -> Refusal:
    """Return the refusal by a limit of one of the scopes."""
    period = next(scope.limits.budget_period for scope in scopes if scope.name == name)
    return Refusal(kind, name, limit, wait_us, tokens, period or "month")


_COUNTED: Final = (
    "requests_per_minute",
    "tokens_per_minute",
    "concurrent_requests",
    "token_budget",
)
_UNLIMITED: Final = Limits()
_ERRORS: Final[Mapping[Kind, type[RateLimitError]]] = {
    "requests": RequestRateLimitError,
    "tokens": TokenRateLimitError,
    "concurrency": ConcurrencyLimitError,
    "budget": QuotaError,
}
_WORDS: Final[Mapping[Kind, str]] = {
    "requests": "{limit} requests per minute",
    "tokens": "{limit} tokens per minute",
    "concurrency": "{limit} concurrent requests",
    "budget": "{limit} tokens per {period}",
}


def _budgets(scopes: Sequence[Scope], told: Sequence[Any]) -> tuple[Spent, ...]:
    names = (scope.name for scope in scopes if scope.limits.token_budget is not None)
    return tuple(
        Spent(name, period.decode(), used, held)
        for name, period, used, held in zip(names, *(told[n::3] for n in range(3)), strict=True)
    )


def _line(scope: Scope) -> str:
    limits = scope.limits
    period = limits.budget_period or "month"
    numbers = (
        limits.requests_per_minute,
        limits.tokens_per_minute,
        limits.concurrent_requests,
        limits.token_budget,
    )
    written = " ".join("-" if number is None else str(min(number, MOST)) for number in numbers)
    return f"{scope.name} {written} {period}"


def _whose(scope: str) -> str:
    kind, _, name = scope.partition(":")
    if kind == "model":
        return f"This tenant's use of the model {name}"
    return "This API key" if kind == "key" else "This tenant"

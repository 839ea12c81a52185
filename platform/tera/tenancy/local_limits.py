"""The same limits, counted in this process only, while Redis is away.

Each gateway replica then has its share of every limit, and of what was left of a budget when Redis
last reported it. The arithmetic is that of `limits.lua`, in Python's integers; the script is tested
against it. There are no leases: everything is gone when the process ends.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final, NamedTuple

from tera.tenancy.limits import MOST, Admission, Allowance, Kind, Refusal, Scope, Spent, refusal_of

PARTS: Final = 60_000_000
"""One request or token is this many parts: a limit of L a minute drains L parts per µs."""
_SECOND_US: Final = 1_000_000
_AHEAD_US: Final = 60 * _SECOND_US
"""How far the time of a debt may lie ahead of a clock that was set back, to be believed."""
_FORGET_ABOVE: Final = 64


@dataclass(slots=True)
class _Counts:
    """The state of a scope: debts in parts as of `at_us`, tokens held and requests open."""

    at_us: int = 0
    request_rate: int = 0
    token_rate: int = 0
    requests: int = 0
    tokens: int = 0
    held: int = 0
    open: int = 0
    ahead_us: int = 0
    """How far the clock has been set back: nothing drains until it has caught up."""
    corrected: bool = False
    """`at_us` was further ahead than is believed."""

    def advance(self, now_us: int, request_limit: int = 0, token_limit: int = 0) -> None:
        """Let debts drain until now, at these limits' rates or the last ones that were not 0."""
        self.request_rate = request_limit or self.request_rate
        self.token_rate = token_limit or self.token_rate
        self.corrected = self.at_us > now_us + _AHEAD_US
        if self.corrected:
            self.at_us = now_us
        elapsed_us = max(0, now_us - self.at_us)
        self.ahead_us = max(0, self.at_us - now_us)
        self.requests = max(0, self.requests - self.request_rate * elapsed_us)
        self.tokens = max(0, self.tokens - self.token_rate * elapsed_us)
        self.at_us = max(self.at_us, now_us)

    def from_now(self, wait_us: int) -> int:
        """Return a wait from now, for a debt that drains only once the clock has caught up."""
        return min(self.ahead_us + wait_us, MOST)


@dataclass(slots=True)
class _Budget:
    used: int = 0
    held: int = 0
    known_used: int = 0
    known_held: int = 0
    """As Redis reported it, over all gateway replicas."""


@dataclass(frozen=True, slots=True)
class _Hold:
    """What an open request must release."""

    tokens: int
    scopes: tuple[str, ...]
    budgets: tuple[_Budget, ...]


@dataclass(slots=True)
class _Tenant:
    counts: dict[str, _Counts] = field(default_factory=dict)
    open: dict[str, _Hold] = field(default_factory=dict)
    budgets: dict[tuple[str, str], _Budget] = field(default_factory=dict)
    """By period and scope."""


class _Limit(NamedTuple):
    whole: int
    share: int
    """What this process may use of the limit; for a budget, of what was left of it."""


@dataclass(slots=True)
class _Counted:
    """One scope in one decision: its limits, and copies of its counts."""

    name: str
    requests: _Limit | None
    tokens: _Limit | None
    concurrent: _Limit | None
    budget: _Limit | None
    period: str
    counts: _Counts
    spent: _Budget


class _Wait(NamedTuple):
    """A limit that refuses, and the wait in µs; None means for ever."""

    kind: Kind
    scope: str
    limit: int
    wait_us: int | None


def _wall_clock_us() -> int:
    return time.time_ns() // 1000


class LocalLimiter:
    """Admits and settles requests against limits that are counted in this process."""

    def __init__(self, clock_us: Callable[[], int] = _wall_clock_us) -> None:
        """`clock_us` gives µs since 1970; it decides the UTC days and months of budgets."""
        self._clock_us = clock_us
        self._tenants: dict[str, _Tenant] = {}
        self._forget_above = _FORGET_ABOVE

    @property
    def tenants(self) -> int:
        """How many tenants are remembered."""
        return len(self._tenants)

    def admit(
        self,
        tenant: str,
        request_id: str,
        scopes: Sequence[Scope],
        tokens: int,
        *,
        replicas: int = 1,
    ) -> Admission:
        """Admit or refuse a request as `RedisLimiter.admit` does.

        Args:
            tenant: whose request it is.
            request_id: unique.
            scopes: from `scopes_of`.
            tokens: the most that it can use.
            replicas: how many gateway replicas share each limit. A share is at least 1, unless
                the limit is 0; what only a share refuses may be tried again.
        """
        now_us = self._clock_us()
        self._forget(now_us)
        held = min(tokens, MOST)
        mine = self._tenants.setdefault(tenant, _Tenant())
        counted = [_counted(mine, scope, replicas, now_us) for scope in scopes]
        waits = [wait for it in counted for wait in _waits(it, held)]
        if waits and request_id not in mine.open:
            # A limit that never lets the request pass outranks every wait.
            longest = max(waits, key=lambda it: MOST + 1 if it.wait_us is None else it.wait_us)
            refusal = refusal_of(*longest, tokens, scopes)
            mine.counts.update({it.name: it.counts for it in counted if it.counts.corrected})
            return _admission(counted, refusal)
        # Asked again, it is open already, and pays once.
        if request_id not in mine.open:
            _spend(mine, request_id, counted, held)
        return _admission(counted)

    def know(self, tenant: str, budgets: Sequence[Spent]) -> None:
        """Adopt what Redis has counted of a tenant's budgets.

        Redis has already been charged what was used here, or is about to be.
        """
        now_us = self._clock_us()
        self._forget(now_us)
        mine = self._tenants.setdefault(tenant, _Tenant())
        for told in budgets:
            budget = mine.budgets.get((told.period, told.scope))
            if budget is None:
                _drop_past_budgets(mine, now_us)
                budget = mine.budgets[told.period, told.scope] = _Budget()
            budget.known_used, budget.known_held, budget.used = told.used, told.held, 0

    def settle(self, tenant: str, request_id: str, used_tokens: int) -> bool:
        """End a request: release what it holds, charge what it used; return whether it was open."""
        mine = self._tenants.get(tenant)
        hold = mine.open.pop(request_id, None) if mine else None
        if mine is None or hold is None:
            return False
        now_us = self._clock_us()
        used = min(used_tokens, MOST)
        # Those of its admission: its limits may have been edited since.
        for name in hold.scopes:
            counts = mine.counts[name]
            counts.advance(now_us)
            counts.held = max(0, counts.held - hold.tokens)
            counts.open -= 1
            # Without a limit on tokens no debt would ever drain.
            if counts.token_rate:
                counts.tokens = _more(counts.tokens, used)
        for budget in hold.budgets:
            budget.used = min(budget.used + used, MOST)
            budget.held = max(0, budget.held - hold.tokens)
        return True

    def _forget(self, now_us: int) -> None:
        """Drop tenants with no debts, once there are twice as many as last time."""
        if len(self._tenants) <= self._forget_above:
            return
        periods = _periods(now_us)
        self._tenants = {
            name: mine for name, mine in self._tenants.items() if _owes(mine, now_us, periods)
        }
        self._forget_above = max(_FORGET_ABOVE, 2 * len(self._tenants))


def _counted(mine: _Tenant, scope: Scope, replicas: int, now_us: int) -> _Counted:
    limits = scope.limits
    requests = _limit(limits.requests_per_minute, replicas)
    tokens = _limit(limits.tokens_per_minute, replicas)
    counts = copy(mine.counts.get(scope.name) or _Counts())
    counts.advance(now_us, requests.share if requests else 0, tokens.share if tokens else 0)
    period = _period(limits.budget_period or "month", now_us)
    spent = mine.budgets.get((period, scope.name)) or _Budget()
    return _Counted(
        name=scope.name,
        requests=requests,
        tokens=tokens,
        concurrent=_limit(limits.concurrent_requests, replicas),
        budget=_limit(limits.token_budget, replicas, spent.known_used + spent.known_held),
        period=period,
        counts=counts,
        spent=spent,
    )


def _limit(limit: int | None, replicas: int, gone: int = 0) -> _Limit | None:
    if limit is None:
        return None
    whole = min(limit, MOST)
    rest = max(0, whole - gone)
    # At least 1 while anything is left: many replicas must not turn a small limit into a block.
    return _Limit(whole, max(rest // replicas, min(rest, 1)))


def _period(kind: str, now_us: int) -> str:
    now = datetime.fromtimestamp(now_us // _SECOND_US, UTC)
    return now.strftime("%Y-%m-%d" if kind == "day" else "%Y-%m")


def _periods(now_us: int) -> set[str]:
    return {_period(kind, now_us) for kind in ("day", "month")}


def _drop_past_budgets(mine: _Tenant, now_us: int) -> None:
    periods = _periods(now_us)
    mine.budgets = {
        (period, scope): budget
        for (period, scope), budget in mine.budgets.items()
        if period in periods
    }


def _waits(it: _Counted, tokens: int) -> Iterator[_Wait]:
    """Yield the limits that refuse a request of `tokens` tokens."""
    counts = it.counts
    if it.requests is not None:
        yield from _wait("requests", it, it.requests, _request_wait(counts, it.requests))
    if it.tokens is not None:
        yield from _wait("tokens", it, it.tokens, _token_wait(counts, it.tokens, tokens))
    if it.concurrent is not None:
        full = counts.open >= it.concurrent.share
        yield from _wait("concurrency", it, it.concurrent, _SECOND_US if full else 0)
    if it.budget is not None:
        yield from _wait("budget", it, it.budget, _budget_wait(it.spent, it.budget, tokens))


def _wait(kind: Kind, it: _Counted, limit: _Limit, wait_us: int | None) -> Iterator[_Wait]:
    if limit.whole == 0:
        wait_us = None
    if wait_us != 0:
        # For a budget the share is a part of what is left, which is not a limit the tenant knows.
        told = limit.whole if kind == "budget" else limit.share
        yield _Wait(kind, it.name, told, wait_us)


def _request_wait(counts: _Counts, limit: _Limit) -> int:
    wait_us = _time_to(counts.requests, limit.share - 1, limit.share)
    return counts.from_now(wait_us) if wait_us else 0


def _token_wait(counts: _Counts, limit: _Limit, tokens: int) -> int | None:
    if tokens > limit.whole:
        return None
    if tokens > limit.share:
        # Only this replica's share is too small: the request may pass once Redis is back.
        return _SECOND_US
    level = limit.share - tokens
    if counts.held <= level:
        wait_us = _time_to(counts.tokens, level - counts.held, limit.share)
        return counts.from_now(wait_us) if wait_us else 0
    # Other requests hold too much; when they end, what they have used becomes debt.
    return max(_SECOND_US, counts.from_now(_time_to(counts.tokens, level, limit.share)))


def _budget_wait(spent: _Budget, limit: _Limit, tokens: int) -> int | None:
    if spent.known_used + spent.used + tokens > limit.whole:
        return None
    return _SECOND_US if spent.used + spent.held + tokens > limit.share else 0


def _spend(mine: _Tenant, request_id: str, counted: Sequence[_Counted], tokens: int) -> None:
    budgets = []
    for it in counted:
        if it.requests is not None:
            it.counts.requests = _more(it.counts.requests, 1)
        it.counts.held = min(it.counts.held + tokens, MOST)
        it.counts.open += 1
        mine.counts[it.name] = it.counts
        if it.budget is not None:
            it.spent.held = min(it.spent.held + tokens, MOST)
            mine.budgets[it.period, it.name] = it.spent
            budgets.append(it.spent)
    names = tuple(it.name for it in counted)
    mine.open[request_id] = _Hold(tokens, names, tuple(budgets))


def _more(debt: int, number: int) -> int:
    whole, parts = divmod(debt, PARTS)
    return min(whole + number, MOST) * PARTS + parts


def _time_to(debt: int, level: int, rate: int) -> int:
    """Return the µs until a debt has drained to `level` requests or tokens; 0 at a rate of 0."""
    over = debt - level * PARTS
    return min(-(-over // rate), MOST) if over > 0 and rate else 0


def _admission(counted: Sequence[_Counted], refusal: Refusal | None = None) -> Admission:
    budgets = (
        Spent(
            it.name,
            it.period,
            min(it.spent.known_used + it.spent.used, MOST),
            min(it.spent.known_held + it.spent.held, MOST),
        )
        for it in counted
        if it.budget is not None
    )
    return Admission(_requests(counted), _tokens(counted), refusal, tuple(budgets))


def _requests(counted: Sequence[_Counted]) -> Allowance | None:
    return _least(
        _allowance(it.requests.share, it.counts.requests, it.counts)
        for it in counted
        if it.requests is not None
    )


def _tokens(counted: Sequence[_Counted]) -> Allowance | None:
    return _least(
        _allowance(it.tokens.share, _more(it.counts.tokens, it.counts.held), it.counts)
        for it in counted
        if it.tokens is not None
    )


def _allowance(limit: int, debt: int, counts: _Counts) -> Allowance:
    remaining = max(0, limit - -(-debt // PARTS))
    reset_us = counts.from_now(_time_to(debt, 0, limit)) if limit else 0
    return Allowance(limit, remaining, reset_us)


def _least(allowances: Iterator[Allowance]) -> Allowance | None:
    """Return the allowance with the smallest share remaining."""
    return min(allowances, key=lambda it: it.remaining / it.limit if it.limit else 0, default=None)


def _owes(mine: _Tenant, now_us: int, periods: set[str]) -> bool:
    if mine.open or any(period in periods for period, _ in mine.budgets):
        return True
    for counts in mine.counts.values():
        counts.advance(now_us)
    return any(counts.requests or counts.tokens for counts in mine.counts.values())

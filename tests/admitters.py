"""An admitter without Redis, for gateways in this process: the limits are those of one replica."""

from collections.abc import Callable
from dataclasses import dataclass, field

from tera.config.limits import TenantLimits
from tera.tenancy.keys import ApiKey
from tera.tenancy.limits import Admission, Progress, Scope, scopes_of
from tera.tenancy.local_limits import LocalLimiter
from tera.tenancy.usage import UsageRecord


@dataclass
class LocalAdmitter:
    """Admits against `limits`, which the test may change, and keeps every settled record."""

    limits: TenantLimits = field(default_factory=TenantLimits)
    settled: list[UsageRecord] = field(default_factory=list)
    running: dict[str, Callable[[], Progress]] = field(default_factory=dict)
    now_us: int = 1_800_000_000_000_000

    def __post_init__(self) -> None:
        self._limiter = LocalLimiter(lambda: self.now_us)

    async def admit(
        self,
        key: ApiKey,
        opening: UsageRecord,
        tokens: int,
        *,
        progress: Callable[[], Progress],
        told: Callable[[Admission], None],
    ) -> "Held":
        scopes = self._scopes(key, opening.model)
        admission = self._limiter.admit(key.tenant, opening.request_id, scopes, tokens)
        told(admission)
        if admission.refusal is not None:
            raise admission.refusal.error()
        self.running[opening.request_id] = progress
        return Held(self)

    async def refuse_early(
        self, key: ApiKey, opening: UsageRecord, *, told: Callable[[Admission], None]
    ) -> None:
        scopes = scopes_of(self.limits, key.limits, key.key_id, None)
        if any(scope.blocks for scope in scopes):
            admission = self._limiter.admit(key.tenant, opening.request_id, scopes, 1)
            assert admission.refusal is not None
            told(admission)
            raise admission.refusal.error()

    def weight(self, key: ApiKey, model: str) -> float:
        return 1

    def most_tokens(self, key: ApiKey, model: str) -> int | None:
        bounds = [scope.limits.tokens_per_minute for scope in self._scopes(key, model)]
        return min((bound for bound in bounds if bound is not None), default=None)

    def settle(self, record: UsageRecord) -> None:
        del self.running[record.request_id]
        used = record.prompt_tokens + record.completion_tokens
        self._limiter.settle(record.tenant, record.request_id, used)
        self.settled.append(record)

    def _scopes(self, key: ApiKey, model: str) -> list[Scope]:
        return scopes_of(self.limits, key.limits, key.key_id, model)


@dataclass(frozen=True)
class Held:
    """What one request holds."""

    admitter: LocalAdmitter

    def settle(self, record: UsageRecord) -> None:
        self.admitter.settle(record)

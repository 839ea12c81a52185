"""What the tests of `RedisLimiter` and its script share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tera.config.limits import Limits
from tera.tenancy.limits import Admission, Refusal, Scope
from tera.tenancy.redis_limits import RedisLimiter
from tera.tenancy.usage import UsageRecord, decode_record, encode_record

if TYPE_CHECKING:
    from collections.abc import Sequence

    from redis.asyncio import Redis

NOW_US = 1_800_000_000_000_000
"""2027-01-15 08:00 UTC."""
SECOND_US = 1_000_000
EVERY_LIMIT: dict[str, Any] = {
    "requests_per_minute": 100,
    "tokens_per_minute": 10_000,
    "concurrent_requests": 10,
    "token_budget": 100_000,
}


def moved(limiter: RedisLimiter, micros: int) -> None:
    assert limiter.now_us is not None
    limiter.now_us += micros


def tenant(**limits: Any) -> list[Scope]:
    return [Scope("tenant", Limits(**limits))]


def record(request_id: str = "req_1", **members: Any) -> bytes:
    known = {
        "request_id": request_id,
        "tenant": "acme",
        "key_id": "key_1",
        "model": "llama-8b",
        "route": "/v1/completions",
        "status": "lost",
        "started_s": 1_799_999_999.123,
    }
    return encode_record(UsageRecord(**{**known, **members}))


async def admitted(
    limiter: RedisLimiter, request_id: str, scopes: Sequence[Scope], tokens: int = 1
) -> Admission:
    answer = await limiter.admit("acme", request_id, scopes, tokens, record(request_id))
    assert answer.refusal is None
    return answer


async def refused(
    limiter: RedisLimiter, scopes: Sequence[Scope], tokens: int = 1, request_id: str = "refused"
) -> Refusal:
    answer = await limiter.admit("acme", request_id, scopes, tokens, record(request_id))
    assert answer.refusal is not None
    return answer.refusal


async def everything(redis: Redis) -> dict[bytes, bytes]:
    names: Any = await redis.keys("*")
    return {name: await redis.dump(name) or b"" for name in sorted(names)}


async def ledger(redis: Redis) -> list[tuple[bytes, UsageRecord]]:
    entries: Any = await redis.xrange("tera:{acme}:usage")
    return [(fields[b"id"], decode_record(fields[b"r"])) for _, fields in entries]

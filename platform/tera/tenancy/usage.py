"""The usage ledger: one record per request, and sums of them.

When a request ends, its record is appended (`limits.lua`) to a stream per tenant:

    tera:{<tenant>}:usage     stream   entries of two fields: `id` of the request, `r`, its JSON
    tera:{<tenant>}:exported  string   the last entry that `usage_export.py` has in a file

It is written at least once. If a request has several entries, the last one is right: a request may
be counted as lost while its gateway replica is frozen, and finish normally later.
"""

import logging
import re
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from dataclasses import dataclass, fields
from typing import Any, Final, Literal

import msgspec
from redis.asyncio import Redis

from tera.tenancy.redis import reaching

logger = logging.getLogger(__name__)

Status = Literal["finished", "failed", "cancelled", "lost"]

STREAMS: Final = "tera:{*}:usage"
"""Matches the streams of all tenants; braces have no meaning in Redis's patterns."""
_STREAM = re.compile(rb"tera:\{([a-z0-9._-]+)\}:usage")

PAGE_ENTRIES: Final = 1000
PASS_ENTRIES: Final = 1_000_000
"""Request ids remembered in one pass: about 100 MB."""
CLOCK_SKEW_S: Final = 300.0
"""How far a gateway replica's clock may be ahead of Redis's."""
STORE: Final = "The usage ledger"
_YEAR_10000_S: Final = 253_402_300_800


class UsageRecord(msgspec.Struct, frozen=True, gc=False):
    """What one request used; contains nothing of the prompt or the answer.

    The record that is kept while a request runs has the status `lost`, which is right if no other
    record is ever written.
    """

    request_id: str
    tenant: str
    key_id: str
    model: str
    """Short name; empty if the request failed before it was known."""
    route: str
    status: Status
    started_s: float
    """Unix seconds on the gateway replica's clock, to the millisecond."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    code: str = ""
    """Code of the error that the client saw."""
    first_token_s: float | None = None
    """Seconds from the start."""
    duration_s: float = 0.0
    replica_switches: int = 0
    user: str = ""
    """The client's name for its end user."""

    def __post_init__(self) -> None:
        if not 0 <= self.started_s < _YEAR_10000_S:
            raise ValueError("started_s is no time")
        # Lua writes 14 digits: with more, a request that was first counted as lost would seem to
        # have begun at another time, and perhaps belong to another hour's file.
        msgspec.structs.force_setattr(self, "started_s", round(self.started_s, 3))


_encoder: Final = msgspec.json.Encoder()
_decoder: Final = msgspec.json.Decoder(UsageRecord)


def encode_record(record: UsageRecord) -> bytes:
    """Return the record as JSON."""
    return _encoder.encode(record)


def decode_record(data: bytes) -> UsageRecord:
    """Return the record; unknown members, from a later version, are ignored.

    Raises:
        msgspec.DecodeError: it is not a record.
    """
    return _decoder.decode(data)


def stream_of(tenant: str) -> str:
    """Return the name of a tenant's stream."""
    return f"tera:{{{tenant}}}:usage"


def position_of(tenant: str) -> str:
    """Return the name of the Redis key that holds a tenant's last exported entry."""
    return f"tera:{{{tenant}}}:exported"


def day_of(record: UsageRecord) -> str:
    """Return the UTC day on which the request began, such as 2027-01-31."""
    return time.strftime("%Y-%m-%d", time.gmtime(record.started_s))


@dataclass(frozen=True, slots=True)
class UsageRow:
    """Sums of a tenant's requests to one model that began on one UTC day."""

    tenant: str
    model: str
    day: str
    requests: int = 0
    """All requests, whatever their outcome."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    failed: int = 0
    cancelled: int = 0
    lost: int = 0


class UsageLedger:
    """Reads the ledger in Redis: what has not been trimmed yet.

    Every method raises InternalError when Redis cannot be reached.
    """

    def __init__(self, redis: Redis) -> None:
        """The caller closes `redis`."""
        self._redis = redis

    async def tenants(self) -> list[str]:
        """Return the tenants that have records, sorted."""
        async with reaching(STORE):
            return sorted([tenant async for tenant in tenants_with_records(self._redis)])

    async def records(
        self,
        tenant: str | None = None,
        *,
        since_s: float = 0.0,
        until_s: float | None = None,
    ) -> AsyncGenerator[UsageRecord]:
        """Yield the last record of each request that began in a time range.

        Records come tenant by tenant, mostly newest first; those appended meanwhile are left out.
        Memory is bounded: a longer stream is read in several passes.

        Args:
            tenant: None means all tenants.
            since_s: Unix seconds.
            until_s: Unix seconds, exclusive; None means now.
        """
        for name in [tenant] if tenant is not None else await self.tenants():
            async with reaching(STORE):
                entries: int = await self._redis.xlen(stream_of(name))
                newest: Any = await self._redis.xrevrange(stream_of(name), count=1)
            if not newest:
                continue
            # Each pass remembers the ids of its part only: which part is decided by their hash.
            passes = 1 + entries // PASS_ENTRIES
            for number in range(passes):
                seen: set[str] = set()
                async for record in self._backwards(name, newest[0][0], since_s):
                    request_id = record.request_id
                    if hash(request_id) % passes != number or request_id in seen:
                        continue
                    seen.add(request_id)
                    if began_in(record, since_s, until_s):
                        yield record

    async def summary(
        self,
        tenant: str | None = None,
        *,
        since_s: float = 0.0,
        until_s: float | None = None,
    ) -> list[UsageRow]:
        """Return the sums, sorted by tenant, model and day; see `records`."""
        sums = Sums()
        async for record in self.records(tenant, since_s=since_s, until_s=until_s):
            sums.add(record)
        return sums.rows()

    async def _backwards(
        self, tenant: str, newest: bytes, since_s: float
    ) -> AsyncGenerator[UsageRecord]:
        """Yield all entries from the last one backwards, until they are too old.

        An entry is written when its request ends, so older entries cannot be in the time range.
        """
        oldest = str(max(0, int((since_s - CLOCK_SKEW_S) * 1000)))

        async def read(until: bytes) -> Any:
            return await self._redis.xrevrange(
                stream_of(tenant), max=until, min=oldest, count=PAGE_ENTRIES
            )

        async for record in walk(tenant, read, newest):
            yield record


async def walk(
    tenant: str, read: Callable[[bytes], Awaitable[Any]], start: bytes
) -> AsyncGenerator[UsageRecord]:
    """Yield the readable records of a tenant's stream, page by page.

    Args:
        tenant: whose stream it is.
        read: returns up to `PAGE_ENTRIES` entries from a place on, in either direction.
        start: the first place.

    Raises:
        InternalError: Redis cannot be reached.
    """
    while True:
        async with reaching(STORE):
            page = await read(start)
        for _, entry in page:
            record = readable(tenant, entry.get(b"r", b""))
            if record is not None:
                yield record
        if len(page) < PAGE_ENTRIES:
            return
        start = b"(" + page[-1][0]  # without that entry itself


class Sums:
    """Sums records by tenant, model and day."""

    def __init__(self) -> None:
        self._sums: dict[tuple[str, str, str], list[int]] = {}

    def add(self, record: UsageRecord) -> None:
        """Count one request."""
        counts = (
            1,
            record.prompt_tokens,
            record.cached_tokens,
            record.completion_tokens,
            record.status == "failed",
            record.status == "cancelled",
            record.status == "lost",
        )
        group = (record.tenant, record.model, day_of(record))
        sums = self._sums.setdefault(group, [0] * len(counts))
        for place, count in enumerate(counts):
            sums[place] += count

    def rows(self) -> list[UsageRow]:
        """Return the sums, sorted by tenant, model and day."""
        return [UsageRow(*group, *sums) for group, sums in sorted(self._sums.items())]


def total_of(rows: Iterable[UsageRow]) -> UsageRow:
    """Return the sum of all rows, with empty names."""
    kept = list(rows)
    counts = [field.name for field in fields(UsageRow) if field.type is int]
    return UsageRow("", "", "", *(sum(getattr(row, name) for row in kept) for name in counts))


async def tenants_with_records(redis: Redis) -> AsyncGenerator[str]:
    """Yield each tenant that has a stream; SCAN may return one twice."""
    async for name in redis.scan_iter(match=STREAMS, count=PAGE_ENTRIES, _type="STREAM"):
        found = _STREAM.fullmatch(name)
        if found is not None:
            yield found[1].decode()


def readable(tenant: str, data: bytes) -> UsageRecord | None:
    """Return the record of an entry; None, with an error in the log, if it is damaged."""
    try:
        return decode_record(data)
    except (msgspec.DecodeError, UnicodeDecodeError):
        logger.error("An entry of the usage ledger of tenant %r cannot be read.", tenant)
        return None


def began_in(record: UsageRecord, since_s: float, until_s: float | None) -> bool:
    """Return whether the request began in the range; `until_s` is exclusive, None means no end."""
    return since_s <= record.started_s and (until_s is None or record.started_s < until_s)

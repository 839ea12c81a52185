"""Keeps the ledger within a bound of memory, whoever fills it."""

import logging
from collections.abc import Iterable
from typing import Any, Final

from redis.asyncio import Redis

from tera.tenancy.usage import PAGE_ENTRIES, position_of, stream_of

logger = logging.getLogger(__name__)

TRIM_ENTRIES: Final = 10_000
"""Trimmed in one call at the most: about a millisecond of Redis's time."""

# KEYS: stream, position. ARGV: entries to keep, 1 if only what is exported may go, most to trim,
# page size. Returns what was trimmed. With an export, the newest entries up to a page may be in no
# file yet; more of them mean that the export is behind, and then nothing goes.
_TRIM_SCRIPT: Final = """
local keep = tonumber(ARGV[1])
if ARGV[2] == '1' then
  local position = redis.call('GET', KEYS[2])
  if not position then return 0 end
  local waiting = #redis.call('XRANGE', KEYS[1], '(' .. position, '+', 'COUNT', ARGV[4])
  if waiting >= tonumber(ARGV[4]) then return 0 end
  keep = math.max(keep, waiting)
end
return redis.call('XTRIM', KEYS[1], 'MAXLEN', '~', keep, 'LIMIT', ARGV[3])
"""


async def keep_within(
    redis: Redis, tenants: Iterable[str], most_bytes: int, *, exported: bool
) -> None:
    """Trim the oldest records of the largest streams, until all of them are within the bound.

    A tenant's stream is not touched for as long as it is among the smaller ones: who fills the
    ledger loses history, the others do not.

    Args:
        redis: where the streams are.
        tenants: all that have one.
        most_bytes: of all streams together.
        exported: keep what is in no file yet, even beyond the bound.

    Raises:
        RedisError: Redis cannot be reached.
    """
    sizes = await _sizes(redis, list(tenants))
    level = fair_level(sizes.values(), most_bytes)
    for tenant, size in sizes.items():
        if size > level:
            await _trim(redis, tenant, level / size, exported=exported)


def fair_level(sizes: Iterable[int], most: int) -> int:
    """Return the size to which the larger ones must shrink so that all make no more than `most`.

    Max-min fairness (Bertsekas and Gallager, 1992): no one shrinks below an equal share of what
    the smaller ones leave.
    """
    rest, ordered = most, sorted(sizes)
    for place, size in enumerate(ordered):
        share = rest // (len(ordered) - place)
        if size > share:
            return share
        rest -= size
    return most


async def _sizes(redis: Redis, tenants: list[str]) -> dict[str, int]:
    """Return how many bytes each tenant's stream takes."""
    sizes: dict[str, int] = {}
    for first in range(0, len(tenants), PAGE_ENTRIES):
        page = tenants[first : first + PAGE_ENTRIES]
        async with redis.pipeline(transaction=False) as pipeline:
            for tenant in page:
                pipeline.memory_usage(stream_of(tenant), samples=0)  # 0 is all: it is exact
            found: list[Any] = await pipeline.execute()
        sizes.update((tenant, size or 0) for tenant, size in zip(page, found, strict=True))
    return sizes


async def _trim(redis: Redis, tenant: str, part: float, *, exported: bool) -> None:
    keep = int(await redis.xlen(stream_of(tenant)) * part)
    total, trimmed = 0, TRIM_ENTRIES
    while trimmed * 2 >= TRIM_ENTRIES:
        trimmed = await redis.eval(
            _TRIM_SCRIPT,
            2,
            *(stream_of(tenant), position_of(tenant)),
            *(keep, int(exported), TRIM_ENTRIES, PAGE_ENTRIES),
        )
        total += trimmed
    if total and not exported:
        logger.warning(
            "The usage ledger is full: the %d oldest records of tenant %r are gone before their "
            "time. Set gateway.usage.exportDirectory to keep them in files.",
            total,
            tenant,
        )

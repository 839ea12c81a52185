"""Exports the ledger to files: JSON Lines, one file per hour in which requests began.

    <directory>/<YYYY>/<MM>/<DD>/<HH>.jsonl        UTC, of all tenants

Entries are exported at least once, in this order:

1. A page of entries is appended to the files and synced.
2. The position in the stream is stored in Redis.
3. Entries before the position that are older than the retention are trimmed, and then the oldest
   ones while the ledger takes more memory than it may (`usage_bound.py`).

So if the process ends between 1 and 2, entries are written again, and if it ends during 1, there
may be a torn line. Each line has `entry`, its place in the stream, and a request's lines are all in
one file; `read_export` takes the one with the highest place and skips torn lines.
"""

import asyncio
import calendar
import logging
import os
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import msgspec
from redis.asyncio import Redis
from redis.exceptions import RedisError, ResponseError

from tera.background import Background
from tera.config.gateway import UsageConfig
from tera.errors import TeraError
from tera.tenancy.redis import is_refusal, reaching
from tera.tenancy.usage import (
    PAGE_ENTRIES,
    STORE,
    UsageRecord,
    began_in,
    decode_record,
    position_of,
    stream_of,
    tenants_with_records,
)
from tera.tenancy.usage_bound import TRIM_ENTRIES, keep_within

logger = logging.getLogger(__name__)

LOCK: Final = "tera:usage:exporter"

_LOCK_S: Final = 30.0
_PASS_BYTES: Final = 256 * 1024 * 1024
"""Larger files are read in several passes, each of which remembers a part of the request ids."""
_FILES: Final = "[0-9][0-9][0-9][0-9]/[0-9][0-9]/[0-9][0-9]/[0-9][0-9].jsonl"

# A full Redis refuses a script's first write unless that write frees memory. These scripts make
# room in it, so each one that writes starts with DEL or XTRIM.

# The lock contains its holder's token, or `resting` between passes: then another pass would find
# little, so only one started by hand (ARGV[3]) may take it.
_ACQUIRE_SCRIPT: Final = """
local holder = redis.call('GET', KEYS[1])
if holder and not (holder == 'resting' and ARGV[3] == '1') then return 0 end
redis.call('DEL', KEYS[1])
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1
"""

_RENEW_SCRIPT: Final = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
return redis.call('PEXPIRE', KEYS[1], ARGV[2])
"""

_RELEASE_SCRIPT: Final = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
redis.call('DEL', KEYS[1])
if ARGV[2] ~= '0' then redis.call('SET', KEYS[1], 'resting', 'PX', ARGV[2]) end
return 1
"""

_PLACES: Final = """
local function place(id)
  local ms, number = string.match(id, '^(%d+)-(%d+)$')
  return tonumber(ms), tonumber(number)
end
local function before(a, b)
  local a_ms, a_number = place(a)
  local b_ms, b_number = place(b)
  return a_ms < b_ms or (a_ms == b_ms and a_number < b_number)
end
"""

# KEYS: stream, position. ARGV: page size, retention in ms, 1 if entries are exported, most to trim.
# Trims, then returns the number of trimmed entries and the next page. An empty stream is removed
# together with its position, so that an idle tenant costs nothing.
_PAGE_SCRIPT: Final = (
    _PLACES
    + """
local position = redis.call('GET', KEYS[2]) or '0-0'
local now = redis.call('TIME')
local oldest_ms = now[1] * 1000 + math.floor(now[2] / 1000) - ARGV[2]
local oldest = string.format('%.0f-0', math.max(0, oldest_ms))
if ARGV[3] == '1' and before(position, oldest) then
  local ms, number = place(position)
  oldest = string.format('%.0f-%.0f', ms, number + 1)
end
local trimmed = redis.call('XTRIM', KEYS[1], 'MINID', '~', oldest, 'LIMIT', ARGV[4])
if trimmed * 2 < tonumber(ARGV[4]) then
  -- Whole nodes are gone, of a hundred entries each; so this is little.
  trimmed = trimmed + redis.call('XTRIM', KEYS[1], 'MINID', oldest)
end
if redis.call('XLEN', KEYS[1]) == 0 then
  redis.call('DEL', KEYS[1], KEYS[2])
  return {trimmed, {}}
end
if ARGV[3] ~= '1' then return {trimmed, {}} end
return {trimmed, redis.call('XRANGE', KEYS[1], '(' .. position, '+', 'COUNT', ARGV[1])}
"""
)

# Never moves back: if an exporter was frozen while another one ran, both have synced what they
# store.
_ADVANCE_SCRIPT: Final = (
    _PLACES
    + """
if before(redis.call('GET', KEYS[1]) or '0-0', ARGV[1]) then
  redis.call('DEL', KEYS[1])
  redis.call('SET', KEYS[1], ARGV[1])
end
"""
)


class ExportBusyError(TeraError):
    """Another exporter is at work."""


class ExportedRecord(UsageRecord, frozen=True, gc=False):
    """A line of a file."""

    entry: str = ""
    """Place in the tenant's stream; of a request's lines, the one with the highest is right."""


_encoder: Final = msgspec.json.Encoder()
_decoder: Final = msgspec.json.Decoder(ExportedRecord)


class UsageExporter(Background):
    """Copies the ledger to files and trims it, while the block runs.

    All gateway replicas may have one; only one at a time works. Without a directory, the ledger is
    only trimmed.
    """

    def __init__(
        self, redis: Redis, config: Callable[[], UsageConfig], interval_s: float = 60.0
    ) -> None:
        """The caller closes `redis`; `config` is called before each pass."""
        self._redis = redis
        self._config = config
        self._interval_s = interval_s

    async def _run(self) -> None:
        while True:
            try:
                await self._pass(rest_s=self._interval_s)
            except ExportBusyError as error:
                logger.debug("%s", error.message)
            except (TeraError, OSError) as error:
                logger.warning("The usage ledger is not exported now: %s", error)
            except Exception:
                # The edge of this task: if it ended, the ledger would grow without bound.
                logger.exception("Exporting the usage ledger failed; trying again.")
            await asyncio.sleep(self._interval_s)

    async def export(self) -> int:
        """Run one pass now; return the number of entries written.

        Raises:
            ExportBusyError: another exporter is at work.
            InternalError: Redis cannot be reached.
            OSError: a file cannot be written.
        """
        return await self._pass(rest_s=0)

    async def _pass(self, rest_s: float) -> int:
        lock = _Lock(self._redis)
        await lock.acquire(by_hand=not rest_s)
        try:
            return await self._export_tenants(lock, self._config())
        finally:
            await lock.release(rest_s)

    async def _export_tenants(self, lock: "_Lock", config: UsageConfig) -> int:
        written = 0
        tenants: set[str] = set()
        async with reaching(STORE):
            async for tenant in tenants_with_records(self._redis):
                tenants.add(tenant)
                try:
                    written += await self._export_tenant(tenant, lock, config)
                except ResponseError as error:
                    if not is_refusal(error):
                        raise
                    # What one tenant's keys hold must not keep the others' records from the files.
                    logger.error("Records of tenant %r are not exported: %s", tenant, error)
            exported = bool(config.export_directory)
            await keep_within(self._redis, tenants, config.max_bytes, exported=exported)
        return written

    async def _export_tenant(self, tenant: str, lock: "_Lock", config: UsageConfig) -> int:
        written = 0
        while True:
            await lock.renew()
            trimmed, entries = await self._page(tenant, config)
            if entries:
                await asyncio.to_thread(_write, Path(config.export_directory), tenant, entries)
                written += len(entries)
                position = entries[-1][0]
                await self._redis.eval(_ADVANCE_SCRIPT, 1, position_of(tenant), position)
            elif trimmed * 2 < TRIM_ENTRIES:
                return written

    async def _page(self, tenant: str, config: UsageConfig) -> tuple[int, list[Any]]:
        trimmed, entries = await self._redis.eval(
            _PAGE_SCRIPT,
            2,
            *(stream_of(tenant), position_of(tenant)),
            *(PAGE_ENTRIES, config.retention_days * 86_400_000),
            *(int(bool(config.export_directory)), TRIM_ENTRIES),
        )
        return trimmed, entries


class _Lock:
    """A lock held by one exporter; it expires soon after its holder ends."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._token = secrets.token_hex(16)
        self._renewed = 0.0

    async def acquire(self, *, by_hand: bool) -> None:
        self._renewed = time.monotonic()
        async with reaching(STORE):
            acquired = await self._redis.eval(
                _ACQUIRE_SCRIPT, 1, LOCK, self._token, int(_LOCK_S * 1000), int(by_hand)
            )
        if not acquired:
            raise ExportBusyError("Another exporter of the usage ledger is at work.")

    async def renew(self) -> None:
        now = time.monotonic()
        if now - self._renewed < _LOCK_S / 3:
            return
        self._renewed = now
        if not await self._redis.eval(_RENEW_SCRIPT, 1, LOCK, self._token, int(_LOCK_S * 1000)):
            raise ExportBusyError("Another exporter of the usage ledger has taken over.")

    async def release(self, rest_s: float) -> None:
        try:
            await self._redis.eval(_RELEASE_SCRIPT, 1, LOCK, self._token, int(rest_s * 1000))
        except RedisError as error:
            # It expires by itself, and an earlier error is the one to raise.
            logger.info("The exporter's lock is held for %.0f s more: %s", _LOCK_S, error)


def _write(directory: Path, tenant: str, entries: list[Any]) -> None:
    """Append entries to the files of their hours; on return they are on disk."""
    lines: dict[str, list[bytes]] = {}
    for entry, pairs in entries:
        fields = dict(zip(pairs[::2], pairs[1::2], strict=True))
        place = entry.decode()
        try:
            record = _decoder.decode(fields.get(b"r", b""))
        except (msgspec.DecodeError, UnicodeDecodeError):
            logger.error("Entry %s of tenant %r cannot be read and is left out.", place, tenant)
            continue
        line = _encoder.encode(msgspec.structs.replace(record, entry=place))
        lines.setdefault(_file_of(record), []).append(line + b"\n")
    for name, parts in lines.items():
        _append(directory, directory / name, b"".join(parts))


def _file_of(record: UsageRecord) -> str:
    return time.strftime("%Y/%m/%d/%H.jsonl", time.gmtime(record.started_s))


def _append(directory: Path, path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o640)
    try:
        size = os.fstat(file).st_size
        if size and os.pread(file, 1, size - 1) != b"\n":
            data = b"\n" + data  # terminates a line that a crash has torn; readers skip it
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(file, rest) :]
        os.fsync(file)
    finally:
        os.close(file)
    if not size:
        for folder in (path.parent, *path.parent.parents):
            _sync_folder(folder)
            if folder == directory:
                return


def _sync_folder(folder: Path) -> None:
    """Sync a folder's names to disk: a synced file that no folder names is lost."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_export(
    directory: Path, *, since_s: float = 0.0, until_s: float | None = None
) -> Iterator[UsageRecord]:
    """Yield each exported request once, hour by hour.

    Memory is bounded by one hour's request ids, or a part of them if there are many.

    Args:
        directory: where `UsageExporter` writes.
        since_s: only requests that began at this Unix time or later.
        until_s: Unix seconds, exclusive; None means no end.
    """
    for path in sorted(directory.glob(_FILES)):
        hour_s = _hour_of(path)
        if hour_s + 3600 <= since_s or (until_s is not None and hour_s >= until_s):
            continue
        for record in _read_file(path):
            if began_in(record, since_s, until_s):
                yield record


def _hour_of(path: Path) -> int:
    digits = [*path.parts[-4:-1], path.stem]
    return calendar.timegm(time.strptime("/".join(digits), "%Y/%m/%d/%H"))


def _read_file(path: Path) -> Iterator[UsageRecord]:
    with path.open("rb") as file:
        passes = 1 + os.fstat(file.fileno()).st_size // _PASS_BYTES
        for number in range(passes):
            last: dict[str, tuple[tuple[int, int], int]] = {}
            file.seek(0)
            at = torn = 0
            for line in file:
                try:
                    record = _decoder.decode(line)
                    place = _place(record.entry)
                except (msgspec.DecodeError, UnicodeDecodeError, ValueError):
                    torn += line != b"\n"
                else:
                    if hash(record.request_id) % passes == number:
                        known = last.get(record.request_id)
                        if known is None or place >= known[0]:
                            last[record.request_id] = (place, at)
                at += len(line)
            if torn and not number:
                logger.warning("%s: %d line(s) cannot be read and are left out.", path, torn)
            for _, start in last.values():
                file.seek(start)
                yield decode_record(file.readline())


def _place(entry: str) -> tuple[int, int]:
    ms, _, number = entry.partition("-")
    return int(ms), int(number)

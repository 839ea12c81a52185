"""Keys, tenants and the usage ledger as JSON lines, to be written back to an empty Redis.

The first line says under which pepper keys are hashed, the last one how many lines precede it. No
line holds a key: a hash is useless without the pepper, which is not in a backup.
"""

import hmac
import json
from collections.abc import AsyncGenerator, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import msgspec
from redis.asyncio import Redis

from tera.config.limits import TenantLimits
from tera.errors import ConfigError
from tera.tenancy.key_store import KeyStore
from tera.tenancy.keys import KEYS, REVOKED, TENANTS, ApiKey, decode_keys, require_tenant
from tera.tenancy.redis import reaching
from tera.tenancy.tenants import TenantStore
from tera.tenancy.usage import (
    PAGE_ENTRIES,
    STORE,
    UsageRecord,
    encode_record,
    stream_of,
    tenants_with_records,
    walk,
)

FORMAT: Final = 1
_WHAT: Final = "What is to be backed up"


class _Begin(msgspec.Struct, frozen=True, tag_field="kind", tag="backup"):
    format: int
    pepper: str


class _Key(msgspec.Struct, frozen=True, tag_field="kind", tag="key"):
    record: dict[str, Any]


class _Revoked(msgspec.Struct, frozen=True, tag_field="kind", tag="revoked"):
    key_id: str
    at_s: float


class _Tenant(msgspec.Struct, frozen=True, tag_field="kind", tag="tenant"):
    name: str
    limits: dict[str, Any]


class _Usage(msgspec.Struct, frozen=True, tag_field="kind", tag="usage"):
    record: UsageRecord


class _End(msgspec.Struct, frozen=True, tag_field="kind", tag="end"):
    lines: int


_Line = _Begin | _Key | _Revoked | _Tenant | _Usage | _End
_decoder: Final = msgspec.json.Decoder(_Line)


@dataclass(slots=True)
class Restored:
    """How much was written back; what existed already is not counted."""

    keys: int = 0
    tenants: int = 0
    usage_records: int = 0


async def backup(redis: Redis, pepper: str) -> AsyncGenerator[bytes]:
    """Yield the lines of a backup, each with its newline.

    Changes that are made meanwhile may or may not be in it. Unreadable records are in the log and
    not in the backup.

    Raises:
        InternalError: Redis cannot be reached.
    """
    count = 0
    async for line in _lines(redis, pepper):
        yield msgspec.json.encode(line) + b"\n"
        count += 1
    yield msgspec.json.encode(_End(count)) + b"\n"


async def _lines(redis: Redis, pepper: str) -> AsyncGenerator[_Line]:
    yield _Begin(FORMAT, _proof(pepper))
    async with reaching(_WHAT):
        revoked: Any = await redis.hgetall(REVOKED)
        keys: Any = await redis.hgetall(KEYS)
        tenants: Any = await redis.hgetall(TENANTS)
    for key_id, at_s in revoked.items():
        yield _Revoked(key_id.decode(), float(at_s))
    for key in decode_keys(keys):
        yield _Key(json.loads(keys[key.key_id.encode()]))
    for name, limits in tenants.items():
        yield _Tenant(name.decode(), json.loads(limits))
    async with reaching(STORE):
        names = sorted({name async for name in tenants_with_records(redis)})
    for name in names:
        async for record in _records(redis, name):
            yield _Usage(record)


async def _records(redis: Redis, tenant: str) -> AsyncGenerator[UsageRecord]:
    """Yield all entries of a tenant's stream, oldest first; the last one of a request is right."""

    async def read(after: bytes) -> Any:
        return await redis.xrange(stream_of(tenant), min=after, count=PAGE_ENTRIES)

    async for record in walk(tenant, read, b"-"):
        yield record


def check(lines: Iterable[bytes], pepper: str) -> None:
    """Read a backup to its end, so that nothing is written of one that is damaged.

    Raises:
        ConfigError: it is not a whole backup, or one of another pepper.
    """
    end: _Line | None = None
    number = 0
    for number, line in _parsed(lines):
        if isinstance(end, _End):
            raise ConfigError(f"line {number}: nothing may follow the last line of a backup")
        if (number == 1) is not isinstance(line, _Begin):
            raise ConfigError(f"line {number}: a backup begins with its first line, and only there")
        if isinstance(line, _Begin):
            _check_beginning(line, pepper)
        elif isinstance(line, _End) and line.lines != number - 1:
            raise ConfigError(f"line {number}: {line.lines} lines should precede this one")
        _content(number, line)
        end = line
    if not isinstance(end, _End):
        raise ConfigError(f"the backup ends after line {number}, before its last line")


async def restore(redis: Redis, store: KeyStore, lines: Iterable[bytes]) -> Restored:
    """Write a checked backup back; return how much was missing.

    What exists already stays as it is: a key or tenant is not changed, a key that was revoked here
    stays revoked, and a request that has a record in the ledger gets no other.

    Raises:
        InternalError: Redis cannot be reached; what has been written stays, and restoring again
            goes on.
    """
    restored = Restored()
    known: dict[str, set[str]] = {}
    tenants = TenantStore(redis)
    for number, line in _parsed(lines):
        content = _content(number, line)
        if isinstance(line, _Revoked):
            await store.restore_revoked(line.key_id, line.at_s)
        elif isinstance(content, ApiKey):
            restored.keys += await store.restore(content)
        elif isinstance(line, _Tenant) and isinstance(content, TenantLimits):
            restored.tenants += await tenants.restore(line.name, content)
        elif isinstance(content, UsageRecord):
            tenant = content.tenant
            if tenant not in known:
                known[tenant] = {each.request_id async for each in _records(redis, tenant)}
            if content.request_id not in known[tenant]:
                entry: Any = {"id": content.request_id, "r": encode_record(content)}
                async with reaching(STORE):
                    await redis.xadd(stream_of(tenant), entry)
                restored.usage_records += 1
    return restored


def _parsed(lines: Iterable[bytes]) -> Iterator[tuple[int, _Line]]:
    for number, line in enumerate(lines, 1):
        try:
            yield number, _decoder.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"line {number}: is not one of a backup") from error


def _content(number: int, line: _Line) -> ApiKey | TenantLimits | UsageRecord | None:
    """Return what a line holds.

    Raises:
        ConfigError: it is not what it should be.
    """
    try:
        if isinstance(line, _Key):
            key_id = str(line.record.get("key_id"))
            keys = decode_keys({key_id.encode(): msgspec.json.encode(line.record)})
            if not keys:
                raise ConfigError("the key's record cannot be read")
            return keys[0]
        if isinstance(line, _Tenant):
            require_tenant(line.name)
            return TenantLimits.parse(line.limits)
        if isinstance(line, _Usage):
            require_tenant(line.record.tenant)
            return line.record
    except ConfigError as error:
        raise ConfigError(f"line {number}: {error.message}") from error
    return None


def _check_beginning(line: _Begin, pepper: str) -> None:
    if line.format != FORMAT:
        raise ConfigError(f"the backup has format {line.format}; this Tera reads {FORMAT}")
    if not hmac.compare_digest(line.pepper, _proof(pepper)):
        raise ConfigError(
            "the backup was made under another pepper, so none of its keys would be valid here; "
            "set TERA_KEY_PEPPER, or key-pepper of the keys' Secret, to the pepper of that platform"
        )


def _proof(pepper: str) -> str:
    """Return what tells one pepper from another, and tells nothing else of it."""
    return hmac.digest(pepper.encode(), b"tera backup", "sha256").hex()

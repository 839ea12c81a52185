"""Creates, lists, rotates and revokes API keys in Redis; `keys.py` describes the layout."""

import logging
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Final

from redis.asyncio import Redis

from tera.config.keys_file import KeyEntry
from tera.config.limits import Limits
from tera.errors import ConfigError, TeraError
from tera.tenancy.keys import (
    CHANGED,
    FILES,
    KEYS,
    LAST_USED,
    REVOKED,
    VERSION,
    ApiKey,
    NewKey,
    decode_keys,
    encode_key,
    generate_key,
    hash_key,
    hint_of,
    id_of,
    is_well_formed,
    require_pepper,
    require_tenant,
    with_last_used,
)
from tera.tenancy.redis import reaching

logger = logging.getLogger(__name__)

GRACE_S: Final = 24 * 3600.0
"""How long a rotated key keeps working by default."""

_KEY_ID = re.compile(r"key_[0-9a-f]{24}")
_KEY_HASH = re.compile(r"[0-9a-f]{64}")
_STORE: Final = "The API keys' store"

# A full Redis refuses a script only what would be its first write, unless that write frees memory.
# So these all begin with one that does, or that finds nothing: a tenant that has filled Redis keeps
# no key from being made, changed or revoked, which takes a few hundred bytes.

# ARGV[3]: the former record as it was read, or '' for none, so that a change made meanwhile by
# others is never undone.
_PUT_SCRIPT: Final = """
if redis.call('HEXISTS', KEYS[3], ARGV[1]) == 1 then return 'revoked' end
if (redis.call('HGET', KEYS[1], ARGV[1]) or '') ~= ARGV[3] then return 'changed' end
redis.call('HDEL', KEYS[1], ARGV[1])
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
redis.call('PUBLISH', ARGV[4], redis.call('INCR', KEYS[2]) .. ' key:' .. ARGV[1])
return 'done'
"""

_REVOKE_SCRIPT: Final = """
if redis.call('HDEL', KEYS[1], ARGV[1]) == 0 then return 0 end
redis.call('HDEL', KEYS[3], ARGV[1])
redis.call('HSET', KEYS[4], ARGV[1], ARGV[2])
redis.call('PUBLISH', ARGV[3], redis.call('INCR', KEYS[2]) .. ' key:' .. ARGV[1])
return 1
"""

# ARGV: old id, its record as it was read, its new record or '' to revoke it, new id, its record,
# seconds, channel.
_ROTATE_SCRIPT: Final = """
if redis.call('HGET', KEYS[1], ARGV[1]) ~= ARGV[2] then return 0 end
redis.call('HDEL', KEYS[1], ARGV[1])
if ARGV[3] ~= '' then
  redis.call('HSET', KEYS[1], ARGV[1], ARGV[3])
else
  redis.call('HDEL', KEYS[3], ARGV[1])
  redis.call('HSET', KEYS[4], ARGV[1], ARGV[6])
end
redis.call('HSET', KEYS[1], ARGV[4], ARGV[5])
redis.call('PUBLISH', ARGV[7],
  redis.call('INCR', KEYS[2]) .. ' key:' .. ARGV[1] .. ' key:' .. ARGV[4])
return 1
"""


_NOTE_SCRIPT: Final = """
redis.call('SREM', KEYS[1], ARGV[1])
return redis.call('SADD', KEYS[1], ARGV[1])
"""


class KeyNotFoundError(TeraError):
    """There is no key with this id: it never existed, or it has been revoked."""

    status = 404
    type = "invalid_request_error"
    code = "key_not_found"


class KeyRevokedError(TeraError):
    """The key to import was revoked and stays revoked."""

    status = 404
    type = "invalid_request_error"
    code = "key_revoked"


@dataclass(frozen=True, slots=True)
class Rotation:
    """A key that replaces another."""

    new: NewKey
    old_key_id: str
    old_expires_s: float
    """Unix seconds at which the old key expires or expired."""


class KeyStore:
    """Creates, lists, rotates and revokes keys.

    Every method raises InternalError when Redis cannot be reached.
    """

    def __init__(self, redis: Redis, pepper: str, clock: Callable[[], float]) -> None:
        """The caller closes `redis`; `clock` gives Unix seconds."""
        require_pepper(pepper)
        self._redis = redis
        self._pepper = pepper
        self._clock = clock

    async def create(
        self,
        tenant: str,
        *,
        models: Iterable[str] | None = None,
        limits: Limits | None = None,
        expires_in_s: float | None = None,
    ) -> NewKey:
        """Create a key for `tenant`; gateway replicas accept it within a second.

        Raises:
            ConfigError: the tenant's name, the models or the lifetime are invalid.
        """
        key = generate_key()
        record = self.record_of(
            tenant, key=key, models=models, limits=limits, expires_s=self._end(expires_in_s)
        )
        return NewKey(key, await self.import_record(record))

    def record_of(
        self,
        tenant: str,
        *,
        key: str | None = None,
        key_hash: str | None = None,
        models: Iterable[str] | None = None,
        limits: Limits | None = None,
        expires_s: float | None = None,
    ) -> ApiKey:
        """Return the record of an externally managed key, for `import_record`.

        Args:
            tenant: the tenant the key belongs to.
            key: the key itself; either this or `key_hash`.
            key_hash: its `hash_key` under this platform's pepper.
            models: the model ids that the key may use; None allows all.
            limits: of this key, in addition to its tenant's.
            expires_s: Unix seconds; None means never.

        Raises:
            ConfigError: there is not exactly one well-formed key or hash, or a setting is invalid.
        """
        require_tenant(tenant)
        if (key is None) == (key_hash is None):
            raise ConfigError("Import a key either by itself or by its hash, not both.")
        hint = ""
        if key is not None:
            if not is_well_formed(key):
                raise ConfigError(
                    "The key to import is not a Tera key, or it has a typo: its checksum is wrong."
                )
            key_hash, hint = hash_key(key, self._pepper), hint_of(key)
        if key_hash is None or not _KEY_HASH.fullmatch(key_hash):
            raise ConfigError("A key's hash must be 64 hexadecimal digits in lower case.")
        return ApiKey(
            key_id=id_of(key_hash),
            tenant=tenant,
            key_hash=key_hash,
            hint=hint,
            models=_model_ids(models),
            created_s=self._clock(),
            expires_s=expires_s,
            limits=_limits(limits),
        )

    async def import_record(self, imported: ApiKey) -> ApiKey:
        """Make sure that an externally managed key exists with these settings; return its record.

        Importing it again changes only the settings that differ, if any. A key that was rotated
        here keeps its expiry, and one that was revoked here stays revoked: the keys file is read
        again and again, and knows of neither.

        Raises:
            KeyRevokedError: it was revoked.
        """
        while True:
            stored, known = await self._find(imported.key_id)
            wanted = imported if known is None else _merged(imported, known)
            if known == wanted or await self._put(wanted, stored):
                return wanted

    async def restore(self, record: ApiKey) -> bool:
        """Write a key's record of a backup as it is; return whether the key was missing.

        One that was revoked here stays revoked.
        """
        try:
            return await self._put(record, b"")
        except KeyRevokedError:
            return False

    async def restore_revoked(self, key_id: str, at_s: float) -> None:
        """Note that a key was revoked, from a backup, so that no import makes it valid again."""
        async with reaching(_STORE):
            if not await self._redis.hexists(KEYS, key_id):
                await self._redis.hsetnx(REVOKED, key_id, repr(at_s))

    async def has_file(self, digest: str) -> bool:
        """Return whether Redis remembers importing a keys file with this digest."""
        async with reaching(_STORE):
            return bool(await self._redis.sismember(FILES, digest))

    async def note_file(self, digest: str) -> None:
        """Remember that a keys file with this digest was imported."""
        async with reaching(_STORE):
            await self._redis.eval(_NOTE_SCRIPT, 1, FILES, digest)

    async def list(self) -> list[ApiKey]:
        """Return all keys that are not revoked, including expired ones, oldest first."""
        # No MULTI, here and below: a full Redis refuses every command in one.
        async with reaching(_STORE), self._redis.pipeline(transaction=False) as pipeline:
            pipeline.hgetall(KEYS)
            pipeline.hgetall(LAST_USED)
            stored, last_used = await pipeline.execute()
        return sorted(
            (
                with_last_used(record, last_used.get(record.key_id.encode()))
                for record in decode_keys(stored)
            ),
            key=lambda record: (record.created_s, record.key_id),
        )

    async def get(self, key_id: str) -> ApiKey:
        """Return one key.

        Raises:
            KeyNotFoundError: there is none with this id.
        """
        _, known = await self._find(key_id)
        if known is None:
            raise _not_found(key_id)
        return known

    async def revoke(self, key_id: str) -> None:
        """Revoke a key for good: gateway replicas refuse it within seconds.

        Raises:
            KeyNotFoundError: there is none with this id.
        """
        keys = (KEYS, VERSION, LAST_USED, REVOKED)
        async with reaching(_STORE):
            revoked = await self._redis.eval(
                _REVOKE_SCRIPT, 4, *keys, key_id, repr(self._clock()), CHANGED
            )
        if not revoked:
            raise _not_found(key_id)

    async def rotate(
        self, key_id: str, *, grace_s: float = GRACE_S, expires_in_s: float | None = None
    ) -> Rotation:
        """Create a key with the same tenant, models and limits, and let the old one expire.

        Both changes are atomic. The new key expires when the old one would have, unless a lifetime
        is given.

        Args:
            key_id: the old key.
            grace_s: how long the old key keeps working; 0 revokes it.
            expires_in_s: the new key's lifetime.

        Raises:
            KeyNotFoundError: there is no key with this id.
            ConfigError: the old key was already rotated or has expired, or a duration is invalid.
        """
        if not 0 <= grace_s < math.inf:
            raise ConfigError("The old key must expire after 0 or more seconds.")
        while True:
            stored, old = await self._find(key_id)
            if old is None:
                raise _not_found(key_id)
            now_s = self._clock()
            new = self._successor(old, now_s, expires_in_s)
            ends_s = now_s + grace_s
            if old.expires_s is not None:
                ends_s = min(ends_s, old.expires_s)
            ended = replace(old, expires_s=ends_s, replaced_by=new.record.key_id)
            if await self._replace(old, stored, ended if grace_s else None, new.record):
                return Rotation(new, key_id, ends_s)

    def _successor(self, old: ApiKey, now_s: float, expires_in_s: float | None) -> NewKey:
        if old.replaced_by is not None:
            raise ConfigError(
                f"{old.key_id} has already been rotated: {old.replaced_by} replaced it."
            )
        expires_s = self._end(expires_in_s) or old.expires_s
        if expires_s is not None and expires_s <= now_s:
            raise ConfigError(f"{old.key_id} has expired; give the new key a lifetime.")
        key = generate_key()
        key_hash = hash_key(key, self._pepper)
        record = replace(
            old,
            key_id=id_of(key_hash),
            key_hash=key_hash,
            hint=hint_of(key),
            created_s=now_s,
            expires_s=expires_s,
            last_used_s=None,
        )
        return NewKey(key, record)

    def _end(self, expires_in_s: float | None) -> float | None:
        if expires_in_s is None:
            return None
        if not 0 < expires_in_s < math.inf:
            raise ConfigError("A key must expire after a positive number of seconds, or never.")
        return self._clock() + expires_in_s

    async def _find(self, key_id: str) -> tuple[bytes, ApiKey | None]:
        """Return the stored bytes, empty if there are none, and the record if it can be read."""
        async with reaching(_STORE), self._redis.pipeline(transaction=False) as pipeline:
            pipeline.hget(KEYS, key_id)
            pipeline.hget(LAST_USED, key_id)
            stored, last_used = await pipeline.execute()
        if stored is None:
            return b"", None
        records = decode_keys({key_id.encode(): stored})
        return stored, with_last_used(records[0], last_used) if records else None

    async def _put(self, record: ApiKey, stored: bytes) -> bool:
        """Replace the record `stored`; return whether it was still there."""
        async with reaching(_STORE):
            outcome = await self._redis.eval(
                _PUT_SCRIPT,
                3,
                *(KEYS, VERSION, REVOKED),
                *(record.key_id, encode_key(record), stored, CHANGED),
            )
        if outcome == b"revoked":
            raise KeyRevokedError(f"{record.key_id} was revoked; make a new key.")
        return bool(outcome == b"done")

    async def _replace(self, old: ApiKey, stored: bytes, ended: ApiKey | None, new: ApiKey) -> bool:
        async with reaching(_STORE):
            done = await self._redis.eval(
                _ROTATE_SCRIPT,
                4,
                *(KEYS, VERSION, LAST_USED, REVOKED),
                *(old.key_id, stored, b"" if ended is None else encode_key(ended)),
                *(new.key_id, encode_key(new), repr(new.created_s), CHANGED),
            )
        return bool(done)


def records_of(store: KeyStore, entries: Iterable[KeyEntry]) -> list[ApiKey]:
    """Return the records of a keys file's entries.

    Raises:
        ConfigError: an entry is invalid; the message begins with its path.
    """
    records = []
    for position, entry in enumerate(entries):
        try:
            record = store.record_of(
                entry.tenant,
                key=entry.key,
                key_hash=entry.key_hash,
                models=entry.models,
                limits=entry.limits,
                expires_s=None if entry.expires is None else entry.expires.timestamp(),
            )
        except ConfigError as error:
            raise ConfigError(f"{position}: {error.message}") from error
        records.append(record)
    return records


async def import_records(store: KeyStore, records: Iterable[ApiKey]) -> list[ApiKey]:
    """Import several keys with `KeyStore.import_record`; return their records.

    A revoked key is skipped, with a warning in the log.

    Raises:
        InternalError: Redis cannot be reached.
    """
    imported = []
    for record in records:
        try:
            imported.append(await store.import_record(record))
        except KeyRevokedError as error:
            logger.warning("The keys file has a key that is not imported: %s", error.message)
    return imported


def _merged(imported: ApiKey, known: ApiKey) -> ApiKey:
    ends = [imported.expires_s]
    if known.replaced_by is not None:
        ends.append(known.expires_s)
    return replace(
        imported,
        hint=imported.hint or known.hint,
        created_s=known.created_s,
        expires_s=min((end_s for end_s in ends if end_s is not None), default=None),
        last_used_s=known.last_used_s,
        replaced_by=known.replaced_by,
    )


def _limits(limits: Limits | None) -> Limits | None:
    return None if limits == Limits() else limits


def _model_ids(models: Iterable[str] | None) -> tuple[str, ...] | None:
    if models is None:
        return None
    names = (models,) if isinstance(models, str) else tuple(dict.fromkeys(models))
    if not names or not all(names):
        raise ConfigError("Name at least one model id, none of them empty, or allow all models.")
    return names


def _not_found(key_id: str) -> KeyNotFoundError:
    # Only ids are repeated: someone may have pasted the key itself.
    named = key_id if _KEY_ID.fullmatch(key_id) else "with this id; ids look like key_0123…"
    return KeyNotFoundError(f"There is no API key {named}.")

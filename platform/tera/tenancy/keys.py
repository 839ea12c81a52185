"""API keys: made and revoked in Redis, checked in each gateway replica's memory.

`KeyStore` writes, `KeySnapshot` follows. In Redis:

    tera:keys            hash     key id → JSON record, without the key itself
    tera:keys:version    counter  raised by every change
    tera:keys:changed    channel  told of every change
    tera:keys:last_used  hash     key id → seconds; apart, so that use never rewrites a record

A change is one script: record, version and message happen together or not at all.
"""

import asyncio
import hmac
import logging
import math
import re
import secrets
import string
import zlib
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from types import TracebackType
from typing import Final, Self

import msgspec
from redis.asyncio import Redis
from redis.asyncio.client import PubSub
from redis.exceptions import RedisError

from tera.errors import (
    ConfigError,
    InternalError,
    InvalidApiKeyError,
    MissingApiKeyError,
    TeraError,
)

logger = logging.getLogger(__name__)

KEYS: Final = "tera:keys"
VERSION: Final = "tera:keys:version"
CHANGED: Final = "tera:keys:changed"
LAST_USED: Final = "tera:keys:last_used"

PREFIX: Final = "sk-tera-"
KEY_PATTERN: Final = r"sk-tera-[0-9A-Za-z]{42}"
"""What a secret scanner looks for; the last 6 characters are a checksum of all before them."""

_ALPHABET: Final = string.digits + string.ascii_uppercase + string.ascii_lowercase
_RANDOM_CHARS: Final = 36
"""214 bits; the 4 random characters and the checksum part that the hint shows leave 166."""
_CHECKSUM_CHARS: Final = 6
"""62**6 is over 2**32: every CRC-32 fits."""

_WELL_FORMED = re.compile(KEY_PATTERN)
_BEARER = re.compile(rf"[ \t]*(?i:bearer)[ \t]+({KEY_PATTERN})[ \t]*")
_KEY_ID = re.compile(r"key_[0-9a-f]{24}")
_KEY_HASH = re.compile(r"[0-9a-f]{64}")
_TENANT = re.compile(r"[a-z0-9]([a-z0-9._-]{0,62}[a-z0-9])?")

_RETRY_INTERVAL_S: Final = 1.0
"""While Redis is away it is tried this often, however many requests come (contract L-8)."""
_LAST_USED_INTERVAL_S: Final = 60.0
_CANCEL_AGAIN_S: Final = 0.01

_MISSING_TEXT: Final = (
    "You did not provide an API key. Send it in the header `Authorization: Bearer sk-tera-...`."
)
_INVALID_TEXT: Final = (
    "The API key is not valid. Check the header `Authorization: Bearer sk-tera-...`, "
    "or ask your administrator for a new key."
)

_PUT_SCRIPT: Final = """
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
redis.call('PUBLISH', ARGV[3], redis.call('INCR', KEYS[2]))
"""

_REVOKE_SCRIPT: Final = """
if redis.call('HDEL', KEYS[1], ARGV[1]) == 0 then return 0 end
redis.call('HDEL', KEYS[3], ARGV[1])
redis.call('PUBLISH', ARGV[2], redis.call('INCR', KEYS[2]))
return 1
"""

# Gateway replicas write in any order, so the later use wins; a key that was revoked meanwhile
# leaves nothing behind.
_TOUCH_SCRIPT: Final = """
for i = 1, #ARGV, 2 do
  local known = tonumber(redis.call('HGET', KEYS[2], ARGV[i]) or '-inf')
  if redis.call('HEXISTS', KEYS[1], ARGV[i]) == 1 and tonumber(ARGV[i + 1]) > known then
    redis.call('HSET', KEYS[2], ARGV[i], ARGV[i + 1])
  end
end
"""


class KeyNotFoundError(TeraError):
    """There is no key with this id: it never was, or it has been revoked."""

    status = 404
    type = "invalid_request_error"
    code = "key_not_found"


@dataclass(frozen=True, slots=True)
class ApiKey:
    """What is known of one key; the key itself is not. Times are Unix seconds."""

    key_id: str
    tenant: str
    key_hash: str = field(repr=False)
    hint: str
    """The first 12 and last 4 characters; empty for a key that came as a hash."""
    models: tuple[str, ...] | None
    """The ids that clients may send as `model`; None allows all."""
    created_s: float
    expires_s: float | None = None
    last_used_s: float | None = None
    """Within about a minute; filled by `KeyStore` only."""


@dataclass(frozen=True, slots=True)
class NewKey:
    """A key that was just made: the only time that it can be shown."""

    key: str = field(repr=False)
    record: ApiKey


def generate_key() -> str:
    """Return a new random key in the form of `KEY_PATTERN`, with its checksum."""
    body = PREFIX + "".join(secrets.choice(_ALPHABET) for _ in range(_RANDOM_CHARS))
    return body + _checksum(body)


def is_well_formed(key: str) -> bool:
    """Tell whether `key` could be a key; with a mistyped or two swapped characters it could not.

    CRC-32 finds every error burst of up to 32 bits (Koopman, DSN 2002), four characters.
    """
    return (
        _WELL_FORMED.fullmatch(key) is not None
        and _checksum(key[:-_CHECKSUM_CHARS]) == key[-_CHECKSUM_CHARS:]
    )


def hash_key(key: str, pepper: str) -> str:
    """Return the HMAC-SHA-256 of `key` under `pepper`, in hex: the form that Redis holds.

    A slow password hash would add nothing: the key has more random bits than can be tried.
    """
    return hmac.digest(pepper.encode(), key.encode(), "sha256").hex()


def _checksum(body: str) -> str:
    rest = zlib.crc32(body.encode())
    digits = []
    for _ in range(_CHECKSUM_CHARS):
        rest, digit = divmod(rest, len(_ALPHABET))
        digits.append(_ALPHABET[digit])
    return "".join(reversed(digits))


def _key_id(key_hash: str) -> str:
    """Return the id that belongs to a hash: importing a key twice finds the first."""
    return "key_" + sha256(b"tera key id:" + key_hash.encode()).hexdigest()[:24]


class KeyStore:
    """Makes, lists and revokes keys.

    Every method raises InternalError when Redis cannot be reached.
    """

    def __init__(self, redis: Redis, pepper: str, clock: Callable[[], float]) -> None:
        """`redis` stays the caller's to close; `clock` gives Unix seconds."""
        _require_pepper(pepper)
        self._redis = redis
        self._pepper = pepper
        self._clock = clock

    async def create(
        self,
        tenant: str,
        *,
        models: Iterable[str] | None = None,
        expires_in_s: float | None = None,
    ) -> NewKey:
        """Make a key for `tenant`; gateway replicas accept it within a second.

        Raises:
            ConfigError: the tenant's name, the models or the lifetime are not possible.
        """
        if expires_in_s is not None and not (0 < expires_in_s < math.inf):
            raise ConfigError("A key must expire after a positive number of seconds, or never.")
        key = generate_key()
        expires_s = None if expires_in_s is None else self._clock() + expires_in_s
        record = await self.import_key(tenant, key=key, models=models, expires_s=expires_s)
        return NewKey(key, record)

    async def import_key(
        self,
        tenant: str,
        *,
        key: str | None = None,
        key_hash: str | None = None,
        models: Iterable[str] | None = None,
        expires_s: float | None = None,
    ) -> ApiKey:
        """Make sure that a key from elsewhere exists with these settings; return its record.

        Importing it again changes nothing, or only the settings that differ. A key that was
        revoked is valid again when it is imported again, so remove it at its origin as well.

        Args:
            tenant: whom the key belongs to.
            key: the key itself; either this or `key_hash`.
            key_hash: its `hash_key` under this platform's pepper.
            models: the ids that clients may send; None allows all.
            expires_s: Unix seconds; None never expires.

        Raises:
            ConfigError: not one well-formed key or hash, or a setting is not possible.
        """
        _require_tenant(tenant)
        if (key is None) == (key_hash is None):
            raise ConfigError("Import a key by itself or by its hash: give one of both.")
        hint = ""
        if key is not None:
            if not is_well_formed(key):
                raise ConfigError("The key to import is no Tera key; its checksum may be mistyped.")
            key_hash, hint = hash_key(key, self._pepper), f"{key[:12]}…{key[-4:]}"
        if key_hash is None or not _KEY_HASH.fullmatch(key_hash):
            raise ConfigError("A key's hash must be 64 hexadecimal digits in lower case.")
        wanted = ApiKey(
            key_id=_key_id(key_hash),
            tenant=tenant,
            key_hash=key_hash,
            hint=hint,
            models=_model_ids(models),
            created_s=self._clock(),
            expires_s=expires_s,
        )
        try:
            known = await self.get(wanted.key_id)
        except KeyNotFoundError:
            return await self._put(wanted)
        wanted = replace(
            wanted,
            hint=hint or known.hint,
            created_s=known.created_s,
            last_used_s=known.last_used_s,
        )
        return known if known == wanted else await self._put(wanted)

    async def list(self) -> list[ApiKey]:
        """Return all keys that are not revoked, expired ones too, the oldest first."""
        async with _reaching_redis(), self._redis.pipeline(transaction=True) as pipeline:
            pipeline.hgetall(KEYS)
            pipeline.hgetall(LAST_USED)
            stored, last_used = await pipeline.execute()
        return sorted(
            (
                _with_last_used(record, last_used.get(record.key_id.encode()))
                for record in _decode(stored)
            ),
            key=lambda record: (record.created_s, record.key_id),
        )

    async def get(self, key_id: str) -> ApiKey:
        """Return one key.

        Raises:
            KeyNotFoundError: there is none with this id.
        """
        async with _reaching_redis(), self._redis.pipeline(transaction=True) as pipeline:
            pipeline.hget(KEYS, key_id)
            pipeline.hget(LAST_USED, key_id)
            stored, last_used = await pipeline.execute()
        records = [] if stored is None else _decode({key_id.encode(): stored})
        if not records:
            raise _not_found(key_id)
        return _with_last_used(records[0], last_used)

    async def revoke(self, key_id: str) -> None:
        """End a key: gateway replicas refuse it within seconds, and it cannot come back.

        Raises:
            KeyNotFoundError: there is none with this id.
        """
        async with _reaching_redis():
            revoked = await self._redis.eval(
                _REVOKE_SCRIPT, 3, KEYS, VERSION, LAST_USED, key_id, CHANGED
            )
        if not revoked:
            raise _not_found(key_id)

    async def _put(self, record: ApiKey) -> ApiKey:
        stored = asdict(record)
        del stored["last_used_s"]
        data = msgspec.json.encode(stored)
        async with _reaching_redis():
            await self._redis.eval(_PUT_SCRIPT, 2, KEYS, VERSION, record.key_id, data, CHANGED)
        return record


class KeySnapshot:
    """All keys in this process's memory, following Redis for as long as the block runs.

    A request costs no I/O. While Redis is away the last snapshot stays in force. When Redis
    comes back with fewer keys or none, they are gone here as well, with an error in the log:
    a lost key can be made again, a revoked one must not live on.

        async with KeySnapshot(redis, pepper, time.time) as snapshot:
            api_key = snapshot.authenticate(header)
    """

    def __init__(
        self,
        redis: Redis,
        pepper: str,
        clock: Callable[[], float],
        reread_interval_s: float = 2.0,
    ) -> None:
        """Take a client from `connect` (it must time out); it stays the caller's to close.

        Args:
            redis: where the keys are.
            pepper: the same as the `KeyStore`'s.
            clock: Unix seconds; decides what has expired.
            reread_interval_s: how long a lost message can hide a change.
        """
        _require_pepper(pepper)
        self._redis = redis
        self._pepper = pepper
        self._clock = clock
        self._reread_interval_s = reread_interval_s
        self._by_hash: dict[str, ApiKey] = {}
        self._decoy = generate_key()
        self._ready = False
        self._version = 0
        self._degraded_since_s: float | None = None
        self._used_s: dict[str, float] = {}
        self._last_used_written_s: dict[str, float] = {}
        self._task: asyncio.Task[None]

    @property
    def ready(self) -> bool:
        """There has been a snapshot; until then every key is refused."""
        return self._ready

    @property
    def degraded(self) -> bool:
        """Redis is away now, and what is known here grows old."""
        return self._degraded_since_s is not None

    @property
    def degraded_since_s(self) -> float | None:
        """Unix seconds at which Redis was found to be away; None when it is not."""
        return self._degraded_since_s

    @property
    def version(self) -> int:
        """The version of the key set that is in force; 0 before any."""
        return self._version

    def authenticate(self, authorization: str | None) -> ApiKey:
        """Return the key that an `Authorization` header shows, without I/O.

        Each refusal costs the same work: one checksum, one HMAC over one length, one look-up. So
        its time does not tell how near a guess was. The look-up itself may compare as it likes:
        nobody without the pepper can steer what is compared.

        Raises:
            MissingApiKeyError: there is no such header.
            InvalidApiKeyError: it does not show a key that is valid now, for whatever reason.
        """
        if authorization is None:
            raise MissingApiKeyError(_MISSING_TEXT)
        shown = _BEARER.fullmatch(authorization)
        candidate = shown[1] if shown else self._decoy
        if not is_well_formed(candidate):
            candidate = self._decoy
        record = self._by_hash.get(hash_key(candidate, self._pepper))
        now_s = self._clock()
        if record is None or (record.expires_s is not None and now_s >= record.expires_s):
            raise InvalidApiKeyError(_INVALID_TEXT)
        self._used_s[record.key_id] = now_s
        return record

    async def __aenter__(self) -> Self:
        """Begin to follow; `ready` tells when the first snapshot is there."""
        self._task = asyncio.create_task(self._follow(), name="tera-key-snapshot")
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # Again until it ends: redis-py sends through `asyncio.wait_for`, which before Python 3.12
        # loses a cancellation that comes just as the send is done (bpo-42130).
        while not self._task.done():
            self._task.cancel()
            await asyncio.wait([self._task], timeout=_CANCEL_AGAIN_S)
        # Best effort: when a key was last used may be off by a minute anyway.
        with suppress(RedisError):
            await self._write_last_used(self._used_s.copy())

    async def _follow(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            next_try_s = loop.time() + _RETRY_INTERVAL_S
            try:
                async with self._redis.pubsub() as pubsub:
                    await self._follow_connection(pubsub)
            except RedisError as error:
                self._mark_away(error)
            except Exception as error:
                # The edge of this task. Were it to end, revocations would never arrive here.
                logger.exception("Following the API keys failed; trying again.")
                self._mark_away(error)
            # A connection that had lasted is replaced at once: a key made now must work soon.
            await asyncio.sleep(max(0.0, next_try_s - loop.time()))

    async def _follow_connection(self, pubsub: PubSub) -> None:
        """Follow until the connection is lost; never returns.

        1. SUBSCRIBE goes out first; Redis may run it after the first read, on another
           connection, and a change between the two would tell nobody.
        2. So its confirmation is not ignored: it comes as a message and causes a second read.
        3. A message, and a new connection, read everything: behind either there may be a
           server that lost its data and has counted up to the same version again.
        """
        await pubsub.subscribe(CHANGED)
        changed = True
        while True:
            if changed or await self._stored_version() != self._version:
                await self._read()
            self._mark_reached()
            await self._write_last_used(self._due_last_used())
            changed = await pubsub.get_message(timeout=self._reread_interval_s) is not None
            while changed and await pubsub.get_message(timeout=0) is not None:
                pass  # One read answers all messages that are here already.

    async def _stored_version(self) -> int:
        return int(await self._redis.get(VERSION) or 0)

    async def _read(self) -> None:
        async with self._redis.pipeline(transaction=True) as pipeline:
            pipeline.get(VERSION)
            pipeline.hgetall(KEYS)
            stored_version, stored = await pipeline.execute()
        version = int(stored_version or 0)
        by_hash = {record.key_hash: record for record in _decode(stored)}
        if version < self._version:
            logger.error(
                "Redis has lost API keys: their version went back from %d to %d, and %d keys "
                "became %d. Keys that are gone are refused from now on; keys that were revoked "
                "lately may be back.",
                self._version,
                version,
                len(self._by_hash),
                len(by_hash),
            )
        self._by_hash, self._version, self._ready = by_hash, version, True
        known = {record.key_id for record in by_hash.values()}
        for times in (self._used_s, self._last_used_written_s):
            for key_id in times.keys() - known:
                del times[key_id]

    def _mark_away(self, error: Exception) -> None:
        if self._degraded_since_s is None:
            self._degraded_since_s = self._clock()
            logger.warning(
                "Redis is away (%s: %s); %d API keys stay in force as of version %d.",
                type(error).__name__,
                error,
                len(self._by_hash),
                self._version,
            )

    def _mark_reached(self) -> None:
        if self._degraded_since_s is not None:
            away_s = self._clock() - self._degraded_since_s
            self._degraded_since_s = None
            logger.info("Redis is back after %.1f s; API keys are up to date.", away_s)

    def _due_last_used(self) -> dict[str, float]:
        now_s = self._clock()
        return {
            key_id: used_s
            for key_id, used_s in self._used_s.items()
            if now_s - self._last_used_written_s.get(key_id, -math.inf) >= _LAST_USED_INTERVAL_S
        }

    async def _write_last_used(self, used_s: Mapping[str, float]) -> None:
        if not used_s:
            return
        pairs = [part for key_id, time_s in used_s.items() for part in (key_id, repr(time_s))]
        await self._redis.eval(_TOUCH_SCRIPT, 2, KEYS, LAST_USED, *pairs)
        now_s = self._clock()
        for key_id, time_s in used_s.items():
            self._last_used_written_s[key_id] = now_s
            # A use while the write was under way stays marked for the next one.
            if self._used_s.get(key_id) == time_s:
                del self._used_s[key_id]


def _decode(stored: Mapping[bytes, bytes]) -> list[ApiKey]:
    """Return what can be read; a damaged record is logged and never takes the others along.

    Fields that a later version added are ignored.
    """
    records = []
    for key_id, data in stored.items():
        try:
            record = msgspec.json.decode(data, type=ApiKey)
            if record.key_id.encode() != key_id:
                raise msgspec.DecodeError("The record names another key.")
        except (msgspec.DecodeError, UnicodeDecodeError):
            logger.error("The record of API key %r cannot be read; the key is refused.", key_id)
        else:
            records.append(record)
    return records


def _with_last_used(record: ApiKey, last_used: bytes | None) -> ApiKey:
    return record if last_used is None else replace(record, last_used_s=float(last_used))


def _model_ids(models: Iterable[str] | None) -> tuple[str, ...] | None:
    if models is None:
        return None
    names = (models,) if isinstance(models, str) else tuple(dict.fromkeys(models))
    if not names or not all(names):
        raise ConfigError("Name at least one model id, none of them empty, or allow all models.")
    return names


def _require_tenant(tenant: str) -> None:
    if not _TENANT.fullmatch(tenant):
        raise ConfigError(
            "A tenant's name must have 1 to 64 of the characters a-z, 0-9, '.', '_' and '-', "
            "and begin and end with a letter or digit."
        )


def _require_pepper(pepper: str) -> None:
    if not pepper:
        raise ConfigError(
            "The key pepper is empty; set TERA_KEY_PEPPER, or whoever copies Redis can try keys."
        )


def _not_found(key_id: str) -> KeyNotFoundError:
    # Only an id is repeated: someone may well paste the key itself here.
    named = key_id if _KEY_ID.fullmatch(key_id) else "with this id; ids look like key_0123…"
    return KeyNotFoundError(f"There is no API key {named}.")


@asynccontextmanager
async def _reaching_redis() -> AsyncGenerator[None]:
    try:
        yield
    except RedisError as error:
        raise InternalError("The API keys' store cannot be reached.") from error

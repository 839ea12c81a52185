"""Keys and tenants' limits in a gateway replica's memory, following Redis."""

import asyncio
import logging
import math
import re
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Final

from redis.asyncio import Redis
from redis.asyncio.client import PubSub
from redis.exceptions import RedisError

from tera.background import Background
from tera.config.limits import TenantLimits
from tera.errors import InvalidApiKeyError, MissingApiKeyError
from tera.tenancy.keys import (
    CHANGED,
    KEY_PATTERN,
    KEYS,
    LAST_USED,
    TENANTS,
    VERSION,
    ApiKey,
    decode_keys,
    generate_key,
    hash_key,
    is_well_formed,
    require_pepper,
)
from tera.tenancy.tenants import BLOCKED, decode_tenant

logger = logging.getLogger(__name__)

_BEARER = re.compile(rf"[ \t]*(?i:bearer)[ \t]+({KEY_PATTERN})[ \t]*")

_RETRY_INTERVAL_S: Final = 1.0
"""How often Redis is tried while it is away, however many requests arrive (contract L-8)."""
_LAST_USED_INTERVAL_S: Final = 60.0

_MISSING_TEXT: Final = (
    "You did not provide an API key. Send it in the header `Authorization: Bearer sk-tera-...`."
)
_INVALID_TEXT: Final = (
    "The API key is not valid. Check the header `Authorization: Bearer sk-tera-...`, "
    "or ask your administrator for a new key."
)

# Gateway replicas write in any order, so the later use wins; nothing is written for a key that was
# revoked meanwhile.
_TOUCH_SCRIPT: Final = """
for i = 1, #ARGV, 2 do
  local known = tonumber(redis.call('HGET', KEYS[2], ARGV[i]) or '-inf')
  if redis.call('HEXISTS', KEYS[1], ARGV[i]) == 1 and tonumber(ARGV[i + 1]) > known then
    redis.call('HSET', KEYS[2], ARGV[i], ARGV[i + 1])
  end
end
"""


class KeySnapshot(Background):
    """All keys and tenants' limits in this process's memory, following Redis while the block runs.

    A request costs no I/O. While Redis is away, the last snapshot stays in force. If Redis comes
    back with fewer keys or none, they are dropped here too, with an error in the log: a lost key
    can be created again, but a revoked one must not live on.

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
        """`redis` is a client from `connect`, since it must time out; the caller closes it.

        Args:
            redis: stores keys and tenants.
            pepper: the same as the `KeyStore`'s.
            clock: Unix seconds; decides what has expired.
            reread_interval_s: the longest time for which a lost message can hide a change.
        """
        require_pepper(pepper)
        self._redis = redis
        self._pepper = pepper
        self._clock = clock
        self._reread_interval_s = reread_interval_s
        self._by_hash: dict[str, ApiKey] = {}
        self._by_id: dict[bytes, ApiKey] = {}
        self._stored_keys: dict[bytes, bytes] = {}
        self._tenants: dict[str, TenantLimits] = {}
        self._stored_tenants: dict[bytes, bytes] = {}
        self._decoy = generate_key()
        self._ready = False
        self._version = 0
        self._degraded_since_s: float | None = None
        self._used_s: dict[str, float] = {}
        self._last_used_written_s: dict[str, float] = {}

    @property
    def ready(self) -> bool:
        """Whether there is a snapshot; until then every key is refused."""
        return self._ready

    @property
    def degraded(self) -> bool:
        """Whether Redis is away, so that the snapshot is getting old."""
        return self._degraded_since_s is not None

    @property
    def degraded_since_s(self) -> float | None:
        """Unix seconds at which Redis was found to be away; None if it is not."""
        return self._degraded_since_s

    @property
    def version(self) -> int:
        """The version of keys and tenants in force; 0 before the first snapshot."""
        return self._version

    def tenant_limits(self, name: str) -> TenantLimits | None:
        """Return a tenant's stored limits; None means that the values decide.

        It is the same object until it changes, so derived data can be cached by identity.
        """
        return self._tenants.get(name)

    def authenticate(self, authorization: str | None) -> ApiKey:
        """Return the key in an `Authorization` header, without I/O.

        Each refusal takes the same work: one checksum, one HMAC over one length, one look-up. So
        its time does not reveal how close a guess was. The look-up itself need not take constant
        time: without the pepper, nobody can control what is compared.

        Raises:
            MissingApiKeyError: there is no such header.
            InvalidApiKeyError: the key is not valid now, for whatever reason.
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

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop following, and store when each key was last used."""
        await super().__aexit__(exc_type, exc, traceback)
        try:
            await self._write_last_used(self._used_s.copy())
        except RedisError as error:
            # Last uses may be off by a minute anyway.
            logger.warning("When keys were last used is not written down: %s", error)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            next_try_s = loop.time() + _RETRY_INTERVAL_S
            try:
                async with self._redis.pubsub() as pubsub:
                    await self._follow_connection(pubsub)
            except RedisError as error:
                self._mark_away(error)
            except Exception as error:
                # The edge of this task: if it ended, revocations would never arrive here.
                logger.exception("Following the API keys failed; trying again.")
                self._mark_away(error)
            # A connection that had lasted is replaced at once: a new key must work soon.
            await asyncio.sleep(max(0.0, next_try_s - loop.time()))

    async def _follow_connection(self, pubsub: PubSub) -> None:
        """Follow until the connection is lost; never returns.

        1. SUBSCRIBE is sent first, but Redis may run it after the first read, which uses another
           connection, and would notify nobody of a change in between.
        2. So the confirmation of SUBSCRIBE counts as a message and causes a second read.
        3. Every message and every new connection reads everything: either may come from a
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
                pass  # One read serves all messages that have already arrived.

    async def _stored_version(self) -> int:
        return int(await self._redis.get(VERSION) or 0)

    async def _read(self) -> None:
        async with self._redis.pipeline(transaction=True) as pipeline:
            pipeline.get(VERSION)
            pipeline.hgetall(KEYS)
            pipeline.hgetall(TENANTS)
            stored_version, stored, stored_tenants = await pipeline.execute()
        version = int(stored_version or 0)
        known_before = len(self._by_hash)
        self._read_keys(stored)
        self._read_tenants(stored_tenants)
        if version < self._version:
            logger.error(
                "Redis has lost API keys: their version went back from %d to %d, and %d keys "
                "became %d. Keys that are gone are refused from now on; keys that were revoked "
                "lately may be back, and tenants may have their former limits.",
                self._version,
                version,
                known_before,
                len(self._by_hash),
            )
        self._version, self._ready = version, True
        known = {record.key_id for record in self._by_hash.values()}
        for times in (self._used_s, self._last_used_written_s):
            for key_id in times.keys() - known:
                del times[key_id]

    def _read_keys(self, stored: dict[bytes, bytes]) -> None:
        """Update only what differs: most changes are of one record among thousands.

        Parsing 10,000 records again would delay every stream of this process for 60 ms.
        """
        changed = {
            key_id: data for key_id, data in stored.items() if self._stored_keys.get(key_id) != data
        }
        for key_id in (self._stored_keys.keys() - stored.keys()) | changed.keys():
            record = self._by_id.pop(key_id, None)
            if record is not None:
                self._by_hash.pop(record.key_hash, None)
        for record in decode_keys(changed):
            self._by_id[record.key_id.encode()] = record
            self._by_hash[record.key_hash] = record
        self._stored_keys = stored

    def _read_tenants(self, stored: dict[bytes, bytes]) -> None:
        for name in self._stored_tenants.keys() - stored.keys():
            self._tenants.pop(name.decode(errors="replace"), None)
        for name, data in stored.items():
            if self._stored_tenants.get(name) != data:
                limits = decode_tenant(name, data)
                # A damaged record must not mean that the tenant is unlimited.
                known_name = name.decode(errors="replace")
                self._tenants[known_name] = BLOCKED if limits is None else limits
        self._stored_tenants = stored

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
            # A use during the write stays marked for the next write.
            if self._used_s.get(key_id) == time_s:
                del self._used_s[key_id]

"""Keys and tenants' limits in a gateway replica's memory, following Redis."""

import asyncio
import logging
import math
import re
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, Final

from redis.asyncio import Redis
from redis.asyncio.client import PubSub
from redis.exceptions import RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError

from tera.background import Background
from tera.config.limits import TenantLimits
from tera.errors import ConfigError, InternalError, InvalidApiKeyError, MissingApiKeyError
from tera.tenancy.key_table import KeyTable, Table, TenantTable
from tera.tenancy.keys import (
    CHANGED,
    KEY_PATTERN,
    KEYS,
    TENANTS,
    VERSION,
    ApiKey,
    generate_key,
    hash_key,
    is_well_formed,
    read_change,
    require_pepper,
)
from tera.tenancy.last_used import LastUsed
from tera.tenancy.redis import refuse_cluster

logger = logging.getLogger(__name__)

_BEARER = re.compile(rf"[ \t]*(?i:bearer)[ \t]+({KEY_PATTERN})[ \t]*")

_RETRY_INTERVAL_S: Final = 1.0
"""How often Redis is tried while it is away, however many requests arrive (contract L-8)."""
_CONFIRM_S: Final = 2.0
PAGE_RECORDS: Final = 500
"""Read and decoded in one turn of the event loop: about four milliseconds, and less of Redis'."""

_MISSING_TEXT: Final = (
    "You did not provide an API key. Send it in the header `Authorization: Bearer sk-tera-...`."
)
_INVALID_TEXT: Final = (
    "The API key is not valid. Check the header `Authorization: Bearer sk-tera-...`, "
    "or ask your administrator for a new key."
)


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
        stale_s: Callable[[], float] = lambda: math.inf,
    ) -> None:
        """`redis` is a client from `connect`, since it must time out; the caller closes it.

        Args:
            redis: stores keys and tenants.
            pepper: the same as the `KeyStore`'s.
            clock: Unix seconds; decides what has expired.
            reread_interval_s: the longest time for which a lost message can hide a change.
            stale_s: for how long keys are accepted while Redis is away; asked at each request.
        """
        require_pepper(pepper)
        self._redis = redis
        self._pepper = pepper
        self._clock = clock
        self._reread_interval_s = reread_interval_s
        self._stale_s = stale_s
        self._keys, self._tenants = KeyTable(), TenantTable()
        self._by_hash = self._keys.by_hash
        self._decoy = generate_key()
        self._ready = False
        self._version = 0
        self._degraded_since_s: float | None = None
        self._last_used = LastUsed(redis, clock)

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
        return self._tenants.limits.get(name)

    def authenticate(self, authorization: str | None) -> ApiKey:
        """Return the key in an `Authorization` header, without I/O.

        Each refusal takes the same work: one checksum, one HMAC over one length, one look-up. So
        its time does not reveal how close a guess was. The look-up itself need not take constant
        time: without the pepper, nobody can control what is compared.

        Raises:
            MissingApiKeyError: there is no such header.
            InvalidApiKeyError: the key is not valid now, for whatever reason.
            InternalError: it was valid, but Redis has been away for so long that it may be revoked.
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
        away_since_s = self._degraded_since_s
        if away_since_s is not None and now_s - away_since_s > self._stale_s():
            raise InternalError("The platform cannot check API keys at the moment.")
        self._last_used.note(record.key_id, now_s)
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
            await self._last_used.write()
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
            except (RedisError, ConfigError) as error:
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
        2. So the read begins once SUBSCRIBE is confirmed.
        3. A message says what changed, and only that is read, if its version is the next one.
           Any other message, and every new connection, may come from a server that lost its data
           and has counted up again, so it reads everything.
        """
        await refuse_cluster(self._redis)
        await pubsub.subscribe(CHANGED)
        if await pubsub.get_message(timeout=_CONFIRM_S) is None:
            raise RedisTimeoutError("SUBSCRIBE is not confirmed.")
        await self._read_all()
        while True:
            self._mark_reached()
            await self._last_used.write_due()
            heard = await self._heard(pubsub)
            if heard:
                await self._take(heard)
            elif await self._stored_version() != self._version:
                await self._read_all()  # a message was lost

    async def _heard(self, pubsub: PubSub) -> list[Any]:
        """Return the messages that are here, after a while none."""
        messages = []
        timeout_s = self._reread_interval_s
        while (message := await pubsub.get_message(timeout=timeout_s)) is not None:
            messages.append(message)
            timeout_s = 0.0
        return messages

    async def _take(self, messages: list[Any]) -> None:
        """Read what messages say has changed; all there is if one was missed or does not say."""
        version = self._version
        key_ids: set[bytes] = set()
        tenants: set[bytes] = set()
        for message in messages:
            change = read_change(message["data"]) if message["type"] == "message" else None
            if change is None or change.version != version + 1:
                await self._read_all()
                return
            version = change.version
            key_ids.update(change.key_ids)
            tenants.update(change.tenants)
        await self._read_some(TENANTS, self._tenants, tenants)
        await self._read_some(KEYS, self._keys, key_ids)
        self._version = version

    async def _stored_version(self) -> int:
        return int(await self._redis.get(VERSION) or 0)

    async def _read_all(self) -> None:
        """Read everything, in turns between which other work goes on, here and in Redis.

        The version is read first, so that a change during the read has a later one. There is no
        MULTI around it, and nothing is written: a full Redis would refuse either.
        """
        version = await self._stored_version()
        known_before = len(self._by_hash)
        # Tenants first: no key is accepted before its tenant's limits are known.
        await self._read_hash(TENANTS, self._tenants)
        await self._read_hash(KEYS, self._keys)
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

    async def _read_hash(self, name: str, table: Table) -> None:
        """Read a hash page by page, and what is in none of them by name, before the last is put.

        HSCAN returns each field that is there from its beginning to its end. But a cursor means
        nothing to a server that was started in between, and no key may be refused for that.
        """
        missing = set(table.names)
        cursor = -1
        while cursor:
            found: Any = await self._redis.hscan(name, max(cursor, 0), count=PAGE_RECORDS)
            cursor, page = found
            missing.difference_update(page)
            if not cursor:
                await self._read_some(name, table, missing)
            table.put(page)

    async def _read_some(self, name: str, table: Table, fields: Iterable[bytes]) -> None:
        rest = list(fields)
        for first in range(0, len(rest), PAGE_RECORDS):
            page = rest[first : first + PAGE_RECORDS]
            values: Any = await self._redis.hmget(name, page)
            found = dict(zip(page, values, strict=True))
            table.put({field: data for field, data in found.items() if data is not None})
            table.remove(field for field, data in found.items() if data is None)

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

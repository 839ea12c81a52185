"""How Tera connects to Redis: bounded waits, no hidden retries, and failover."""

import asyncio
import logging
import re
from collections.abc import AsyncGenerator, Awaitable
from contextlib import asynccontextmanager
from typing import Any, Final, TypeVar

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import (
    AskError,
    ClusterCrossSlotError,
    ClusterDownError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
    TryAgainError,
)

from tera.errors import ConfigError, InternalError

logger = logging.getLogger(__name__)

T = TypeVar("T")

_HEALTH_CHECK_INTERVAL_S = 10
"""A connection that was idle for longer is checked with a PING before it is used."""
_MAX_CONNECTIONS = 32
"""More would be no faster, since Redis runs one command at a time."""
_ATTEMPT_TIMEOUT_S = 2.0
_READ_ONLY: Final = re.compile(r"(?:^|-)READONLY ")
_FULL: Final = re.compile(r"(?:^|-)OOM ")


def connect(url: str, *, timeout_s: float) -> Redis:
    """Return a client that answers or fails within about `timeout_s` per round trip.

    Nothing is sent yet: an unreachable server is noticed at the first command. A command is tried
    once, because a retry would double the wait that `timeout_s` promises, and the first try may
    have taken effect. A connection to a server that has become read-only is not used again:
    after a failover the same address leads to another one. Replies are bytes, so that one
    damaged value cannot make a whole reply unreadable. The caller owns the client and closes it
    with `aclose()`, after everything that was built on it is closed.

    Before Python 3.12, a command may lose a cancellation that arrives just as it is sent: cancel
    again where that matters, as `tera.background.end` does.

    Args:
        url: `redis://`, `rediss://` (TLS) or `unix://`, with credentials if there are any.
        timeout_s: the longest wait for a connection, and for each read or write on it.

    Raises:
        ConfigError: `url` is not the address of a Redis.
    """
    try:
        pool = _FollowingPool.from_url(
            url,
            # A burst waits for a connection; the ordinary pool fails the 101st command at once
            # with the ConnectionError that means that Redis is away.
            max_connections=_MAX_CONNECTIONS,
            timeout=timeout_s,
            socket_timeout=timeout_s,
            socket_connect_timeout=timeout_s,
            health_check_interval=_HEALTH_CHECK_INTERVAL_S,
            retry=Retry(NoBackoff(), retries=0),
            # Every Redis and Valkey speaks RESP2, and it needs no HELLO. RESP3 would only bring
            # push messages for managed services' maintenance, which Redis 6.2 does not know.
            protocol=2,
        )
    except ValueError:
        # The cause is dropped: it may quote the URL, which may contain a password.
        raise ConfigError(
            "The Redis URL is not valid; it must look like redis://host:port/0, "
            "rediss://host:port/0 or unix:///path."
        ) from None
    return Redis.from_pool(pool)


class _Following(AbstractConnection):
    """Notices that its server accepts no writes."""

    read_only = False
    failovers = 0
    """How many failovers its pool had seen when it was opened."""

    async def read_response(self, *args: Any, **options: Any) -> Any:
        try:
            return await super().read_response(*args, **options)
        except ResponseError as error:
            self.read_only |= is_read_only(error)
            raise


class _FollowingPool(BlockingConnectionPool):
    """Reopens its connections once one of them has met a server that has become read-only.

    Nothing else would: when an address leads to another server, open connections stay where they
    are, and a primary that was made a replica keeps answering.
    """

    _failovers = 0

    def make_connection(self) -> AbstractConnection:
        kind = type("Following", (_Following, self.connection_class), {})
        connection: _Following = kind(**self.connection_kwargs)
        connection.failovers = self._failovers
        return connection

    async def ensure_connection(self, connection: AbstractConnection) -> None:
        if isinstance(connection, _Following) and connection.failovers < self._failovers:
            await connection.disconnect()
            connection.failovers = self._failovers
        await super().ensure_connection(connection)

    async def release(self, connection: AbstractConnection) -> None:
        if isinstance(connection, _Following) and connection.read_only:
            connection.read_only = False
            self._failovers += 1
        await super().release(connection)


_CANNOT_SERVE: Final = re.compile(
    r"(?:^|-)(?:OOM|READONLY|LOADING|MISCONF|MASTERDOWN|NOREPLICAS|BUSY|NOAUTH|NOPERM"
    r"|CLUSTERDOWN|CROSSSLOT|MOVED|ASK|TRYAGAIN)\b"
)
"""Errors that the next call would meet too; older servers quote them within a script's error."""

# redis-py has taken their first word away.
_OF_THE_SERVER: Final = (
    *(OutOfMemoryError, ReadOnlyError),
    *(AskError, ClusterCrossSlotError, ClusterDownError, TryAgainError),
)


def is_refusal(error: RedisError) -> bool:
    """Return whether Redis refuses just this call, rather than being away for all calls.

    Data of the wrong type under one tenant's keys must not disable everybody's limits.
    """
    if not isinstance(error, ResponseError) or isinstance(error, _OF_THE_SERVER):
        return False
    return _CANNOT_SERVE.search(str(error)) is None


def is_read_only(error: ResponseError) -> bool:
    """Return whether a server refuses a write because it is a replica."""
    # A script's error quotes it: at the beginning on newer servers, later on older ones.
    return isinstance(error, ReadOnlyError) or _READ_ONLY.search(str(error)) is not None


def is_full(error: RedisError) -> bool:
    """Return whether a server refuses a write because it has no memory left for it."""
    return isinstance(error, OutOfMemoryError) or _FULL.search(str(error)) is not None


@asynccontextmanager
async def reaching(what: str) -> AsyncGenerator[None]:
    """Turn any Redis error in the block into an `InternalError`; `what` begins its message.

    Raises:
        InternalError: Redis cannot be reached, or refuses a command.
    """
    try:
        yield
    except RedisError as error:
        raise InternalError(f"{what} cannot be reached.") from error


async def refuse_cluster(redis: Redis) -> None:
    """Make sure that a Redis is no Cluster, as far as it can be reached and lets itself be asked.

    Keys, tenants and their version change in one script, which the nodes of a Cluster refuse.

    Raises:
        ConfigError: it is one.
    """
    try:
        info = await redis.info("cluster")
    except RedisError:
        return  # it is away, or keeps INFO to itself as some services do
    if int(info.get("cluster_enabled", 0)):
        raise ConfigError(
            "redis: this is a Redis Cluster, which is not supported; "
            "give a Redis or Valkey with cluster-enabled no, with replicas if need be."
        )


class Attempts:
    """Repeated work against Redis; of several failures in a row only the first is a warning."""

    def __init__(self, what: str) -> None:
        """`what` begins the log message."""
        self._what = what
        self._failing = False

    async def make(self, work: Awaitable[T]) -> T | None:
        """Return the result of the work; None if Redis fails, in which case it is retried later."""
        try:
            async with asyncio.timeout(_ATTEMPT_TIMEOUT_S):
                result = await work
        except (RedisError, TimeoutError) as error:
            level = logging.DEBUG if self._failing else logging.WARNING
            reason = str(error) or type(error).__name__
            logger.log(level, "%s: it failed and is tried again (%s).", self._what, reason)
            self._failing = True
            return None
        self._failing = False
        return result

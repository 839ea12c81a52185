"""How Tera connects to Redis: bounded waits, and no hidden second tries."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from tera.errors import ConfigError, InternalError

_HEALTH_CHECK_INTERVAL_S = 10
"""A connection that was idle for longer is tried with a PING before it is used."""
_CANCEL_AGAIN_S = 0.01
_MAX_CONNECTIONS = 32
"""More would not make Redis, which runs one command at a time, any faster."""


def connect(url: str, *, timeout_s: float) -> Redis:
    """Return a client that answers or fails within about `timeout_s` per round trip.

    Nothing is sent yet: an unreachable server shows at the first command. A command is tried
    once, because a second try would double the wait that `timeout_s` promises, and the first
    may have taken effect. Replies are bytes, so that one damaged value cannot make a whole
    reply unreadable. The caller owns the client and closes it with `aclose()`, after
    everything that was built on it is closed.

    Before Python 3.12 a command may lose a cancellation that comes just as it is sent
    (bpo-42130, redis-py uses `asyncio.wait_for`): cancel again where that matters.

    Args:
        url: `redis://`, `rediss://` (TLS) or `unix://`, with credentials if there are any.
        timeout_s: the longest wait for a connection, and for each read or write on it.

    Raises:
        ConfigError: `url` is not the address of a Redis.
    """
    try:
        pool = BlockingConnectionPool.from_url(
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
        # The cause is dropped: it may quote the URL, and with it a password.
        raise ConfigError(
            "The Redis URL is not valid; it must look like redis://host:port/0, "
            "rediss://host:port/0 or unix:///path."
        ) from None
    return Redis.from_pool(pool)


@asynccontextmanager
async def reaching(what: str) -> AsyncGenerator[None]:
    """Make an error of ours of any of Redis's in the block; `what` begins the sentence.

    Raises:
        InternalError: Redis cannot be reached, or does not do what it is told.
    """
    try:
        yield
    except RedisError as error:
        raise InternalError(f"{what} cannot be reached.") from error


async def end(task: asyncio.Task[None]) -> None:
    """Cancel a task that talks to Redis, again until it has ended; see `connect`."""
    while not task.done():
        task.cancel()
        await asyncio.wait([task], timeout=_CANCEL_AGAIN_S)

"""Tera's use of a private part of redis-py: a connection's stream.

redis-py opens a connection and logs in on it as the Redis URL says: user, password, database, TLS,
unix socket, keep-alive. Then `tera.tenancy.pipelined` reads and writes instead, at a fifth of the
cost (docs/decisions/0007). There is no public access to a connection's stream.

Tested with redis-py 8.1; `_reader` and `_writer` have existed since redis-py absorbed aioredis
(4.2). Without them a gateway does not start: see docs/upgrading-ray-and-vllm.md.
"""

import asyncio
from typing import Any, Final

from redis.asyncio import Connection, ConnectionPool
from redis.exceptions import ConnectionError as RedisConnectionError

from tera.errors import InternalError

_STREAMS: Final = ("_reader", "_writer")


def check() -> None:
    """Check that the installed redis-py has what is used here.

    Raises:
        InternalError: it does not.
    """
    connection = Connection()
    missing = [name for name in _STREAMS if not hasattr(connection, name)]
    if missing:
        raise InternalError(
            f"This version of redis-py has no Connection.{missing[0]}; "
            "see docs/upgrading-ray-and-vllm.md."
        )


async def opened_stream(pool: ConnectionPool) -> asyncio.StreamWriter:
    """Open a connection with the pool's settings; return its stream, logged in and fully read.

    The caller owns it, may give its transport another protocol, and closes it. The pool does not
    count it.

    Raises:
        RedisError: as the connection's `connect` does.
    """
    connection: Any = pool.make_connection()  # type: ignore[no-untyped-call]
    await connection.connect()
    if await connection.can_read():
        await connection.disconnect(nowait=True)
        raise RedisConnectionError("The server says more than it was asked for.")
    stream: asyncio.StreamWriter = connection._writer
    # So that it does not close the stream when it is garbage-collected.
    connection._reader = connection._writer = None
    return stream

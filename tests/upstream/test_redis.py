"""Whether the installed redis-py has what `tera.upstream.redis` and `tenancy.redis` use of it."""

from __future__ import annotations

import asyncio
import inspect
from typing import TYPE_CHECKING, Any

import pytest
from redis.asyncio import BlockingConnectionPool, Connection, ConnectionPool
from tests.tenancy.conftest import RedisServer

from tera.errors import InternalError
from tera.tenancy.redis import connect
from tera.upstream import redis as redis_py

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    with RedisServer.running(tmp_path / "redis") as running:
        yield running


def parameters(function: Any) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name != "self"]


def test_a_connection_has_its_stream_in_two_private_attributes() -> None:
    redis_py.check()
    connection: Any = Connection()
    assert connection._reader is None
    assert connection._writer is None


@pytest.mark.parametrize("name", ["_reader", "_writer"])
def test_a_redis_py_without_them_is_refused_with_the_page_to_read(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    class Changed:
        def __init__(self) -> None:
            self._reader = self._writer = None
            delattr(self, name)

    monkeypatch.setattr(redis_py, "Connection", Changed)
    with pytest.raises(InternalError) as refused:
        redis_py.check()
    assert refused.value.message == (
        f"This version of redis-py has no Connection.{name}; see docs/upgrading-ray-and-vllm.md."
    )


async def test_an_opened_stream_is_logged_in_and_redis_py_knows_nothing_of_it(
    server: RedisServer,
) -> None:
    client = connect(server.url, timeout_s=5.0)
    pool: Any = client.connection_pool
    connection = pool.make_connection()
    pool.make_connection = lambda: connection
    stream = await redis_py.opened_stream(pool)
    assert isinstance(stream, asyncio.StreamWriter)
    assert not connection.is_connected

    heard: asyncio.Queue[bytes] = asyncio.Queue()

    class Listener(asyncio.Protocol):
        def data_received(self, data: bytes) -> None:
            heard.put_nowait(data)

    stream.transport.set_protocol(Listener())
    stream.transport.write(b"ECHO tera\r\n")
    assert await heard.get() == b"$4\r\ntera\r\n"
    stream.transport.abort()
    await client.aclose()


def test_a_pool_makes_and_checks_connections_where_ours_does_something_else() -> None:
    assert parameters(ConnectionPool.make_connection) == []
    assert parameters(ConnectionPool.ensure_connection) == ["connection"]
    assert parameters(ConnectionPool.release) == ["connection"]
    assert "ensure_connection" in inspect.getsource(BlockingConnectionPool.get_connection)
    assert parameters(Connection.can_read) == []
    assert parameters(Connection.connect) == []
    assert "nowait" in parameters(Connection.disconnect)

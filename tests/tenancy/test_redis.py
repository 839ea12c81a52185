from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError
from tests.tenancy.proxy import Proxy

from tera.errors import ConfigError
from tera.tenancy.redis import connect, is_refusal, refuse_cluster

if TYPE_CHECKING:
    from redis.asyncio import Redis
    from tests.tenancy.conftest import RedisServer


@pytest.mark.parametrize(
    "url",
    [
        pytest.param("http://127.0.0.1:6379", id="other-scheme"),
        pytest.param("127.0.0.1:6379", id="no-scheme"),
        pytest.param("redis://user:hunter2@host:port/0", id="port-is-no-number"),
    ],
)
def test_an_unusable_url_is_refused_without_repeating_it(url: str) -> None:
    with pytest.raises(ConfigError) as raised:
        connect(url, timeout_s=0.1)
    assert url not in raised.value.message
    assert "hunter2" not in raised.value.message
    assert raised.value.__cause__ is None


async def test_a_burst_waits_for_a_connection_and_does_not_fail(redis_server: RedisServer) -> None:
    client = connect(redis_server.url, timeout_s=5.0)
    try:
        await asyncio.gather(*(client.incr("count") for _ in range(500)))
        assert await client.get("count") == b"500"
    finally:
        await client.aclose()


@pytest.mark.parametrize(
    "write",
    [
        pytest.param(("SET", "name", "value"), id="command"),
        pytest.param(("EVAL", "redis.call('INCR', KEYS[1])", "1", "name"), id="script"),
    ],
)
async def test_all_connections_leave_a_server_that_has_become_read_only(
    redis_server: RedisServer, second_server: RedisServer, redis: Redis, write: tuple[str, ...]
) -> None:
    async with Proxy(redis_server) as proxy, connect(proxy.url, timeout_s=1.0) as client:
        await asyncio.gather(*(client.ping() for _ in range(8)))
        await redis.replicaof("127.0.0.1", second_server.port)
        proxy.server = second_server
        assert await client.ping()  # as before: the connections are there
        with pytest.raises(ResponseError):
            await client.execute_command(*write)  # type: ignore[no-untyped-call]
        await asyncio.gather(*(client.incr("count") for _ in range(8)))
        assert await client.get("count") == b"8"


async def test_replies_are_bytes(redis_server: RedisServer) -> None:
    client = connect(redis_server.url, timeout_s=1.0)
    try:
        await client.set("name", "value")
        assert await client.get("name") == b"value"
    finally:
        await client.aclose()


async def test_a_frozen_server_fails_the_command_and_the_client_recovers(
    redis_server: RedisServer,
) -> None:
    client = connect(redis_server.url, timeout_s=0.1)
    try:
        await client.incr("count")
        redis_server.stop()
        with pytest.raises(RedisTimeoutError):
            await client.get("count")
        redis_server.cont()
        assert await client.get("count") == b"1"
    finally:
        await client.aclose()


async def test_a_dead_server_fails_the_command_and_the_client_recovers(
    redis_server: RedisServer,
) -> None:
    client = connect(redis_server.url, timeout_s=1.0)
    try:
        await client.set("name", "value")
        redis_server.kill()
        with pytest.raises(RedisConnectionError):
            await client.get("name")
        redis_server.start()
        assert await client.get("name") == b"value"
    finally:
        await client.aclose()


async def test_a_cluster_is_refused_by_name(redis: Redis, cluster_node: RedisServer) -> None:
    await refuse_cluster(redis)
    async with connect(cluster_node.url, timeout_s=1.0) as node:
        with pytest.raises(ConfigError, match="is a Redis Cluster, which is not supported"):
            await refuse_cluster(node)


async def test_whoever_may_not_ask_is_not_refused(redis: Redis, redis_server: RedisServer) -> None:
    await redis.acl_setuser("tera", enabled=True, nopass=True, keys=["*"], categories=["+@all"])
    await redis.execute_command("ACL", "SETUSER", "tera", "-info")  # type: ignore[no-untyped-call]
    url = redis_server.url.replace("redis://", "redis://tera:x@")
    async with connect(url, timeout_s=1.0) as limited:
        await refuse_cluster(limited)


async def test_what_a_cluster_sends_elsewhere_is_no_tenants_own_fault(
    cluster_node: RedisServer,
) -> None:
    async with connect(cluster_node.url, timeout_s=1.0) as node:
        with pytest.raises(ResponseError) as unserved:
            await node.get("tera:keys")
        with pytest.raises(ResponseError) as crossing:
            await node.eval("return 1", 2, "tera:keys", "tera:tenants")
    assert not is_refusal(unserved.value)
    assert not is_refusal(crossing.value)
    assert not is_refusal(ResponseError("MOVED 3999 127.0.0.1:6381"))

from __future__ import annotations

import asyncio
import ssl
import subprocess
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

import pytest
import uvloop
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import InvalidResponse, RedisError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError
from tests.tenancy.conftest import PATIENT, RedisServer
from tests.tenancy.proxy import Proxy
from tests.tenancy.scripted import ScriptedRedis
from tests.tenancy.waiting import until

from tera.tenancy.pipelined import PipelinedRedis
from tera.tenancy.redis import connect
from tera.tenancy.silence import Patience

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from redis.asyncio import Redis


@asynccontextmanager
async def pipelined(url: str, patience: Patience = PATIENT) -> AsyncIterator[PipelinedRedis]:
    client = connect(url, timeout_s=10.0)
    calls = PipelinedRedis(client.connection_pool, patience)
    try:
        yield calls
    finally:
        await calls.aclose()
        await client.aclose()


@asynccontextmanager
async def scripted(patience: Patience = PATIENT) -> AsyncIterator[tuple[ScriptedRedis, Any]]:
    async with ScriptedRedis() as server, pipelined(server.url, patience) as calls:
        await calls.open()
        yield server, calls


async def asked(server: ScriptedRedis, count: int) -> list[bytes]:
    return [await server.asked.get() for _ in range(count)]


# Replies


async def test_each_call_gets_its_own_reply(calls: PipelinedRedis) -> None:
    async def echo(number: int) -> None:
        assert await calls.call("ECHO", number) == str(number).encode()

    await asyncio.gather(*(echo(number) for number in range(1000)))
    assert calls.waiting == 0


async def test_calls_of_one_turn_of_the_loop_are_read_by_redis_at_once(
    redis: Redis, calls: PipelinedRedis
) -> None:
    await calls.open()
    before = await redis.info("stats")
    await asyncio.gather(*(calls.call("PING") for _ in range(100)))
    after = await redis.info("stats")
    # One for the calls, and one for the client that asks.
    assert after["total_reads_processed"] - before["total_reads_processed"] <= 2


async def test_replies_keep_their_order_when_callers_are_cancelled() -> None:
    heard: list[bytes] = []
    async with scripted() as (server, calls):
        replies = [calls.call(name, unheard=heard.append) for name in "ABCD"]
        assert await asked(server, 4) == [b"A", b"B", b"C", b"D"]
        replies[0].cancel()
        server.say(b"+a\r\n+b\r\n")
        assert await replies[1] == b"b"
        replies[2].cancel()
        server.say(b"+c\r\n+d\r\n")
        assert await replies[3] == b"d"
    assert heard == [b"a", b"c"]


async def test_an_error_is_no_reply_that_anybody_missed() -> None:
    async with scripted() as (server, calls):
        cancelled = calls.call("A", unheard=pytest.fail)
        last = calls.call("B")
        cancelled.cancel()
        server.say(b"-ERR no\r\n+b\r\n")
        assert await last == b"b"


async def test_a_listener_that_fails_takes_nothing_from_the_others(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(reply: Any) -> None:
        raise RuntimeError("out of paper")

    async with scripted() as (server, calls):
        cancelled, last = calls.call("A", unheard=fail), calls.call("B")
        cancelled.cancel()
        server.say(b"+a\r\n+b\r\n")
        assert await last == b"b"
        assert server.connections == 1
    assert "out of paper" in caplog.text


async def test_replies_may_come_in_any_pieces() -> None:
    async with scripted() as (server, calls):
        replies = [calls.call(name) for name in "ABC"]
        await asked(server, 3)
        for byte in b"*3\r\n$2\r\nab\r\n:-7\r\n$-1\r\n-ERR un\r\n$3\r\n\r\n\xff\r\n":
            server.say(bytes([byte]))
            await asyncio.sleep(0)
        assert await replies[0] == [b"ab", -7, None]
        with pytest.raises(ResponseError, match="ERR un"):
            await replies[1]
        assert await replies[2] == b"\r\n\xff"


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(b"HTTP/1.1 400 Bad Request\r\n", id="another-protocol"),
        pytest.param(b"+a\r\n+b\r\n", id="a-reply-too-many"),
    ],
)
async def test_a_server_that_has_lost_its_place_is_left(words: bytes) -> None:
    async with scripted() as (server, calls):
        first = calls.call("A")
        await asked(server, 1)
        server.say(words)
        with suppress(InvalidResponse):
            await first
        await until(lambda: calls.closed)
        again = calls.call("B")
        await asked(server, 1)
        server.say(b"+b\r\n")
        assert await again == b"b"
        assert server.connections == 2


# Connections that end


@pytest.mark.parametrize("said", [b"", b"$10\r\nhalf", b"*3\r\n+one\r\n"])
async def test_a_connection_that_is_cut_fails_what_waits_and_nothing_after_it(said: bytes) -> None:
    async with scripted() as (server, calls):
        replies = [calls.call("A"), calls.call("B")]
        await asked(server, 2)
        server.say(said)
        server.cut()
        for reply in replies:
            with pytest.raises(RedisConnectionError):
                await reply
        again = calls.call("C")
        assert await asked(server, 1) == [b"C"]
        server.say(b"+c\r\n")
        assert await again == b"c"
        assert server.connections == 2


async def test_a_connection_that_is_cut_while_nothing_waits_is_replaced_without_an_error() -> None:
    async with scripted() as (server, calls):
        server.cut()
        await until(lambda: calls.closed)
        reply = calls.call("A")
        await asked(server, 1)
        server.say(b"+a\r\n")
        assert await reply == b"a"


async def test_a_frozen_server_fails_every_call_and_is_asked_again_by_the_next(
    redis_server: RedisServer,
) -> None:
    async with pipelined(redis_server.url, Patience()) as calls:
        await calls.open()
        redis_server.stop()
        replies = [calls.call("INCR", "count") for _ in range(10)]
        outcomes = await asyncio.gather(*replies, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [RedisTimeoutError] * 10
        assert len({id(outcome) for outcome in outcomes}) == 10  # an error of its own for each
        assert calls.waiting == 0
        redis_server.cont()
        await calls.open()
        # What timed out may have been done nevertheless, and was sent once.
        assert 1 <= await calls.call("INCR", "count") <= 11


async def test_a_call_waits_for_so_many_slices_at_the_most_whatever_keeps_this_process() -> None:
    patience = Patience(slice_s=0.001, slices=10**9, most_slices=40)
    async with scripted(patience) as (_, calls):
        with pytest.raises(RedisTimeoutError):
            await calls.call("A")


async def test_a_server_that_is_not_there_fails_the_call(redis_server: RedisServer) -> None:
    async with pipelined(redis_server.url) as calls:
        redis_server.kill()
        with pytest.raises(RedisConnectionError):
            await calls.call("PING")
        with pytest.raises(RedisConnectionError):
            await calls.open()
        redis_server.start()
        assert await calls.call("PING") == b"PONG"


async def test_calls_do_not_wait_for_a_slow_login_and_whoever_opens_does() -> None:
    async with ScriptedRedis() as server, pipelined(server.url, Patience(slice_s=0.001)) as calls:
        server.lets_in.clear()
        with pytest.raises(RedisTimeoutError):
            await calls.call("A")
        opening = asyncio.create_task(calls.open())
        await asyncio.sleep(0.05)  # many slices
        assert not opening.done()
        server.lets_in.set()
        await opening
        # What had timed out before it could be sent is not sent now.
        reply = calls.call("B")
        assert await asked(server, 1) == [b"B"]
        server.say(b"+b\r\n")
        assert await reply == b"b"


async def test_what_is_called_while_the_connection_opens_is_sent_when_it_is_there(
    redis_server: RedisServer,
) -> None:
    async with pipelined(redis_server.url) as calls:
        first = calls.call("INCR", "count")
        opening = asyncio.create_task(calls.open())
        second = calls.call("INCR", "count")
        assert [await first, await second] == [1, 2]
        await opening


@pytest.mark.parametrize(
    "write",
    [
        pytest.param(("SET", "name", "value"), id="command"),
        pytest.param(("EVAL", "redis.call('INCR', KEYS[1])", "1", "name"), id="script"),
    ],
)
async def test_a_server_that_has_become_read_only_is_left(
    redis_server: RedisServer, second_server: RedisServer, redis: Redis, write: tuple[str, ...]
) -> None:
    async with Proxy(redis_server) as proxy, pipelined(proxy.url) as calls:
        await calls.open()
        await redis.replicaof("127.0.0.1", second_server.port)
        proxy.server = second_server
        with pytest.raises(ResponseError, match="READONLY"):
            await calls.call(*write)
        assert await calls.call("SET", "name", "value") == b"OK"


async def test_a_refusal_leaves_the_connection_as_it_is(
    redis: Redis, calls: PipelinedRedis
) -> None:
    me = await calls.call("CLIENT", "ID")
    await redis.config_set("maxmemory", 1)
    with pytest.raises(ResponseError, match="OOM"):
        await calls.call("SET", "name", "value")
    assert await calls.call("CLIENT", "ID") == me


async def test_closing_fails_what_waits_and_leaves_nothing_open() -> None:
    async with scripted() as (server, calls):
        reply = calls.call("A")
        await asked(server, 1)
        await calls.aclose()
        with pytest.raises(RedisConnectionError):
            await reply
        await calls.aclose()


# Ways to connect


async def test_the_users_name_password_and_database_are_those_of_the_url(
    redis_server: RedisServer, redis: Redis
) -> None:
    everything = ("on", ">pass word", "~*", "+@all")
    await redis.execute_command("ACL", "SETUSER", "tera", *everything)  # type: ignore[no-untyped-call]
    port = redis_server.port
    async with pipelined(f"redis://tera:pass%20word@127.0.0.1:{port}/3") as calls:
        assert await calls.call("ACL", "WHOAMI") == b"tera"
        await calls.call("SET", "here", 1)
    assert await redis.exists("here") == 0
    async with pipelined(f"redis://tera:wrong@127.0.0.1:{port}/3") as calls:
        with pytest.raises(RedisError):
            await calls.call("PING")
        with pytest.raises(RedisError, match="invalid username-password"):
            await calls.open()


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """A certificate of 127.0.0.1 that signs itself, with its key."""
    path = tmp_path / "redis.pem"
    certificate = tmp_path / "certificate.pem"
    request = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=redis -addext"
    files = ("-keyout", str(path), "-out", str(certificate))
    order = [*request.split(), "subjectAltName=IP:127.0.0.1", *files]
    subprocess.run(order, check=True, capture_output=True)  # noqa: S603  our own arguments
    with path.open("a") as file:
        file.write(certificate.read_text())
    return path


async def echoes(url: str) -> None:
    """Make calls whose replies together are larger than a TLS record and a socket's buffer."""
    async with pipelined(url) as calls:
        texts = [str(number) * 10_000 for number in range(100)]
        replies = await asyncio.gather(*(calls.call("ECHO", text) for text in texts))
        assert [reply.decode() for reply in replies] == texts


@pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_tls_unix_sockets_and_both_event_loops_carry_calls(
    redis_server: RedisServer, certificate: Path, tmp_path: Path, loop: Any
) -> None:
    async def all_ways() -> None:
        await echoes(redis_server.url)
        async with AsyncExitStack() as stack:
            server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            server.load_cert_chain(certificate)
            tls = await stack.enter_async_context(Proxy(redis_server, tls=server))
            await echoes(f"{tls.url}?ssl_ca_certs={certificate}")
            async with pipelined(tls.url) as calls:
                with pytest.raises(RedisConnectionError, match="certificate"):
                    await calls.open()
            path = tmp_path / "socket"
            await stack.enter_async_context(Proxy(redis_server, path=path))
            await echoes(f"unix://{path}?db=2")

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(all_ways())

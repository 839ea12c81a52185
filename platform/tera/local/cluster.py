"""Ray and Ray Serve on one machine: start, deploy, watch, and leave nothing behind."""

import asyncio
import atexit
import logging
import os
import random
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout

from tera.config.environment import set_environment
from tera.errors import StartError, UnreachableError
from tera.gateway.failure import last_line
from tera.local.private_file import private_directory
from tera.local.processes import descendants, end
from tera.local.state import LocalSecrets, LocalState
from tera.upstream.ray_cluster import (
    ON_LOOPBACK,
    REQUIRED,
    Ports,
    serve_client,
    serve_environment,
    stop_listening,
)

_logger = logging.getLogger(__name__)

LOGICAL_CPUS = 1024
"""The CPUs that Ray may hand out: more than there are, since on one machine replicas share them."""
OBJECT_STORE_BYTES = 100 * 1024 * 1024
REPLICA_PORTS = 500
"""Each start of a replica takes a port, which Serve gives to no other for an hour: a model that
crashes at its start is started some 60 times an hour, and must leave the gateway a port."""
PORTS, HTTP_PORTS, GRPC_PORTS = range(10_000, 20_000), range(20_000, 26_000), range(26_000, 32_000)
"""Below the range from which the kernel takes ports for outgoing connections, which could otherwise
take one before we listen on it."""
STOP_DEADLINE_S = 12.0
"""Two engines with a model need ten seconds on two cores; `processes.end` then adds its own."""
LONGEST_STREAM_S = 3600
"""Longer than any useful `gateway.requests.deadlineSeconds`."""

_abandoned = threading.Event()
"""Set if Ray did not shut down in time, so that a thread of this process is still in its core."""


class LocalCluster:
    """A private Ray cluster, whose processes are children of this one."""

    def __init__(self, host: str, port: int, scratch: Path) -> None:
        self.host = host
        self.port = port
        self.ray_address = ""
        self._scratch = scratch
        self._claims = ExitStack()
        """Claims of ports, held for as long as our processes may listen on them."""
        self._not_ours = descendants()

    @property
    def status_socket(self) -> Path:
        """Path of the socket over which the platform's status is served."""
        return self._scratch / "status.sock"

    def start(self) -> None:
        """Start Ray; blocks for seconds.

        Raises:
            StartError: Ray does not start, or something it needs is missing.
        """
        set_environment(_serve_environment(self._scratch, self.host, self._claims))
        directory = _ray_directory()
        # Ray Serve reads its settings when it is imported, so this comes after they are set.
        import ray

        with _starting("Ray"):
            ray.init(
                address="local",
                num_cpus=LOGICAL_CPUS,
                object_store_memory=OBJECT_STORE_BYTES,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                _node_ip_address="127.0.0.1",
                _temp_dir=str(directory),
            )
        self.ray_address = ray.get_runtime_context().gcs_address

    def deploy(self, config: dict[str, Any]) -> None:
        """Submit a Serve config; the applications then start in the background.

        Raises:
            StartError: Ray Serve does not start, or refuses the config.
        """
        from ray import serve
        from ray.serve.schema import ServeDeploySchema

        _quieten_serve()
        with _starting("Ray Serve"):
            serve.start(proxy_location="EveryNode", http_options=config["http_options"])
            serve_client().deploy_apps(ServeDeploySchema.model_validate(config))

    async def stop(self) -> None:
        """Stop Serve and Ray, and kill those of their processes that outlive `STOP_DEADLINE_S`.

        Raises:
            StartError: a process cannot be ended.
        """
        # Redis is left running: whoever started it stops it.
        ours = descendants(apart_from=self._not_ours)
        # A daemon thread: Ray may wait for ever for processes that are ended below, and a thread
        # of the loop's executor would keep this process alive for as long.
        shutting_down = threading.Thread(target=_shut_down, daemon=True)
        shutting_down.start()
        await asyncio.to_thread(shutting_down.join, STOP_DEADLINE_S)
        try:
            await end(ours)
        finally:
            if shutting_down.is_alive():
                _abandoned.set()
                _forget_exit_hook()
            self._claims.close()


@contextmanager
def _starting(what: str) -> Iterator[None]:
    """Turn any error of Ray into a `StartError`."""
    try:
        yield
    except Exception as error:  # Ray raises plain ones, for example when a machine is too busy
        raise StartError(f"{what} does not start: {error}") from error


def _shut_down() -> None:
    import ray
    from ray import serve

    if ray.is_initialized():
        _quieten_serve()
        try:
            stop_listening()
            serve.shutdown()  # type: ignore[no-untyped-call]
        except Exception as error:  # noqa: BLE001  the processes are ended next in any case
            _logger.warning("Ray Serve did not shut down by itself: %r", error)
        ray.shutdown()


def end_if_abandoned(code: int) -> None:
    """Exit at once with `code` if Ray did not shut down.

    A normal exit would unload Ray's core while a thread is still in it: a segmentation fault.
    """
    if _abandoned.is_set():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _quieten_serve() -> None:
    """Keep Serve, which has been imported by now, from logging its progress to the terminal."""
    logging.getLogger("ray.serve").setLevel(logging.ERROR)


def _forget_exit_hook() -> None:
    """Keep Ray from shutting down again at exit, when nothing is left to answer it."""
    import ray

    atexit.unregister(ray.shutdown)


def _serve_environment(scratch: Path, host: str, claims: ExitStack) -> dict[str, str]:
    """Return what Ray and Serve read from the environment (see `docs/architecture.md`)."""
    haproxy = shutil.which("tera-haproxy", path=str(Path(sys.executable).parent))
    if haproxy is None:
        raise StartError("tera-haproxy is not installed beside Python; run `make install`.")
    ports = Ports(
        haproxy_metrics=free_port(),
        haproxy_stats=free_port(),
        fallback_http=free_port(),
        fallback_grpc=free_port(),
        replicas_http=claim_range(HTTP_PORTS, claims),
        replicas_grpc=claim_range(GRPC_PORTS, claims),
        count=REPLICA_PORTS,
    )
    return {
        **serve_environment(haproxy, scratch, ports, LONGEST_STREAM_S),
        **ON_LOOPBACK,
        "RAY_USAGE_STATS_ENABLED": "0",
        "TERA_HOST": host,
    }


def _ray_directory() -> Path:
    """Return the directory for Ray's logs and sockets, which Ray makes writable for everybody.

    It stays after the platform has ended, for its logs. Its path is short, for the sockets.

    Raises:
        StartError: others can enter the directory around it.
    """
    return private_directory(Path(tempfile.gettempdir()) / f"tera-{os.getuid()}") / "ray"


def free_port() -> int:
    """Return a port that was free a moment ago, outside the range for outgoing connections."""
    while True:
        port = random.choice(PORTS)  # noqa: S311  not a secret
        with socket.socket() as probe, suppress(OSError):  # taken: try another one
            probe.bind(("127.0.0.1", port))
            return port


def claim_range(among: range, claims: ExitStack) -> int:
    """Claim a range of `REPLICA_PORTS` ports until `claims` is closed, and return the first.

    Serve's replicas bind with SO_REUSEPORT: two platforms with the same range would not fail but
    share connections. It is not enough that nobody listens, since a replica may be restarting.
    """
    taken = {
        connection.laddr.port
        for connection in psutil.net_connections(kind="tcp")
        if connection.laddr and connection.status == psutil.CONN_LISTEN
    }
    for start in range(among.start, among.stop - REPLICA_PORTS, REPLICA_PORTS + 1):
        if not taken.isdisjoint(range(start, start + REPLICA_PORTS + 1)):
            continue
        path = Path(tempfile.gettempdir()) / f"tera-ports-{start}.lock"
        # Claimed in the thread that starts Ray, released in another one.
        lock = FileLock(path, thread_local=False)
        try:
            claims.enter_context(lock.acquire(blocking=False))
        except (Timeout, PermissionError):
            continue  # another platform has it, or another user's once had it
        return start
    raise StartError("No free range of ports for replicas; stop other platforms first.")


@contextmanager
def attached(state: LocalState, local_secrets: LocalSecrets) -> Iterator[Any]:
    """Connect a command to the running platform's Ray, and yield Serve's client.

    Raises:
        UnreachableError: Ray does not answer.
    """
    set_environment({**local_secrets.ray_environment(), **REQUIRED, **ON_LOOPBACK})
    # Ray Serve reads its settings when it is imported, so this comes after they are set.
    import ray

    _quieten_serve()
    try:
        ray.init(
            address=state.ray_address,
            namespace="serve",
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
        client = serve_client()
    except (ConnectionError, RuntimeError) as error:
        raise UnreachableError(f"The platform at {state.base_url} does not answer.") from error
    try:
        yield client
    finally:
        ray.shutdown()


def application_statuses() -> dict[str, tuple[str, str]]:
    """Return each application's status and message, by name."""
    from ray import serve

    applications = serve.status().applications
    return {name: (app.status, last_line(app)) for name, app in applications.items()}


Progress = Callable[[str], None]


async def wait_until_deployed(names: set[str], on_ready: Progress, deadline_s: float) -> None:
    """Return once every named application runs, in the Serve this process is connected to.

    Raises:
        StartError: an application failed, or the deadline has passed; the message says why.
    """
    waiting = set(names)
    end = time.monotonic() + deadline_s
    while waiting:
        statuses = await asyncio.to_thread(application_statuses)
        for name in sorted(waiting):
            status, reason = statuses.get(name, ("NOT_STARTED", ""))
            if status == "RUNNING":
                waiting.discard(name)
                on_ready(name)
            elif status in ("DEPLOY_FAILED", "UNHEALTHY"):
                raise StartError(f"{name} failed to start: {reason}")
        if time.monotonic() > end:
            raise StartError(f"{', '.join(sorted(waiting))} did not start in {deadline_s:.0f} s.")
        await asyncio.sleep(0.25)

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
from tera.local.processes import descendants, end
from tera.local.state import LocalSecrets, LocalState
from tera.upstream.ray_cluster import (
    REQUIRED,
    Ports,
    serve_client,
    serve_environment,
    stop_listening,
)

_logger = logging.getLogger(__name__)

LOGICAL_CPUS = 1024
"""Ray counts CPUs to place replicas; on one machine they share what there is."""
OBJECT_STORE_BYTES = 100 * 1024 * 1024
REPLICA_PORTS = 100
PORTS, HTTP_PORTS, GRPC_PORTS = range(10_000, 20_000), range(20_000, 26_000), range(26_000, 32_000)
"""Below those that the kernel gives to outgoing connections, which might take one in between."""
STOP_DEADLINE_S = 12.0
"""Two engines with a model need ten on two cores; that of `processes.end` comes on top."""
LONGEST_STREAM_S = 3600
"""Above any `gateway.requests.deadlineSeconds` that is of use."""

_abandoned = threading.Event()
"""Ray did not end when it was to, and a thread of this process is still in its core."""


class LocalCluster:
    """A Ray of our own, whose processes are children of this one."""

    def __init__(self, host: str, port: int, scratch: Path) -> None:
        self.host = host
        self.port = port
        self.ray_address = ""
        self._scratch = scratch
        self._claims = ExitStack()
        """Of ports, for as long as processes of ours may listen on them."""
        self._not_ours = descendants()

    @property
    def status_socket(self) -> Path:
        """Where the status of the platform may be told."""
        return self._scratch / "status.sock"

    def start(self) -> None:
        """Start Ray; blocks for seconds.

        Raises:
            StartError: Ray does not start, or what it needs is not there.
        """
        set_environment(_serve_environment(self._scratch, self.host, self._claims))
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
            )
        self.ray_address = ray.get_runtime_context().gcs_address

    def deploy(self, config: dict[str, Any]) -> None:
        """Hand a Serve config over; the applications come up on their own.

        Raises:
            StartError: Ray Serve does not start, or does not take the config.
        """
        from ray import serve
        from ray.serve.schema import ServeDeploySchema

        _quieten_serve()
        with _starting("Ray Serve"):
            serve.start(proxy_location="EveryNode", http_options=config["http_options"])
            serve_client().deploy_apps(ServeDeploySchema.model_validate(config))

    async def stop(self) -> None:
        """Stop Serve and Ray, and whatever of theirs is still alive after `STOP_DEADLINE_S`.

        Raises:
            StartError: a process cannot be ended.
        """
        # Redis stays: who started it stops it.
        ours = descendants(apart_from=self._not_ours)
        # A daemon thread: Ray may wait for ever for what is ended below, and a thread of the
        # loop's executor would hold this process as long.
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
    """Say an error of Ray in a start's own words."""
    try:
        yield
    except Exception as error:  # Ray raises bare ones, such as when a machine is too busy
        raise StartError(f"{what} does not start: {error}") from error


def _shut_down() -> None:
    import ray
    from ray import serve

    if ray.is_initialized():
        _quieten_serve()
        try:
            stop_listening()
            serve.shutdown()  # type: ignore[no-untyped-call]
        except Exception as error:  # noqa: BLE001  whatever is broken, the processes are ended next
            _logger.warning("Ray Serve did not shut down by itself: %r", error)
        ray.shutdown()


def end_if_abandoned(code: int) -> None:
    """End this process at once, with an exit code, if Ray did not end before.

    As any process ends, Ray's core would be taken down under the thread that is in it: a
    segmentation fault.
    """
    if _abandoned.is_set():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _quieten_serve() -> None:
    """Keep Serve, which is imported by now, from logging on the terminal how it goes."""
    logging.getLogger("ray.serve").setLevel(logging.ERROR)


def _forget_exit_hook() -> None:
    """Keep Ray from shutting down once more at exit: nobody is left to answer it."""
    import ray

    atexit.unregister(ray.shutdown)


def _reason(application: Any) -> str:
    """Return why an application failed, as its last line says it."""
    messages = [application.message]
    messages += [deployment.message for deployment in application.deployments.values()]
    lines = [line.strip() for text in messages for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""


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
        "RAY_USAGE_STATS_ENABLED": "0",
        "TERA_HOST": host,
    }


def free_port() -> int:
    """Return a port that was free a moment ago, of those that no outgoing connection gets."""
    while True:
        port = random.choice(PORTS)  # noqa: S311  no secret
        with socket.socket() as probe, suppress(OSError):  # it is taken: try another one
            probe.bind(("127.0.0.1", port))
            return port


def claim_range(among: range, claims: ExitStack) -> int:
    """Return the first of `REPLICA_PORTS` ports that nobody else gets until `claims` is closed.

    Serve's replicas bind with SO_REUSEPORT: two platforms with one range would share connections,
    not fail. That nobody listens is not enough, for a replica may just be starting again.
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
        # Claimed in the thread that starts Ray, given up in another one.
        lock = FileLock(path, thread_local=False)
        try:
            claims.enter_context(lock.acquire(blocking=False))
        except (Timeout, PermissionError):
            continue  # another platform has it, or had it as another user
        return start
    raise StartError("No free range of ports for replicas; stop other platforms first.")


@contextmanager
def attached(state: LocalState, local_secrets: LocalSecrets) -> Iterator[Any]:
    """Connect a command to the running platform's Ray, and yield Serve's client.

    Raises:
        UnreachableError: Ray does not answer.
    """
    set_environment({**local_secrets.ray_environment(), **REQUIRED})
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
    return {name: (app.status, _reason(app)) for name, app in applications.items()}


Progress = Callable[[str], None]


async def wait_until_deployed(names: set[str], on_ready: Progress, deadline_s: float) -> None:
    """Return once every named application runs, in the Serve that this process is connected to.

    Raises:
        StartError: one failed, or the time is up; the message says why.
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

"""Tera's uses of private parts of Ray and Ray Serve: starting them, and disconnecting from them.

Ray is imported inside the functions: Serve reads its settings, `serve_environment`, when it is
imported, so they must be set before. See docs/upgrading-ray-and-vllm.md.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tera.errors import ConfigError

if TYPE_CHECKING:
    from ray.serve._private.client import ServeControllerClient

REQUIRED = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
}
"""Serve's settings wherever Tera runs, on one machine or on a cluster."""

ON_LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""Keeps a Ray of one machine on the loopback interface, as Ray does by itself on a Mac.

Otherwise Ray replaces 127.0.0.1 by the machine's own address, and others can reach it there.
"""


@dataclass(frozen=True, slots=True)
class Ports:
    """The ports of one platform's Serve; each range is `count` long."""

    haproxy_metrics: int
    haproxy_stats: int
    fallback_http: int
    """Where HAProxy sends requests while it knows of no replica, such as for a moment after a
    reload. Ray's own default is the same for all platforms, and their listeners would share it."""
    fallback_grpc: int
    replicas_http: int
    replicas_grpc: int
    count: int


def serve_environment(
    haproxy: str, scratch: Path, ports: Ports, longest_stream_s: int
) -> dict[str, str]:
    """Return the environment that Ray and Serve need; see docs/architecture.md.

    Args:
        haproxy: the program that Serve starts as HAProxy; see `tera.haproxy`.
        scratch: a directory for this platform only.
        ports: for this platform only.
        longest_stream_s: every change of the gateway's replicas reloads HAProxy, and the process
            with the old connections is stopped after this time, with any streams left on it.
    """
    last = ports.count
    return {
        **REQUIRED,
        "RAY_SERVE_HAPROXY_BINARY_PATH": haproxy,
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(scratch / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(scratch / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(scratch),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(scratch / "server-state"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(scratch / "metrics.sock"),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(ports.haproxy_metrics),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(ports.haproxy_stats),
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": str(longest_stream_s),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(ports.fallback_http),
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(ports.fallback_grpc),
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(ports.replicas_http),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(ports.replicas_http + last),
        "RAY_SERVE_DIRECT_INGRESS_MIN_GRPC_PORT": str(ports.replicas_grpc),
        "RAY_SERVE_DIRECT_INGRESS_MAX_GRPC_PORT": str(ports.replicas_grpc + last),
        # Only HAProxy needs to know that a gateway leaves, and it is told at once.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
        "RAY_worker_niceness": "0",
    }


def serve_client() -> "ServeControllerClient":
    """Return a client of the Serve that this process is connected to.

    Serve's public functions deploy one application at a time, and return no details of replicas.

    Raises:
        ConfigError: this process is not connected to Ray Serve.
    """
    from ray.serve.context import _get_global_client

    client = _get_global_client()
    if client is None:
        raise ConfigError("This process is connected to no Ray Serve.")
    return client


def stop_listening() -> None:
    """Keep Ray from printing errors here about the shutdown that it was asked for."""
    from ray._private.worker import global_worker

    global_worker.threads_stopped.set()
    global_worker.gcs_error_subscriber.close()  # type: ignore[attr-defined]  # set by connecting

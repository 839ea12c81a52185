"""What Tera uses of Ray and Ray Serve that is private there: starting them, and letting go of them.

Ray is imported inside of the functions: Serve reads its settings, `serve_environment`, when it is
imported, so they have to be set before. See docs/upgrading-ray-and-vllm.md.
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
"""What Serve has to be set to wherever Tera runs, on one machine or on a cluster."""


@dataclass(frozen=True, slots=True)
class Ports:
    """The ports of one platform's Serve; each range is `count` long."""

    haproxy_metrics: int
    haproxy_stats: int
    fallback_http: int
    """Where HAProxy sends what comes while it knows of no replica, such as for a moment when it is
    loaded anew. Ray's own number is the same for all platforms, and listeners share it."""
    fallback_grpc: int
    replicas_http: int
    replicas_grpc: int
    count: int


def serve_environment(
    haproxy: str, scratch: Path, ports: Ports, longest_stream_s: int
) -> dict[str, str]:
    """Return what Ray and Serve have to find in the environment; see docs/architecture.md.

    Args:
        haproxy: the program that Serve starts as its HAProxy; see `tera.haproxy`.
        scratch: directory of this platform's own.
        ports: of this platform's own.
        longest_stream_s: whatever changes the gateway's replicas reloads HAProxy, and the process
            that has the old connections is stopped after so long, with what still runs through it.
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
        # Nobody but HAProxy has to hear that a gateway leaves, and it is told at once.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
        "RAY_worker_niceness": "0",
    }


def serve_client() -> "ServeControllerClient":
    """Return the client of the Serve that this process is connected to.

    Serve's public functions deploy one application each, and read no details of replicas.

    Raises:
        ConfigError: this process is connected to none.
    """
    from ray.serve.context import _get_global_client

    client = _get_global_client()
    if client is None:
        raise ConfigError("This process is connected to no Ray Serve.")
    return client


def stop_listening() -> None:
    """Keep Ray from printing here what it thinks of the end that it is asked for."""
    from ray._private.worker import global_worker

    global_worker.threads_stopped.set()
    global_worker.gcs_error_subscriber.close()  # type: ignore[attr-defined]  # set by connecting

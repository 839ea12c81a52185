"""What Tera uses of Ray and Ray Serve that is private there: starting them, and letting go of them.

Ray is imported inside of the functions: Serve reads its settings, `serve_environment`, when it is
imported, so they have to be set before. See docs/upgrading-ray-and-vllm.md.
"""

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


def haproxy_environment(program: str, scratch: Path, hard_stop_s: int) -> dict[str, str]:
    """Return what tells Serve which HAProxy to start and where its files are.

    Args:
        program: what Serve runs in the place of HAProxy; see `tera.haproxy`.
        scratch: directory of this platform's own.
        hard_stop_s: how long streams may go on over a configuration that has been replaced.
    """
    return {
        "RAY_SERVE_HAPROXY_BINARY_PATH": program,
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(scratch / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(scratch / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(scratch),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(scratch / "server-state"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(scratch / "metrics.sock"),
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": str(hard_stop_s),
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

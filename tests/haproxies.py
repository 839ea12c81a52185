"""The real HAProxy, started as Ray Serve does, with the configuration that Ray renders."""

import asyncio
import re
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from ray.serve._private.haproxy import (
    BackendConfig,
    HAProxyApi,
    HAProxyConfig,
    ServerConfig,
)
from ray.serve.config import HTTPOptions


def free_port() -> int:
    """Return a port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def rendered(directory: Path, backend_port: int | None, *, draining: bool = False) -> Path:
    """Have Ray render its configuration, with one gateway replica or none.

    Serve drains a proxy on a node that has no replica any more.
    """
    options = HAProxyConfig(
        http_options=HTTPOptions(host="0.0.0.0", port=free_port()),  # noqa: S104  as Serve does
        socket_path=str(directory / "admin.sock"),
        server_state_base=str(directory),
        server_state_file=str(directory / "server-state"),
        metrics_enabled=False,
        metrics_port=free_port(),
        stats_port=free_port(),
        retries=0,
        has_received_routes=True,
        is_head=True,
        pass_health_checks=not draining,
    )
    backends = {}
    if backend_port is not None:
        server = ServerConfig(name="replica", host="127.0.0.1", port=backend_port)
        backends["gateway"] = BackendConfig(
            name="gateway", path_prefix="/", app_name="gateway", servers=[server]
        )
    path = directory / "haproxy.cfg"
    HAProxyApi(options, backends, config_file_path=str(path))._generate_config_file_internal()
    return path


def port(config: Path) -> int:
    """Return the port of the API in a configuration."""
    found = re.search(r"frontend http_frontend\n *bind \S*:(\d+)", config.read_text())
    assert found
    return int(found[1])


async def connect(port: int, process: asyncio.subprocess.Process) -> None:
    """Return once somebody listens there."""
    while process.returncode is None:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            await asyncio.sleep(0.02)
        else:
            writer.close()
            return
    raise AssertionError("haproxy did not start")


@asynccontextmanager
async def running(config: Path, *arguments: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run it until the block ends; `arguments` are more of the command line."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tera.haproxy", "-db", "-f", str(config), *arguments),
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        await connect(port(config), process)
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()

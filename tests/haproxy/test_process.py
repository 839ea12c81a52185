"""`tera-haproxy`: how it starts, completes Ray's file, and ends."""

import asyncio
import json
import re
import resource
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from tests.haproxies import connect, port, rendered, running

from tera import haproxy
from tera.config.gateway import ConnectionLimits
from tera.manifest import GATEWAY_ONGOING_REQUESTS


def test_connections_are_as_many_as_is_said_or_files_may_be_opened(tmp_path: Path) -> None:
    assert haproxy.Bounds.of({}) == haproxy.Bounds(None, None)
    named = {haproxy.MAX_CONNECTIONS: "16384", haproxy.MAX_CONNECTIONS_PER_SOURCE: "8192"}
    bounds = haproxy.Bounds.of(named)
    assert bounds == haproxy.Bounds(16384, 8192)
    assert bounds.fitting(resource.RLIM_INFINITY) == bounds.fitting(1_048_576) == bounds
    assert bounds.fitting(20_000) == haproxy.Bounds(7_920, 8192)
    config = rendered(tmp_path, 1)
    haproxy.complete_file(config, {**named, haproxy.MAX_CONNECTIONS: "100"})
    assert re.findall("^ *maxconn (.*)$", config.read_text(), re.MULTILINE) == ["100"]


async def test_it_starts_where_few_files_may_be_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(haproxy.MAX_CONNECTIONS, "16384")
    config = rendered(tmp_path, None)
    process = await asyncio.create_subprocess_exec(
        *("sh", "-c", 'ulimit -n 1000 && exec "$@"', "sh"),
        *(sys.executable, "-m", "tera.haproxy", "-db", "-f", str(config)),
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        await connect(port(config), process)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
    assert "maxconn 320\n" in config.read_text()


def test_the_default_is_above_the_streams_that_a_gateway_is_sized_for() -> None:
    bounds = ConnectionLimits()
    assert bounds.max > GATEWAY_ONGOING_REQUESTS
    assert 2 * bounds.per_source <= bounds.max  # nobody has all of them


async def test_it_becomes_the_real_haproxy_under_the_process_id_that_ray_knows(
    tmp_path: Path, gateway: int
) -> None:
    config = rendered(tmp_path, gateway)
    async with running(config) as process:
        command = psutil.Process(process.pid).cmdline()
        listening = psutil.Process(process.pid).net_connections("tcp")
    assert Path(command[0]).name == "haproxy"
    assert command[1:] == ["-db", "-f", str(config)]  # by which Ray finds its own processes
    hosts = {entry.laddr.ip for entry in listening if entry.status == psutil.CONN_LISTEN}
    assert hosts == {"127.0.0.1"}


async def test_a_reload_takes_over_from_the_old_process(tmp_path: Path, gateway: int) -> None:
    config = rendered(tmp_path, gateway)
    async with running(config) as old:
        socket_path = str(tmp_path / "admin.sock")
        async with running(config, "-sf", str(old.pid), "-x", socket_path):
            assert await asyncio.wait_for(old.wait(), 20) == 0


def test_a_file_is_completed_once(tmp_path: Path) -> None:
    config = rendered(tmp_path, 1)
    haproxy.complete_file(config, {})
    once = config.read_text()
    haproxy.complete_file(config, {})
    assert config.read_text() == once


def test_the_completed_file_keeps_tokens_flowing_and_bounds_slow_headers(tmp_path: Path) -> None:
    config = rendered(tmp_path, 1)
    haproxy.complete_file(config, {})
    text = config.read_text()
    assert "option http-no-delay" in text
    assert "timeout http-request 30s" in text
    assert re.findall("timeout client (.*)", text) == ["60s"]
    assert "mode 600 level admin" in text
    assert "bind *:" in text  # without TERA_HOST the addresses are Ray's


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("frontend http_frontend", "frontend other"),
        lambda text: text.replace("if routes", "if listed"),
        lambda text: text.replace("acl routes", "acl listed"),
        lambda text: text.replace("backend default_backend", "backend none"),
    ],
    ids=["frontend", "routes", "acl", "default"],
)
def test_a_file_of_another_ray_is_refused(tmp_path: Path, change: Callable[[str], str]) -> None:
    config = rendered(tmp_path, 1)
    config.write_text(change(config.read_text()))
    with pytest.raises(haproxy.UnknownTemplateError, match="Ray"):
        haproxy.complete_file(config, {})


async def test_other_commands_go_to_the_real_haproxy_as_they_are() -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tera.haproxy", "-v"), stdout=asyncio.subprocess.PIPE
    )
    output, _ = await process.communicate()
    assert output.startswith(b"HAProxy version")


def test_the_error_page_says_its_own_length() -> None:
    head, _, body = haproxy._ERROR_PAGE.partition("\r\n\r\n")
    assert f"content-length: {len(body.encode())}" in head
    json.loads(body)


# What Ray's manager of HAProxy is to HAProxy.
PARENT = """
import subprocess, sys
subprocess.run([sys.executable, "-m", "tera.haproxy", "-db", "-f", sys.argv[1]])
"""


async def test_without_its_parent_it_listens_no_more_and_ends(tmp_path: Path) -> None:
    config = rendered(tmp_path, backend_port=None)
    parent = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", PARENT, str(config)), stderr=asyncio.subprocess.DEVNULL
    )
    await connect(port(config), parent)
    (proxy,) = psutil.Process(parent.pid).children()
    try:
        parent.kill()
        await parent.wait()
        await asyncio.to_thread(proxy.wait, 10)
    finally:
        if proxy.is_running():
            proxy.kill()

import asyncio
import json
import re
import socket
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import psutil
import pytest
from ray.serve._private.haproxy import (
    BackendConfig,
    HAProxyApi,
    HAProxyConfig,
    ServerConfig,
)
from ray.serve.config import HTTPOptions

from tera import haproxy

JSON = "application/json"
OUR_ID = f"req_{'0' * 32}"

# What a gateway replica, or Ray inside it, may answer: status, content type, body, request ids.
ANSWERS = {
    "/v1/models": (200, JSON, "{}", [OUR_ID]),
    "/limited": (429, JSON, "{}", [OUR_ID]),
    "/metrics": (200, "text/plain", "up 1", [OUR_ID]),
    "/two-ids": (200, JSON, "{}", [OUR_ID, "chosen by the client"]),
    "/foreign-id": (200, JSON, "{}", ["chosen by the client"]),
    "/unparsed": (400, "text/plain", "Invalid HTTP request received.", []),
    "/lost": (404, "text/plain", "Path '/lost' not found. Ping ...", ["5a"]),
    "/timed-out": (408, "text/plain", "Request 5a timed out", ["5a"]),
    "/dropped": (503, "text/plain", "Request dropped due to backpressure", ["5a"]),
    "/dropped-json": (503, JSON, '{"detail": "gone"}', [OUR_ID]),
    "/crashed": (500, "text/plain", "Internal Server Error", []),
}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _rendered(directory: Path, backend_port: int | None) -> Path:
    """Have Ray render its configuration, with one gateway replica or none."""
    options = HAProxyConfig(
        http_options=HTTPOptions(host="0.0.0.0", port=_free_port()),  # noqa: S104  as Serve does
        socket_path=str(directory / "admin.sock"),
        server_state_base=str(directory),
        server_state_file=str(directory / "server-state"),
        metrics_enabled=False,
        metrics_port=_free_port(),
        stats_port=_free_port(),
        retries=0,
        has_received_routes=True,
        is_head=True,
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


def _port(config: Path) -> int:
    found = re.search(r"frontend http_frontend\n *bind \S*:(\d+)", config.read_text())
    assert found
    return int(found[1])


async def _connect(port: int, process: asyncio.subprocess.Process) -> None:
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
async def _running(config: Path, *arguments: str) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tera.haproxy", "-db", "-f", str(config), *arguments),
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        await _connect(_port(config), process)
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERA_HOST", "127.0.0.1")
    # As in production: it names the program under test, which must not start itself.
    monkeypatch.setenv("RAY_SERVE_HAPROXY_BINARY_PATH", sys.executable)


@pytest.fixture
def seen() -> list[str]:
    """The head of each request that has reached the gateway."""
    return []


@pytest.fixture
async def gateway(seen: list[str]) -> AsyncIterator[int]:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        path = head.split()[1]
        if path == "/-/healthz":
            status, kind, body, ids = 200, "text/plain", "success", [""]
        else:
            seen.append(head)
            status, kind, body, ids = ANSWERS[path]
        lines = [f"HTTP/1.1 {status} .", f"content-type: {kind}", f"content-length: {len(body)}"]
        lines += [f"x-request-id: {value}" for value in ids]
        writer.write("\r\n".join([*lines, "connection: close", "", body]).encode())
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


@pytest.fixture
async def client(gateway: int, tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    config = _rendered(tmp_path, gateway)
    async with (
        _running(config),
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{_port(config)}") as client,
    ):
        yield client


def _assert_ours(response: httpx.Response, status: int, code: str) -> None:
    assert response.status_code == status
    assert response.headers["content-type"] == JSON
    assert re.fullmatch("req_[0-9a-f]{32}", response.headers["x-request-id"])
    error = response.json()["error"]
    assert error["code"] == code
    assert set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("path", ["/v1/models", "/limited", "/metrics"])
async def test_what_the_gateway_answers_passes_unchanged(
    client: httpx.AsyncClient, path: str
) -> None:
    status, kind, body, _ = ANSWERS[path]
    response = await client.get(path)
    assert (response.status_code, response.headers["content-type"], response.text) == (
        status,
        kind,
        body,
    )
    assert response.headers.get_list("x-request-id") == [OUR_ID]


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        ("/unparsed", 400, "invalid_json"),
        ("/lost", 500, "internal_error"),
        ("/timed-out", 500, "internal_error"),
        ("/dropped", 500, "internal_error"),
        ("/dropped-json", 500, "internal_error"),
        ("/crashed", 500, "internal_error"),
    ],
)
async def test_what_ray_answers_in_the_gateways_place_becomes_our_error(
    client: httpx.AsyncClient, path: str, status: int, code: str
) -> None:
    _assert_ours(await client.get(path), status, code)


async def test_the_gateways_request_id_is_the_only_one(client: httpx.AsyncClient) -> None:
    response = await client.get("/two-ids", headers={"x-request-id": "chosen by the client"})
    assert response.headers.get_list("x-request-id") == [OUR_ID]


async def test_a_request_id_that_the_client_chose_is_not_echoed(client: httpx.AsyncClient) -> None:
    first, second = [await client.get("/foreign-id") for _ in range(2)]
    assert re.fullmatch("req_[0-9a-f]{32}", first.headers["x-request-id"])
    assert first.headers["x-request-id"] != second.headers["x-request-id"]


async def test_headers_that_steer_ray_do_not_reach_it(
    client: httpx.AsyncClient, seen: list[str]
) -> None:
    steering = [
        "X-Request-Timeout-Seconds",
        "x-request-disconnect-disabled",
        "serve_multiplexed_model_id",
        "Serve-Multiplexed-Model-Id",
        "serve-multiplexed_model-id",
        "x-session-id",
        "x_session_id",
        "x-serve-router-replica",
    ]
    await client.get("/v1/models", headers={**dict.fromkeys(steering, "forged"), "x-kept": "yes"})
    assert "x-kept: yes" in seen[0]
    assert "forged" not in seen[0]


@pytest.mark.parametrize(
    "path",
    [
        *("/-/routes", "/%2d/routes", "/-%2Froutes", "/-/route%73", "/%2D%2f%72outes"),
        *("/-/ROUTES", "/-/routes?a=b", "/-/routes/", "/-/other", "/%2d/healthz"),
    ],
)
async def test_a5_rays_own_paths_are_unknown_urls_however_they_are_spelled(
    client: httpx.AsyncClient, path: str, seen: list[str]
) -> None:
    target = {"target": path.encode()}
    _assert_ours(await client.get("/", extensions=target), 404, "unknown_url")
    assert seen == []


async def test_a_request_without_a_path_is_an_unknown_url(client: httpx.AsyncClient) -> None:
    _assert_ours(
        await client.request("OPTIONS", "", extensions={"target": b"*"}), 404, "unknown_url"
    )


async def test_health_stays_for_load_balancers(client: httpx.AsyncClient) -> None:
    assert (await client.get("/-/healthz")).status_code == 200


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"GARBAGE\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: a\r\nlong: " + b"a" * 40_000 + b"\r\n\r\n",
        b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: many\r\n\r\n",
        b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        b"GET / HTTP/1.0\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    ],
    ids=["garbage", "long-header", "length", "transfer-encoding", "chunked-1.0"],
)
async def test_what_is_no_http_gets_a_closed_connection(
    client: httpx.AsyncClient, request_bytes: bytes, seen: list[str]
) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", client.base_url.port)
    writer.write(request_bytes)
    try:
        assert await reader.read() == b""
    except ConnectionResetError:
        pass  # closed with bytes of ours still unread
    finally:
        writer.close()
    assert seen == []


class Silent(asyncio.Protocol):
    """A gateway replica that reads requests and answers none."""

    def __init__(self, head: asyncio.Event, whole: asyncio.Event, left: asyncio.Event) -> None:
        self._head, self._whole, self._left = head, whole, left
        self._request = b""

    def data_received(self, data: bytes) -> None:
        self._request += data
        if self._request.startswith(b"POST"):
            self._head.set()
        if self._request.endswith(b"{}"):
            self._whole.set()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._request.endswith(b"{}"):
            self._left.set()


@pytest.mark.parametrize("apart", [False, True], ids=["one packet", "two packets"])
async def test_s8_a_client_that_hangs_up_is_told_to_a_gateway_that_is_silent(
    tmp_path: Path, apart: bool
) -> None:
    head, whole, left = asyncio.Event(), asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Silent(head, whole, left), "127.0.0.1", 0)
    config = _rendered(tmp_path, server.sockets[0].getsockname()[1])
    request = b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: 2\r\n\r\n"
    async with server, _running(config), asyncio.timeout(20):
        with socket.create_connection(("127.0.0.1", _port(config))) as client:
            client.sendall(request if apart else request + b"{}")
            if apart:  # as the SDK sends it
                await head.wait()
                client.sendall(b"{}")
            await whole.wait()
            assert not left.is_set()
        await left.wait()


async def test_without_a_reachable_gateway_the_answer_is_our_error(tmp_path: Path) -> None:
    config = _rendered(tmp_path, _free_port())
    async with _running(config), httpx.AsyncClient() as client:
        url = f"http://127.0.0.1:{_port(config)}/v1/models"
        first, second = await client.get(url), await client.get(url)
    _assert_ours(first, 500, "internal_error")
    assert first.headers["x-request-id"] != second.headers["x-request-id"]


async def test_before_there_is_a_gateway_the_answer_says_so(tmp_path: Path) -> None:
    config = _rendered(tmp_path, None)
    async with _running(config), httpx.AsyncClient() as client:
        response = await client.get(f"http://127.0.0.1:{_port(config)}/v1/models")
    _assert_ours(response, 500, "internal_error")
    assert "is starting" in response.json()["error"]["message"]


async def test_it_becomes_the_real_haproxy_under_the_process_id_that_ray_knows(
    tmp_path: Path, gateway: int
) -> None:
    config = _rendered(tmp_path, gateway)
    async with _running(config) as process:
        command = psutil.Process(process.pid).cmdline()
        listening = psutil.Process(process.pid).net_connections("tcp")
    assert Path(command[0]).name == "haproxy"
    assert command[1:] == ["-db", "-f", str(config)]  # by which Ray finds its own processes
    hosts = {entry.laddr.ip for entry in listening if entry.status == psutil.CONN_LISTEN}
    assert hosts == {"127.0.0.1"}


async def test_a_reload_takes_over_from_the_old_process(tmp_path: Path, gateway: int) -> None:
    config = _rendered(tmp_path, gateway)
    async with _running(config) as old:
        socket_path = str(tmp_path / "admin.sock")
        async with _running(config, "-sf", str(old.pid), "-x", socket_path):
            assert await asyncio.wait_for(old.wait(), 20) == 0


def test_a_file_is_completed_once(tmp_path: Path) -> None:
    config = _rendered(tmp_path, 1)
    haproxy.complete_file(config, {})
    once = config.read_text()
    haproxy.complete_file(config, {})
    assert config.read_text() == once


def test_the_completed_file_keeps_tokens_flowing_and_bounds_slow_headers(tmp_path: Path) -> None:
    config = _rendered(tmp_path, 1)
    haproxy.complete_file(config, {})
    text = config.read_text()
    assert "option http-no-delay" in text
    assert "timeout http-request 30s" in text
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
    config = _rendered(tmp_path, 1)
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
    config = _rendered(tmp_path, backend_port=None)
    parent = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", PARENT, str(config)), stderr=asyncio.subprocess.DEVNULL
    )
    await _connect(_port(config), parent)
    (proxy,) = psutil.Process(parent.pid).children()
    try:
        parent.kill()
        await parent.wait()
        await asyncio.to_thread(proxy.wait, 10)
    finally:
        if proxy.is_running():
            proxy.kill()

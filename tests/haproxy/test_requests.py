"""What passes through HAProxy, and what it answers itself."""

import asyncio
import re
import socket
from pathlib import Path

import httpx
import pytest
from tests.haproxies import free_port, port, rendered, running
from tests.haproxy.answers import ANSWERS, JSON, OUR_ID

from tera import haproxy


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


async def test_readiness_is_the_gateways(client: httpx.AsyncClient, seen: list[str]) -> None:
    response = await client.get("/readyz")
    assert response.status_code == 200
    assert "connection" not in response.headers
    assert len(seen) == 1


async def test_a_proxy_that_drains_is_not_ready_and_lets_its_clients_go(
    gateway: int, tmp_path: Path, seen: list[str]
) -> None:
    config = rendered(tmp_path, gateway, draining=True)
    async with (
        running(config),
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port(config)}") as client,
    ):
        _assert_ours(await client.get("/readyz"), 500, "internal_error")
        assert seen == []
        # Who is connected already is served, and told to connect elsewhere.
        response = await client.get("/v1/models")
        assert response.status_code == 200
        assert response.headers["connection"] == "close"


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
    config = rendered(tmp_path, server.sockets[0].getsockname()[1])
    request = b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: 2\r\n\r\n"
    async with server, running(config), asyncio.timeout(20):
        with socket.create_connection(("127.0.0.1", port(config))) as client:
            client.sendall(request if apart else request + b"{}")
            if apart:  # as the SDK sends it
                await head.wait()
                client.sendall(b"{}")
            await whole.wait()
            assert not left.is_set()
        await left.wait()


async def test_a_connection_is_closed_with_a_401(client: httpx.AsyncClient) -> None:
    request = b"GET %b HTTP/1.1\r\nhost: a\r\n\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", client.base_url.port)
    for path in (b"/v1/models", b"/refused"):
        writer.write(request % path)
        head = await reader.readuntil(b"\r\n\r\n")
        assert await reader.readexactly(2) == b"{}"
    assert b"connection: close" in head
    assert await reader.read() == b""
    writer.close()


async def test_a_websocket_is_answered_as_a_request_without_that_wish(
    client: httpx.AsyncClient, seen: list[str]
) -> None:
    wish = {"connection": "upgrade", "upgrade": "websocket", "sec-websocket-version": "13"}
    answer = await client.get(
        "/v1/models", headers={**wish, "sec-websocket-key": "dGhlIHNhbXBsZSBub25jZQ=="}
    )
    assert answer.status_code == 200
    assert "\r\nupgrade:" not in seen[0].lower()


UNFINISHED = [
    pytest.param(b"", "timeout http-request 30s", id="nothing"),
    pytest.param(b"POST /v1/models HTTP/1.1\r\nhost:", "timeout http-request 30s", id="head"),
    pytest.param(
        b"POST /v1/models HTTP/1.1\r\nhost: a\r\ncontent-length: 9\r\n\r\n{",
        "timeout client 60s",
        id="body",
    ),
]


@pytest.mark.parametrize(("sent", "bound"), UNFINISHED)
async def test_a_client_that_sends_no_more_is_let_go(
    tmp_path: Path, gateway: int, sent: bytes, bound: str
) -> None:
    config = rendered(tmp_path, gateway)
    haproxy.complete_file(config, {"TERA_HOST": "127.0.0.1"})
    text = config.read_text()
    assert text.count(bound) == 1
    config.write_text(text.replace(bound, f"{bound.rpartition(' ')[0]} 200ms"))
    async with running(config), asyncio.timeout(20):
        reader, writer = await asyncio.open_connection("127.0.0.1", port(config))
        writer.write(sent)
        while await reader.read(65536):
            pass
        writer.close()


async def test_an_answer_may_take_longer_than_a_client_may_be_silent(tmp_path: Path) -> None:
    let_go = asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        await let_go.wait()
        writer.write(b"HTTP/1.1 200 .\r\nconnection: close\r\ncontent-length: 2\r\n\r\n{}")
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    config = rendered(tmp_path, server.sockets[0].getsockname()[1])
    haproxy.complete_file(config, {"TERA_HOST": "127.0.0.1"})
    config.write_text(config.read_text().replace("timeout client 60s", "timeout client 100ms"))
    async with server, running(config), httpx.AsyncClient() as client, asyncio.timeout(20):
        asked = asyncio.create_task(client.get(f"http://127.0.0.1:{port(config)}/v1/models"))
        # Many times as long: whoever is silent there is let go.
        reader, writer = await asyncio.open_connection("127.0.0.1", port(config))
        writer.write(b"POST /v1/models HTTP/1.1\r\nhost: a\r\ncontent-length: 9\r\n\r\n{")
        for _ in range(5):
            await reader.read()
        writer.close()
        assert not asked.done()
        let_go.set()
        assert (await asked).status_code == 200


async def test_one_source_cannot_have_all_connections(
    tmp_path: Path, gateway: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(haproxy.MAX_CONNECTIONS_PER_SOURCE, "3")
    request = b"GET /v1/models HTTP/1.1\r\nhost: a\r\n\r\n"

    async def answered(source: str) -> bool:
        try:
            reader, writer = await asyncio.open_connection(
                "127.0.0.1", port(config), local_addr=(source, 0)
            )
            kept.append(writer)
            writer.write(request)
            return bool(await reader.read(65536))
        except ConnectionResetError:
            return False

    kept: list[asyncio.StreamWriter] = []
    config = rendered(tmp_path, gateway)
    async with running(config), asyncio.timeout(20):
        assert [await answered("127.0.0.2") for _ in range(5)] == [True] * 3 + [False] * 2
        assert await answered("127.0.0.3")
        for writer in kept:
            writer.close()


async def test_without_a_reachable_gateway_the_answer_is_our_error(tmp_path: Path) -> None:
    config = rendered(tmp_path, free_port())
    async with running(config), httpx.AsyncClient() as client:
        url = f"http://127.0.0.1:{port(config)}/v1/models"
        first, second = await client.get(url), await client.get(url)
    _assert_ours(first, 500, "internal_error")
    assert first.headers["x-request-id"] != second.headers["x-request-id"]


async def test_before_there_is_a_gateway_the_answer_says_so(tmp_path: Path) -> None:
    config = rendered(tmp_path, None)
    async with running(config), httpx.AsyncClient() as client:
        response = await client.get(f"http://127.0.0.1:{port(config)}/v1/models")
    _assert_ours(response, 500, "internal_error")
    assert "is starting" in response.json()["error"]["message"]

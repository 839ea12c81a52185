"""What somebody without a key, or without haste, can take of the front door.

The real HAProxy, the real HTTP server and the real gateway; no Ray.
"""

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send
from tests.gateway.conftest import CALLER, MODEL, Gateway
from tests.haproxies import port, rendered, running

from tera.config.gateway import GatewayConfig, RequestLimits
from tera.errors import InvalidApiKeyError
from tera.gateway import edge
from tera.tenancy.keys import ApiKey

BODY = json.dumps({"model": MODEL, "prompt": "One", "max_tokens": 2}).encode()


class OneKey:
    """An `Authenticator` that knows one key."""

    def authenticate(self, authorization: str | None) -> ApiKey:
        if authorization != "Bearer known":
            raise InvalidApiKeyError("The API key is not valid.")
        return CALLER


class Door:
    """A gateway behind HAProxy."""

    def __init__(self, gateway: Gateway, http_port: int) -> None:
        self.gateway = gateway
        self._port = http_port

    @asynccontextmanager
    async def posting(self, *lines: str, key: str = "unknown") -> AsyncIterator["Connection"]:
        """Send the head of a completion request, and close the connection in the end."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        head = ["POST /v1/completions HTTP/1.1", "host: a", f"authorization: Bearer {key}", *lines]
        writer.write("\r\n".join([*head, "", ""]).encode("latin-1"))
        try:
            async with asyncio.timeout(20):
                yield Connection(reader, writer)
        finally:
            writer.close()


class Connection:
    """A client's end of a connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def head(self) -> tuple[int, str]:
        """Return the status of what comes next, and its headers as they came."""
        text = (await self._reader.readuntil(b"\r\n\r\n")).decode()
        return int(text.split()[1]), text

    async def answer(self) -> tuple[int, Any]:
        """Return the status of a whole answer, and its JSON."""
        status, text = await self.head()
        [length] = [line for line in text.split("\r\n") if line.startswith("content-length: ")]
        return status, json.loads(await self._reader.readexactly(int(length.split()[1])))

    def send(self, data: bytes) -> None:
        self._writer.write(data)

    async def send_until_closed(self, piece: bytes) -> None:
        """Send piece by piece, slowly, until the other end wants no more."""
        ending = asyncio.create_task(self._ended())
        while not ending.done():
            self._writer.write(piece)
            await asyncio.wait([ending], timeout=0.01)
        await ending

    async def _ended(self) -> None:
        with suppress(ConnectionError):  # closed with bytes of ours still unread
            assert await self._reader.read() == b""


def behind_serve(app: ASGIApp) -> ASGIApp:
    """Return an application as Serve's replica has it, which answers health checks by itself."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        healthy = scope["path"] == "/-/healthz"
        await (Response("success") if healthy else app)(scope, receive, send)

    return answer


@pytest.fixture
async def door(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Door]:
    monkeypatch.setenv("TERA_HOST", "127.0.0.1")
    monkeypatch.setattr(edge, "LINGER_S", 0.5)
    async with Gateway(keys=OneKey()) as gateway:
        limits = RequestLimits(body_deadline_seconds=0.5, max_body_bytes=4096)
        gateway.config = GatewayConfig(requests=limits)
        options = uvicorn.Config(
            behind_serve(gateway.app), port=0, lifespan="off", log_level="error"
        )
        server = uvicorn.Server(options)
        serving = asyncio.create_task(server.serve())
        while not server.started:  # noqa: ASYNC110  it has no event
            await asyncio.sleep(0.01)
        config = rendered(tmp_path, server.servers[0].sockets[0].getsockname()[1])
        try:
            async with running(config):
                yield Door(gateway, port(config))
        finally:
            server.should_exit = True
            await serving


ENDLESS = [
    pytest.param("content-length: 50000000", b" ", id="length"),
    pytest.param("transfer-encoding: chunked", b"1\r\n \r\n", id="chunked"),
]


@pytest.mark.parametrize(("framing", "piece"), ENDLESS)
async def test_without_a_key_a_body_that_never_ends_keeps_no_connection(
    door: Door, framing: str, piece: bytes
) -> None:
    async with door.posting(framing) as connection:
        status, body = await connection.answer()
        assert (status, body["error"]["code"]) == (401, "invalid_api_key")
        await connection.send_until_closed(piece)


@pytest.mark.parametrize(("framing", "piece"), ENDLESS)
async def test_a_body_that_never_ends_is_refused_and_holds_nothing(
    door: Door, framing: str, piece: bytes
) -> None:
    if framing.startswith("content-length"):
        framing = "content-length: 4096"  # over the limit it would be refused at once
    async with door.posting(framing, key="known") as connection:
        connection.send(piece)
        status, body = await connection.answer()
        assert (status, body["error"]["code"]) == (400, "invalid_json")
        assert "within 0.5 seconds" in body["error"]["message"]
        await connection.send_until_closed(piece)
    assert door.gateway.admitter.running == {}
    assert door.gateway.admitter.settled == []


@pytest.mark.parametrize("key", ["known", "unknown"])
async def test_a_refusal_reaches_a_client_that_sends_all_of_its_body_first(
    door: Door, key: str
) -> None:
    size = 1_000_000
    async with door.posting(f"content-length: {size}", key=key) as connection:
        for _ in range(size // 10_000):
            connection.send(b" " * 10_000)
            await asyncio.sleep(0)
        status, _ = await connection.answer()
    assert status == (413 if key == "known" else 401)


async def test_h1_nobody_is_told_to_go_on_before_the_key_is_accepted(door: Door) -> None:
    expecting = (f"content-length: {len(BODY)}", "expect: 100-continue")
    async with door.posting(*expecting) as connection:
        assert (await connection.head())[0] == 401
    async with door.posting(*expecting, key="known") as connection:
        assert (await connection.head())[0] == 100
        connection.send(BODY)
        assert (await connection.answer())[0] == 200


@pytest.mark.parametrize(
    ("sent", "logged"),
    [
        pytest.param("mine", "'mine'", id="plain"),
        pytest.param("a\x85 b\x1b[0m", "'a\\x85 b%1B[0m'", id="control characters"),
        pytest.param("x" * 5000, f"'{'x' * 128}'", id="long"),
        pytest.param("first, x\r\nx-request-id: second", "'second'", id="two"),
    ],
)
async def test_h3_a_clients_own_id_is_in_the_log_once_bounded_and_escaped(
    door: Door, caplog: pytest.LogCaptureFixture, sent: str, logged: str
) -> None:
    caplog.set_level(logging.INFO)
    lines = (f"content-length: {len(BODY)}", f"x-request-id: {sent}")
    async with door.posting(*lines) as connection:
        assert (await connection.head())[0] == 401
    async with door.posting(*lines, key="known") as connection:
        connection.send(BODY)
        status, head = await connection.head()
    assert status == 200
    [ours] = [line for line in head.split("\r\n") if line.startswith("x-request-id: ")]
    [message] = [each for each in caplog.messages if "calls it" in each]
    assert message == f"The client of request {ours.split()[1]} calls it {logged}."


async def test_h3_an_id_that_the_client_did_not_choose_is_not_logged_as_its_own(
    door: Door, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    forged = "x-tera-client-request-id: forged"
    async with door.posting(f"content-length: {len(BODY)}", forged, key="known") as connection:
        connection.send(BODY)
        assert (await connection.answer())[0] == 200
    assert not [each for each in caplog.messages if "calls it" in each]


async def test_a_websocket_gets_the_error_of_the_method(door: Door) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", door._port)
    writer.write(
        b"GET /v1/completions HTTP/1.1\r\nhost: a\r\nconnection: Upgrade\r\nupgrade: websocket\r\n"
        b"sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\nsec-websocket-version: 13\r\n\r\n"
    )
    status, body = await Connection(reader, writer).answer()
    writer.close()
    assert (status, body["error"]["code"]) == (405, "method_not_allowed")

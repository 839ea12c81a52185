import asyncio
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from tests.haproxies import port, rendered, running
from tests.haproxy.answers import ANSWERS


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
    config = rendered(tmp_path, gateway)
    async with (
        running(config),
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port(config)}") as client,
    ):
        yield client

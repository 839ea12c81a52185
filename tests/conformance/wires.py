"""Raw bytes to and from HAProxy."""

import json
import re
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tests.conformance.gateways import PlatformGateway


@dataclass
class Answer:
    """One answer as it came over the wire."""

    status: int
    headers: dict[str, str]
    """By lower-case name."""
    body: bytes


class Wire:
    """One connection."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=60)
        self._reader = self.socket.makefile("rb")

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def head(self) -> tuple[int, dict[str, str]]:
        """Return the next answer's status and headers."""
        match = re.fullmatch(rb"HTTP/1\.[01] (\d{3}) .*\r\n", self._reader.readline())
        assert match
        headers: dict[str, str] = {}
        while (line := self._reader.readline()) != b"\r\n":
            assert line.endswith(b"\r\n")
            name, _, value = line.decode().partition(":")
            assert name.lower() not in headers, f"{name} came twice"
            headers[name.lower()] = value.strip()
        return int(match[1]), headers

    def chunk(self) -> bytes:
        """Return the data of the next chunk; empty at the end."""
        size = self._reader.readline()
        assert re.fullmatch(rb"[0-9a-fA-F]+\r\n", size), size
        data = self._reader.read(int(size, 16))
        assert self._reader.readline() == b"\r\n"
        return data

    def answer(self) -> Answer:
        """Return the next answer, whole."""
        status, headers = self.head()
        if headers.get("transfer-encoding") == "chunked":
            assert "content-length" not in headers
            body = b"".join(iter(self.chunk, b""))
        elif "content-length" in headers:
            body = self._reader.read(int(headers["content-length"]))
        else:
            body = self._reader.read()
        return Answer(status, headers, body)

    def rest(self) -> bytes:
        """Return all that comes until the connection is closed."""
        try:
            return self._reader.read()
        except ConnectionResetError:  # closed with bytes of ours still unread
            return b""

    def reset(self) -> None:
        """Break the connection at once, as a crash does."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close()

    def close(self) -> None:
        self._reader.close()
        self.socket.close()


@contextmanager
def wire(gateway: PlatformGateway) -> Iterator[Wire]:
    connection = Wire(gateway.platform.port)
    try:
        yield connection
    finally:
        connection.close()


def head(
    gateway: PlatformGateway, *lines: str, key: str | None = None, version: str = "1.1"
) -> str:
    """Return the head of a completion request, without what ends it."""
    return "\r\n".join(
        [
            f"POST /v1/completions HTTP/{version}",
            "Host: gateway",
            f"Authorization: Bearer {key or gateway.key}",
            "Content-Type: application/json",
            *lines,
        ]
    )


def post(gateway: PlatformGateway, body: Any, *lines: str, version: str = "1.1") -> bytes:
    """Return a whole completion request."""
    content = json.dumps(body).encode()
    length = f"Content-Length: {len(content)}"
    return f"{head(gateway, length, *lines, version=version)}\r\n\r\n".encode() + content

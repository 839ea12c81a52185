"""A cheap closed-loop load generator for streamed completions; runs as a process of its own.

It reads a `Load` as one line of JSON, connects, writes a line, and begins when it is given
another; its last line is an `Outcome`. So whoever measures CPU time can read it exactly at the
first request and after the last answer.
"""

import asyncio
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import msgspec
import uvloop

DEADLINE_S = 240.0
"""A load that has not ended by then has failed."""

_LAST_CHUNK = b"\r\n0\r\n\r\n"
_CONTENT_LENGTH = re.compile(rb"content-length: (\d+)", re.IGNORECASE)
_COMPLETION_TOKENS = re.compile(rb'"completion_tokens":\s*(\d+)')


class Load(msgspec.Struct, frozen=True):
    """What to ask of a server, and how much."""

    port: int
    api_key: str
    bodies: list[str]
    """JSON bodies of requests; taken in order, and again from the start."""
    clients: int
    requests: int
    """No more than these are sent."""
    seconds: float = DEADLINE_S
    """No request is sent after this time."""
    stream: bool = True
    """Whether the bodies ask for streams, which they have to with usage."""


class Outcome(msgspec.Struct, frozen=True):
    """What the clients saw; times are seconds."""

    requests: int
    wall_s: float
    completion_tokens: int
    events: int
    """Events with text; fewer than tokens where a character takes several."""
    first_token_p50_s: float
    first_token_mean_s: float
    request_p50_s: float
    request_p99_s: float
    client_cpu_s: float


class LoadError(Exception):
    """A request failed, so the run measures nothing."""


class _Run:
    """What all clients share."""

    def __init__(self, load: Load) -> None:
        head = (
            "POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
            f"authorization: Bearer {load.api_key}\r\ncontent-length: "
        )
        encoded = [body.encode() for body in load.bodies]
        self._requests = [f"{head}{len(body)}\r\n\r\n".encode() + body for body in encoded]
        self._load = load
        self.stream = load.stream
        self._sent = 0
        self._began = 0.0
        self._open = load.clients
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.first_token_s: list[float] = []
        self.request_s: list[float] = []
        self.completion_tokens = 0
        self.events = 0

    def begin(self) -> None:
        self._began = time.perf_counter()

    def next_request(self) -> bytes | None:
        late = time.perf_counter() - self._began > self._load.seconds
        if self._sent >= self._load.requests or late:
            self._open -= 1
            if not self._open and not self.done.done():
                self.done.set_result(None)
            return None
        request = self._requests[self._sent % len(self._requests)]
        self._sent += 1
        return request

    def fail(self, reason: str) -> None:
        if not self.done.done():
            self.done.set_exception(LoadError(reason))

    def outcome(self) -> Outcome:
        request_s = sorted(self.request_s)
        return Outcome(
            requests=len(request_s),
            wall_s=time.perf_counter() - self._began,
            completion_tokens=self.completion_tokens,
            events=self.events,
            first_token_p50_s=statistics.median(self.first_token_s),
            first_token_mean_s=statistics.fmean(self.first_token_s),
            request_p50_s=statistics.median(request_s),
            request_p99_s=request_s[int(0.99 * (len(request_s) - 1))],
            client_cpu_s=0.0,
        )


class _Client(asyncio.Protocol):
    """One kept-alive connection with one request at a time."""

    def __init__(self, run: _Run) -> None:
        self._run = run
        self._pieces: list[bytes] = []
        self._sent_at = self._first_at = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: asyncio.Transport = transport  # type: ignore[assignment]
        self._marks = (b"data: {", b"[DONE]") if self._run.stream else (b"{", b"usage")

    def send(self) -> None:
        request = self._run.next_request()
        self._pieces.clear()
        self._first_at = 0.0
        self._sent_at = time.perf_counter()
        if request is not None:
            self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        if not self._first_at and self._marks[0] in data:
            self._first_at = time.perf_counter()
        self._pieces.append(data)
        if not self._run.stream:
            self._read_whole()
            return
        # JSON escapes carriage returns and no header is «0», so only the last chunk looks so.
        end = data if len(data) >= len(_LAST_CHUNK) else b"".join(self._pieces[-7:])
        if end.endswith(_LAST_CHUNK):
            self._finish(b"".join(self._pieces))
        elif not self._pieces[0].startswith(b"HTTP/1.1 200"):
            self._run.fail(data.decode(errors="replace"))

    def _read_whole(self) -> None:
        """Finish once an answer is as long as it says."""
        head, _, body = b"".join(self._pieces).partition(b"\r\n\r\n")
        length = _CONTENT_LENGTH.search(head)
        if length is not None and len(body) >= int(length[1]):
            self._finish(body)
        elif not self._pieces[0].startswith(b"HTTP/1.1 200"):
            self._run.fail(head.decode(errors="replace"))

    def connection_lost(self, exc: Exception | None) -> None:
        self._run.fail(f"the server closed a connection: {exc}")

    def _finish(self, answer: bytes) -> None:
        run = self._run
        found = _COMPLETION_TOKENS.findall(answer)
        if not found or self._marks[1] not in answer:
            run.fail(f"an answer without usage or end: {answer[-300:]!r}")
            return
        run.first_token_s.append(self._first_at - self._sent_at)
        run.request_s.append(time.perf_counter() - self._sent_at)
        run.completion_tokens += int(found[-1])
        run.events += answer.count(b"data: {") - 1  # the last one is usage
        self.send()


async def _run(load: Load, on_ready: Callable[[], None]) -> Outcome:
    loop = asyncio.get_running_loop()
    run = _Run(load)
    clients = []
    for _ in range(load.clients):
        _, client = await loop.create_connection(lambda: _Client(run), "127.0.0.1", load.port)
        clients.append(client)
    on_ready()
    cpu_s = time.process_time()
    run.begin()
    for client in clients:
        client.send()
    async with asyncio.timeout(DEADLINE_S):
        await run.done
    return msgspec.structs.replace(run.outcome(), client_cpu_s=time.process_time() - cpu_s)


class LoadProcess:
    """The generator's process, seen from the one that measures.

    Entering returns once all clients are connected, and `run` sends the load.
    """

    def __init__(self, load: Load) -> None:
        self._load = load

    def __enter__(self) -> "LoadProcess":
        """Start the process and connect.

        Raises:
            LoadError: the server does not listen.
        """
        self._process = subprocess.Popen(  # noqa: S603  our own interpreter and module
            [sys.executable, "-m", __name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self._process.stdin is not None
        self._process.stdin.write(msgspec.json.encode(self._load) + b"\n")
        self._process.stdin.flush()
        self._read_line()
        return self

    def run(self) -> Outcome:
        """Send the load and return what came of it.

        Raises:
            LoadError: a request failed.
        """
        assert self._process.stdin is not None
        self._process.stdin.write(b"go\n")
        self._process.stdin.flush()
        return msgspec.json.decode(self._read_line(), type=Outcome)

    def __exit__(self, *exc: object) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()

    def _read_line(self) -> bytes:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise LoadError("the load generator failed; its reason is above")
        return line


def _main() -> None:
    load = msgspec.json.decode(sys.stdin.buffer.readline(), type=Load)

    def ready() -> None:
        print("ready", flush=True)
        sys.stdin.readline()

    sys.stdout.write(msgspec.json.encode(uvloop.run(_run(load, ready))).decode() + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    _main()

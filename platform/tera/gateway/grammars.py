"""Compiles the grammars of structured output before an engine sees them."""

import asyncio
import hashlib
import secrets
import socket
import subprocess
import sys
import tempfile
from collections import OrderedDict
from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple

import msgspec

from tera.errors import InternalError
from tera.gateway import grammar_compiler
from tera.gateway.fair_pool import FairPool
from tera.gateway.grammar_compiler import BEGUN, COMPILE, CPU_S, MEMORY_BYTES, VOCABULARY, WALL_S

AT_ONCE = 2
"""Grammars that compile at the same time, of different tenants."""

REMEMBERED = 4096
"""Results that are kept, of some 100 bytes each."""

MOST_WAITING_BYTES = 16 * 1024 * 1024
"""Bytes of requests that wait for a compilation: 256 ordinary ones, or one of the largest."""

LEAST_WAITING_BYTES = 64 * 1024
"""What a waiting request counts at least: beside its text there are its connection and objects."""

_START_S = 120
"""How long loading xgrammar may take: 6 s of CPU, more by the clock on a busy machine."""

TOO_COSTLY = (
    f"it takes more than {CPU_S} s or {MEMORY_BYTES // 1024**2} MiB to compile; simplify it"
)


class Fault(NamedTuple):
    """Why a grammar cannot be sent to an engine."""

    reason: str
    unsupported: bool
    """It is valid, but the engine's backend would not enforce all of it."""


class Outcome(msgspec.Struct, frozen=True):
    """The answer of a compiling process."""

    fault: str | None
    ignored: list[str]


class Vocabulary:
    """A model's tokens in xgrammar's form; made for the first grammar, which takes a second."""

    def __init__(self, make: Callable[[], str]) -> None:
        self.name = secrets.token_hex(16)
        self._make = make

    @cached_property
    def serialised(self) -> str:
        """The `TokenizerInfo` of xgrammar, as JSON."""
        return self._make()


class Compiler:
    """The process of `grammar_compiler`, started when the first grammar comes."""

    def __init__(self) -> None:
        self._control: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._told: set[str] = set()
        self._starting = asyncio.Lock()

    async def compile(self, vocabulary: Vocabulary, kind: str, text: str) -> Outcome | None:
        """Compile a grammar; None means that it used up its time or memory, or crashed.

        Raises:
            InternalError: there is no process to compile it.
        """
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                await self._ask(vocabulary, theirs)
            reader, writer = await asyncio.open_unix_connection(sock=ours)
        except OSError as error:
            ours.close()
            raise self._unavailable() from error
        except BaseException:
            ours.close()
            raise
        try:
            asked = {"vocabulary": vocabulary.name, "kind": kind, "text": text}
            writer.write(msgspec.json.encode(asked))
            writer.write_eof()
            async with asyncio.timeout(_START_S + WALL_S):
                answer = await reader.read()
        except (TimeoutError, OSError):
            answer = b""
        finally:
            writer.close()
        if not answer.startswith(BEGUN):
            raise self._unavailable()
        told = answer.removeprefix(BEGUN)
        return msgspec.json.decode(told, type=Outcome) if told else None

    async def _ask(self, vocabulary: Vocabulary, connection: socket.socket) -> None:
        async with self._starting:
            control = self._control
            if control is None or self._process is None or self._process.poll() is not None:
                control = self._start()
            if vocabulary.name not in self._told:
                serialised = await asyncio.to_thread(lambda: vocabulary.serialised)
                with tempfile.TemporaryFile("w+", encoding="utf-8") as file:
                    file.write(serialised)
                    file.seek(0)
                    message = VOCABULARY + vocabulary.name.encode()
                    socket.send_fds(control, [message], [file.fileno()])
                self._told.add(vocabulary.name)
            socket.send_fds(control, [COMPILE], [connection.fileno()])

    def _start(self) -> socket.socket:
        self.close()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            # By its file, since it imports nothing of Tera, and none of the files beside it.
            command = [sys.executable, "-P", grammar_compiler.__file__]
            self._process = subprocess.Popen(  # noqa: S603  our own interpreter and module
                command, stdin=theirs.fileno()
            )
        self._control = ours
        return ours

    def _unavailable(self) -> InternalError:
        self.close()  # the next grammar starts another
        return InternalError("Structured output is not available at the moment.")

    def close(self) -> None:
        """End the process; a grammar that is being compiled gets no result."""
        if self._control is not None:
            self._control.close()
        if self._process is not None:
            self._process.kill()  # so that waiting for it takes no time
            self._process.wait()
        self._control = self._process = None
        self._told.clear()


class Grammars:
    """Knows which grammars compile; each is compiled once, in a process that it may crash.

    Each tenant has one grammar compiled at a time, so a tenant's slow ones delay only its own; how
    many requests may wait is bounded as in `FairPool`. Results are kept per tenant: if they were
    shared, response times would reveal to one tenant what another has sent.
    """

    def __init__(
        self, compiler: Compiler | None = None, most_waiting_bytes: int = MOST_WAITING_BYTES
    ) -> None:
        self._compiler = compiler or Compiler()
        self._known: OrderedDict[bytes, Fault | None] = OrderedDict()
        self._turns = FairPool(AT_ONCE, most_waiting_bytes, "requests for structured output")

    async def check(
        self, tenant: str, vocabulary: Vocabulary, kind: str, text: str, size_bytes: int = 0
    ) -> Fault | None:
        """Return why a grammar cannot be sent to an engine; None if it can.

        If the client leaves while it is compiled, that goes on and keeps the tenant's turn.

        Args:
            tenant: who sends it.
            vocabulary: the model's.
            kind: as in `Sampling.structured`.
            text: exactly what the engine compiles.
            size_bytes: of the request, which is in memory while it waits.

        Raises:
            EngineOverloadedError: too many requests wait already; see its `retry_after_s`.
            InternalError: there is no process to compile it.
        """
        key = hashlib.sha256("\0".join([tenant, vocabulary.name, kind, text]).encode()).digest()
        if key in self._known:
            return self._recalled(key)

        def begin() -> asyncio.Future[Fault | None]:
            return asyncio.ensure_future(self._found_out(key, vocabulary, kind, text))

        return await self._turns.run(tenant, max(size_bytes, LEAST_WAITING_BYTES), begin)

    async def _found_out(
        self, key: bytes, vocabulary: Vocabulary, kind: str, text: str
    ) -> Fault | None:
        if key in self._known:  # the same, sent many times at once
            return self._recalled(key)
        outcome = await self._compiler.compile(vocabulary, kind, text)
        if outcome is None:
            return Fault(TOO_COSTLY, unsupported=False)  # not kept: the machine may be busy
        self._known[key] = fault = _fault(outcome)
        while len(self._known) > REMEMBERED:
            self._known.popitem(last=False)
        return fault

    def _recalled(self, key: bytes) -> Fault | None:
        self._known.move_to_end(key)
        return self._known[key]

    def close(self) -> None:
        """Let the compiling process end."""
        self._compiler.close()


def _fault(outcome: Outcome) -> Fault | None:
    if outcome.fault is not None:
        return Fault(outcome.fault, unsupported="not support" in outcome.fault)
    return Fault(outcome.ignored[0], unsupported=True) if outcome.ignored else None

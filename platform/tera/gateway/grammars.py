"""Compiles the grammars of structured output before an engine sees them."""

import asyncio
import hashlib
import secrets
import socket
import subprocess
import sys
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from functools import cached_property
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import msgspec

from tera.errors import InternalError
from tera.gateway import grammar_compiler
from tera.gateway.grammar_compiler import BEGUN, COMPILE, CPU_S, MEMORY_BYTES, VOCABULARY, WALL_S

AT_ONCE = 2
"""Grammars that compile at the same time, of different tenants."""

REMEMBERED = 4096
"""Results that are kept, of some 100 bytes each."""

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

    Each tenant has one grammar compiled at a time, so a tenant's slow ones delay only its own.
    Results are kept per tenant: if they were shared, response times would reveal to one tenant
    what another has sent.
    """

    def __init__(self, compiler: Compiler | None = None) -> None:
        self._compiler = compiler or Compiler()
        self._known: OrderedDict[bytes, Fault | None] = OrderedDict()
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._slots = asyncio.Semaphore(AT_ONCE)

    async def check(
        self, tenant: str, vocabulary: Vocabulary, kind: str, text: str
    ) -> Fault | None:
        """Return why a grammar cannot be sent to an engine; None if it can.

        Args:
            tenant: who sends it.
            vocabulary: the model's.
            kind: as in `Sampling.structured`.
            text: exactly what the engine compiles.

        Raises:
            InternalError: there is no process to compile it.
        """
        key = hashlib.sha256("\0".join([tenant, vocabulary.name, kind, text]).encode()).digest()
        if key in self._known:
            return self._recalled(key)
        turn = self._turns.setdefault(tenant, asyncio.Lock())
        await turn.acquire()
        if key in self._known:  # the same, sent many times at once
            turn.release()
            return self._recalled(key)
        try:
            await self._slots.acquire()
        except BaseException:
            turn.release()
            raise
        return await self._begun(turn, self._found_out(key, vocabulary, kind, text))

    async def _found_out(
        self, key: bytes, vocabulary: Vocabulary, kind: str, text: str
    ) -> Fault | None:
        outcome = await self._compiler.compile(vocabulary, kind, text)
        if outcome is None:
            return Fault(TOO_COSTLY, unsupported=False)  # not kept: the machine may be busy
        self._known[key] = fault = _fault(outcome)
        while len(self._known) > REMEMBERED:
            self._known.popitem(last=False)
        return fault

    async def _begun(
        self, turn: asyncio.Lock, compile_: Coroutine[Any, Any, Fault | None]
    ) -> Fault | None:
        """Run a compilation, and free the turn and the slot when it ends.

        If the client leaves, the compilation goes on and holds them until then.
        """

        def ended(task: asyncio.Task[Fault | None]) -> None:
            self._slots.release()
            turn.release()
            if not task.cancelled():
                task.exception()  # retrieved, even if nobody waits for it any more

        compiling = asyncio.create_task(compile_)
        compiling.add_done_callback(ended)
        return await asyncio.shield(compiling)

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

"""Compiles grammars, each in a process of its own; run as a program by `grammars.Compiler`.

A client's schema can make xgrammar take minutes and gigabytes, or overflow its stack. This process
loads xgrammar once and forks for each grammar, so a child that crashes costs milliseconds, and the
kernel ends one that uses up its time or memory. It has a single thread, because it forks, and ends
when the gateway that started it does.
"""

import json
import os
import re
import resource
import signal
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xgrammar import TokenizerInfo

CPU_S = 5
"""Per grammar. The engine then takes as much again, in threads that do not delay its steps."""
WALL_S = 20
"""Per grammar, for when the machine is busy."""
MEMORY_BYTES = 1024**3
"""Per grammar, on top of what the process has when it starts."""

VOCABULARY, COMPILE = b"v", b"c"
"""The kinds of control messages; each comes with a file descriptor."""
BEGUN = b"+"
"""A child's first byte: if it dies after that, the grammar is the reason."""

_BEFORE_MESSAGE = re.compile(r"^\[[\d:]+\] \S+:\d+: ")
"""xgrammar's time, and a path of the machine that it was built on."""
_WARNING = "Warning: "
_ACCEPTABLE = "falling back to anyOf semantics"
"""The one warning that is no reason to refuse: `oneOf` is treated as `anyOf`, as by OpenAI."""


def main() -> None:
    """Serve the control socket, which is standard input, until the gateway closes its end."""
    with socket.socket(fileno=0) as control:
        serve(control)


def serve(control: socket.socket) -> None:
    """Fork for each grammar until the gateway closes its end of the socket."""
    import xgrammar

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # children are reaped by the kernel
    vocabularies: dict[str, TokenizerInfo] = {}
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, 256, 1)
        if not descriptors:
            return
        if message[:1] == VOCABULARY:
            with open(descriptors[0], encoding="utf-8") as file:
                vocabulary = xgrammar.TokenizerInfo.deserialize_json(file.read())
            vocabularies[message[1:].decode()] = vocabulary
        elif os.fork():
            os.close(descriptors[0])
        else:
            control.close()
            _answer(socket.socket(fileno=descriptors[0]), vocabularies)


def _answer(client: socket.socket, vocabularies: "dict[str, TokenizerInfo]") -> None:
    """Compile the grammar that the connection brings, and exit."""
    try:
        _limit()
        client.sendall(BEGUN)
        with client.makefile("rb") as request:
            asked = json.loads(request.read())
        with _warnings() as warnings:
            fault = _fault(vocabularies[asked["vocabulary"]], asked["kind"], asked["text"])
        client.sendall(json.dumps({"fault": fault, "ignored": warnings}).encode())
    finally:
        os._exit(0)


def _limit() -> None:
    os.nice(10)  # the gateway's event loop comes first
    with open("/proc/self/statm", encoding="ascii") as file:
        taken = int(file.read().split()[0]) * resource.getpagesize()
    most = taken + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.alarm(WALL_S)


def _fault(vocabulary: "TokenizerInfo", kind: str, text: str) -> str | None:
    """Return why xgrammar refuses a grammar, or None if it compiles.

    Raises:
        MemoryError: it takes more than `MEMORY_BYTES`.
    """
    import xgrammar

    compiler = xgrammar.GrammarCompiler(vocabulary, max_threads=1, cache_enabled=False)
    try:
        compiled = _compile(compiler, kind, text)
    except (RuntimeError, ValueError, TypeError) as error:
        if "bad_alloc" in str(error):
            raise MemoryError from error
        return plain(str(error))
    mask = xgrammar.allocate_token_bitmask(1, vocabulary.vocab_size)
    xgrammar.GrammarMatcher(compiled).fill_next_token_bitmask(mask)
    # With no token allowed at all, an engine would fail the request at its first step.
    return None if mask.any() else "no text fits it"


def _compile(compiler: Any, kind: str, text: str) -> Any:
    """Compile as vLLM's `XgrammarBackend` does."""
    if kind == "json":
        return compiler.compile_json_schema(text)
    if kind == "structural_tag":
        return compiler.compile_structural_tag(text)
    if kind == "regex":
        return compiler.compile_regex(text)
    return compiler.compile_grammar(text) if "::=" in text else compiler.compile_lark(text)


def plain(message: str) -> str:
    """Return the first line of xgrammar's message, without the place in its source."""
    first = message.strip().splitlines()[0] if message.strip() else "it is not valid"
    return _BEFORE_MESSAGE.sub("", first).rstrip(". ")


@contextmanager
def _warnings() -> Iterator[list[str]]:
    """Collect what xgrammar warns of on standard error; complete when the block ends."""
    ignored: list[str] = []
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as file:
        os.dup2(file.fileno(), 2)
        yield ignored
        file.seek(0)
        lines = [plain(line) for line in file if _WARNING in line and _ACCEPTABLE not in line]
        ignored += dict.fromkeys(line.removeprefix(_WARNING)[:256] for line in lines[:16])


if __name__ == "__main__":
    main()

"""Compiles grammars, each in a process of its own; run as a program by `grammars.Compiler`.

What a client sends can make xgrammar take minutes and gigabytes, or run out of stack and die. This
process loads xgrammar once and forks for each grammar, so that a child that dies of one costs
milliseconds; the kernel ends it when its time or memory is used up. It has one thread, as forking
wants, and ends when the gateway that started it does.
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
"""Of one grammar. An engine takes as much again, in threads that its steps do not wait for."""
WALL_S = 20
"""For those seconds of CPU, on a machine that has other things to do."""
MEMORY_BYTES = 1024**3
"""More than the process has when it begins."""

VOCABULARY, COMPILE = b"v", b"c"
"""What a message on the control socket asks for; with each comes a file or a connection."""
BEGUN = b"+"
"""A child's first byte: what ends from here on ends because of the grammar."""

_BEFORE_MESSAGE = re.compile(r"^\[[\d:]+\] \S+:\d+: ")
"""xgrammar's time, and a path of the machine that it was built on."""
_WARNING = "Warning: "
_ACCEPTABLE = "falling back to anyOf semantics"
"""Of the things that xgrammar warns of, the one that OpenAI does too: `oneOf` is `anyOf`."""


def main() -> None:
    """Serve the control socket, which is the standard input, until its other end is closed."""
    with socket.socket(fileno=0) as control:
        serve(control)


def serve(control: socket.socket) -> None:
    """Fork for each grammar until the control socket's other end is closed."""
    import xgrammar

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody has to wait for a child
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
    """Compile the one grammar that the client sends, and end."""
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
    """Return what xgrammar has against a grammar, or None if it compiles.

    Raises:
        MemoryError: there is not enough.
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
    # An engine that may choose no token at all fails the request at its first step.
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
    """Return the first line of xgrammar's message, without where in its source it comes from."""
    first = message.strip().splitlines()[0] if message.strip() else "it is no schema"
    return _BEFORE_MESSAGE.sub("", first).rstrip(". ")


@contextmanager
def _warnings() -> Iterator[list[str]]:
    """Collect what xgrammar says on standard error that it ignores, filled when the block ends."""
    ignored: list[str] = []
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as file:
        os.dup2(file.fileno(), 2)
        yield ignored
        file.seek(0)
        lines = [plain(line) for line in file if _WARNING in line and _ACCEPTABLE not in line]
        ignored += dict.fromkeys(line.removeprefix(_WARNING)[:256] for line in lines[:16])


if __name__ == "__main__":
    main()

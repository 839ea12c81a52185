"""Engines that share a GPU: one is awake, the others sleep, and with work they take turns."""

import asyncio
import fcntl
import os
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import msgspec

from tera.engine.base import TextEngine
from tera.errors import ReplicaLostError, TeraError
from tera.generation import Generation, ReplicaLoad, TokenDelta

POLL_S = 0.05
"""How often a lock is looked at: the kernel tells nobody that one was released."""
AFTERMATH_S = 5.0
"""How long the processes of an engine may go on, and hold GPU memory, once its replica is dead."""


class Sleeper(TextEngine, Protocol):
    """An engine that can give its GPU's memory back and take it again."""

    async def sleep(self) -> None:
        """Stop after the step in progress; open generations wait, and new ones with them."""
        ...

    async def wake(self) -> None:
        """Go on with all generations where they were."""
        ...


class Turn:
    """The right to a GPU's memory, which one replica of a node has at a time.

    Made of two file locks, which the kernel takes from a process that dies: one is the turn, and
    whoever is next in line holds the other, by which the one whose turn it is knows of it.
    """

    def __init__(self, directory: Path) -> None:
        """`directory` is the GPU's, the same for all replicas on its node; made if need be."""
        directory.mkdir(parents=True, exist_ok=True)
        self._turn = _open(directory / "turn")
        self._next = _open(directory / "next")
        self._taken = False
        self._closed = False

    async def take(self) -> None:
        """Wait in line, then for whoever has the turn to leave it."""
        try:
            await _locked(self._next)
            await _locked(self._turn)
            if os.pread(self._turn, 1, 0):  # left there by one that died with the turn
                await asyncio.sleep(AFTERMATH_S)
            os.pwrite(self._turn, b"taken", 0)
            self._taken = True
        finally:
            if not self._taken:
                _unlock(self._turn)
            _unlock(self._next)

    def is_wanted(self) -> bool:
        """Return whether somebody waits for the turn to be left."""
        if not _try_lock(self._next):
            return True
        _unlock(self._next)
        return False

    def leave(self) -> None:
        """Give the turn to whoever is next; harmless without having it."""
        if self._taken and not self._closed:
            self._taken = False
            os.ftruncate(self._turn, 0)
            _unlock(self._turn)

    def close(self) -> None:
        """Close the files; calling it twice is harmless.

        A turn that was not left before is lost as by a death: whoever is next waits for its end.
        """
        if not self._closed:
            self._closed = True
            os.close(self._turn)
            os.close(self._next)


class TurnTakingEngine:
    """An engine that sleeps while another one has the GPU's turn.

    It keeps its turn for as long as nobody else wants it, work or not: the next request then finds
    it awake. To somebody who waits it leaves the turn when it has no work, or has had `turn_s`.
    """

    def __init__(
        self,
        engine: Sleeper,
        turn: Turn,
        turn_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`engine` is awake and `turn` taken; `clock` gives monotonic seconds."""
        self._engine = engine
        self._turn = turn
        self._turn_s = turn_s
        self._clock = clock
        self._open: set[object] = set()
        self._work = asyncio.Event()
        self._asleep = False
        self._turns = asyncio.create_task(self._take_turns())

    @classmethod
    async def launch(
        cls, launch_engine: Callable[[], Awaitable[Sleeper]], turn: Turn, turn_s: float
    ) -> "TurnTakingEngine":
        """Load an engine once it is its turn: loading takes the memory that it works with.

        Raises:
            TeraError: whatever `launch_engine` raises.
        """
        await turn.take()
        try:
            engine = await launch_engine()
        except BaseException:
            turn.close()
            raise
        return cls(engine, turn, turn_s)

    def start(
        self,
        generation: Generation,
        emit: Callable[[TokenDelta], None],
        ended: Callable[[TeraError], None],
    ) -> Callable[[], None]:
        """Begin a generation; see `TextEngine.start`."""
        ticket = object()
        self._open.add(ticket)
        self._work.set()

        def emit_counted(delta: TokenDelta) -> None:
            if delta.finish_reason is not None:
                self._leave(ticket)
            emit(delta)

        def ended_counted(error: TeraError) -> None:
            self._leave(ticket)
            ended(error)

        def abort() -> None:
            self._leave(ticket)
            abort_inner()

        abort_inner = self._engine.start(generation, emit_counted, ended_counted)
        return abort

    def _leave(self, ticket: object) -> None:
        self._open.discard(ticket)
        if not self._open:
            self._work.clear()

    def load(self) -> ReplicaLoad:
        """Return the figures of the latest step; see `Engine.load`."""
        return msgspec.structs.replace(self._engine.load(), asleep=self._asleep)

    def metrics_text(self) -> str:
        """Return the engine's own metrics; see `Engine.metrics_text`."""
        return self._engine.metrics_text()

    async def check_health(self) -> None:
        """Return if the engine can make progress, now or in its turn; see `Engine.check_health`."""
        if self._turns.done():
            cause = None if self._turns.cancelled() else self._turns.exception()
            raise ReplicaLostError("The engine did not fall asleep or wake up.") from cause
        await self._engine.check_health()

    async def close(self) -> None:
        """Stop the engine and leave the turn; see `Engine.close`."""
        self._turns.cancel()
        with suppress(asyncio.CancelledError, Exception):
            await self._turns
        try:
            await self._engine.close()
            self._turn.leave()
        finally:
            self._turn.close()

    async def _take_turns(self) -> None:
        while True:
            await self._until_over()
            self._asleep = True
            await self._engine.sleep()
            self._turn.leave()
            await self._work.wait()
            await self._turn.take()
            await self._engine.wake()
            self._asleep = False

    async def _until_over(self) -> None:
        over_at = self._clock() + self._turn_s
        while True:
            is_mine = self._open and self._clock() < over_at
            if not is_mine and self._turn.is_wanted():
                return
            await asyncio.sleep(POLL_S)


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


async def _locked(file: int) -> None:
    while not _try_lock(file):  # noqa: ASYNC110  no event comes from another process
        await asyncio.sleep(POLL_S)


def _try_lock(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _unlock(file: int) -> None:
    fcntl.flock(file, fcntl.LOCK_UN)

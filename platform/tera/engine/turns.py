"""Engines that share a GPU: one is awake, the others sleep, and with work they take turns."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import msgspec
from filelock import FileLock, Timeout

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
    whoever is next in line holds the other, by which the one whose turn it is knows of it. A file
    beside them tells a turn that was left from one that its holder died with.
    """

    def __init__(
        self,
        directory: Path,
        *,
        poll_s: float = POLL_S,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """Make a turn that somebody may wait for.

        Args:
            directory: the GPU's, the same for all replicas on its node; made if need be.
            poll_s: how often a lock is looked at.
            sleep: waits for so many seconds.
        """
        directory.mkdir(parents=True, exist_ok=True)
        self.poll_s = poll_s
        self._sleep = sleep
        self._turn = _lock(directory / "turn")
        self._next = _lock(directory / "next")
        self._mark = directory / "taken"
        self._taken = False

    async def take(self) -> None:
        """Wait in line, then for whoever has the turn to leave it."""
        try:
            await self._locked(self._next)
            await self._locked(self._turn)
            if self._mark.exists():  # left there by one that died with the turn
                await self._sleep(AFTERMATH_S)
            self._mark.touch()
            self._taken = True
        finally:
            if not self._taken:
                self._turn.release()
            self._next.release()

    def is_wanted(self) -> bool:
        """Return whether somebody waits for the turn to be left."""
        if not _try_lock(self._next):
            return True
        self._next.release()
        return False

    def leave(self) -> None:
        """Give the turn to whoever is next; harmless without having it."""
        if self._taken:
            self._taken = False
            self._mark.unlink(missing_ok=True)
            self._turn.release()

    def close(self) -> None:
        """Let go of the locks; calling it twice is harmless.

        A turn that was not left before is lost as by a death: whoever is next waits for its end.
        """
        self._taken = False
        self._turn.release()
        self._next.release()

    async def _locked(self, lock: FileLock) -> None:
        while not _try_lock(lock):
            await self._sleep(self.poll_s)


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
            await asyncio.sleep(self._turn.poll_s)


def _lock(path: Path) -> FileLock:
    # Never by a file's mere existence, which outlives a process: where the kernel has no locks,
    # taking one fails.
    return FileLock(path, mode=0o600, thread_local=False, fallback_to_soft=False)


def _try_lock(lock: FileLock) -> bool:
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return False
    return True

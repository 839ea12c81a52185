"""Lets engines share a GPU: one is awake, the others sleep, and those with work take turns."""

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
"""How often a lock is tried: the kernel does not notify anyone when one is released."""
AFTERMATH_S = 5.0
"""How long an engine's processes may survive its replica, and hold GPU memory."""


class Sleeper(TextEngine, Protocol):
    """An engine that can give its GPU's memory back and take it again."""

    async def sleep(self) -> None:
        """Stop after the current step; open and new generations wait."""
        ...

    async def wake(self) -> None:
        """Continue all generations where they stopped."""
        ...


class Turn:
    """The right to use a GPU's memory, which one replica on a node has at a time.

    It consists of two file locks, which the kernel releases when a process dies: one is the turn;
    the other is held by the next in line, which is how the holder of the turn knows that somebody
    waits. A marker file shows whether the last holder left its turn or died with it.
    """

    def __init__(
        self,
        directory: Path,
        *,
        poll_s: float = POLL_S,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """Create a turn, which is not taken yet.

        Args:
            directory: one per GPU, shared by all replicas on its node; created if missing.
            poll_s: how often a lock is tried.
            sleep: waits for the given number of seconds.
        """
        directory.mkdir(parents=True, exist_ok=True)
        self.poll_s = poll_s
        self._sleep = sleep
        self._turn = _lock(directory / "turn")
        self._next = _lock(directory / "next")
        self._mark = directory / "taken"
        self._taken = False

    async def take(self) -> None:
        """Wait in line, then for the holder of the turn to leave it."""
        try:
            # Two locks, so that the holder can see whether anybody waits, without a server to ask.
            await self._locked(self._next)
            await self._locked(self._turn)
            if self._mark.exists():  # left behind by a holder that died
                await self._sleep(AFTERMATH_S)
            # The kernel drops a dead holder's lock at once, while its engine may still hold memory.
            self._mark.touch()
            self._taken = True
        finally:
            if not self._taken:
                self._turn.release()
            self._next.release()

    def is_wanted(self) -> bool:
        """Return whether another replica waits for the turn."""
        if not _try_lock(self._next):
            return True
        self._next.release()
        return False

    def leave(self) -> None:
        """Pass the turn to the next in line; harmless if it is not held."""
        if self._taken:
            self._taken = False
            self._mark.unlink(missing_ok=True)
            self._turn.release()

    def close(self) -> None:
        """Release the locks; calling it twice is harmless.

        A turn that was not left before counts as lost by a death: the next in line waits until this
        engine's processes must have ended.
        """
        self._taken = False
        self._turn.release()
        self._next.release()

    async def _locked(self, lock: FileLock) -> None:
        while not _try_lock(lock):
            await self._sleep(self.poll_s)


class TurnTakingEngine:
    """An engine that sleeps while another one has the GPU's turn.

    It keeps its turn while no other replica wants it, even without work, so that the next request
    finds it awake. If another one waits, it leaves the turn when it has no work or has had it for
    `turn_s`.
    """

    def __init__(
        self,
        engine: Sleeper,
        turn: Turn,
        turn_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`engine` must be awake and `turn` taken; `clock` gives monotonic seconds."""
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
        """Load an engine once it has the turn: loading needs the GPU's memory.

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
        """Check that the engine can progress, now or in its turn; see `Engine.check_health`."""
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
            # Told before it is true: a sleeping engine makes no step, and would look stalled.
            self._asleep = True
            await self._engine.sleep()
            # Only now is the GPU's memory free for the next one.
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
    # Never fall back to locking by a file's existence, which outlives its process: without kernel
    # locks, taking one must fail.
    return FileLock(path, mode=0o600, thread_local=False, fallback_to_soft=False)


def _try_lock(lock: FileLock) -> bool:
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return False
    return True

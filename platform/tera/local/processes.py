"""The processes of a platform on one machine, on record so that none outlives it.

The kernel gives a process id out again, so it names a process only together with the moment at
which that one started. `tera serve` writes both down for all that descends from it. If it is
killed, nobody is left to stop those, and this is how they end:

1. The kernel ends Ray's own processes and Redis, which asked for that, and Ray's workers end
   themselves when they miss Ray. HAProxy may stay, with the port; so do vLLM's engine processes,
   Ray's agents, and whatever is frozen.
2. The next `tera serve` in the same directory takes the directory's lock. So no platform runs
   there, and what is on record is left over.
3. It ends each of them that still is the process on record, and the children of those.
"""

import asyncio
import logging
import os
import shutil
import signal
import tempfile
import time
from collections.abc import AsyncGenerator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final, Self

import psutil

from tera.config.section import Section
from tera.errors import StartError
from tera.local.private_file import write_private

_logger = logging.getLogger(__name__)

LOOK_EVERY_S: Final = 1.0
"""A look takes milliseconds. What starts between the last one and a kill is not on record."""
GRACE_S: Final = 3.0
_POLL_S: Final = 0.02

_RECORD: Final = "processes.json"


class ProcessId(Section):
    """One process, which no later one is taken for."""

    pid: int
    started_ticks: int
    """From the machine's start, by the kernel's clock: setting the time does not change it."""

    @classmethod
    def of(cls, pid: int) -> Self | None:
        """Return the process that has an id now; None if none has, or it has ended."""
        try:
            stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            return None
        # See proc_pid_stat(5). The program's name is in parentheses and may hold some as well.
        state, *fields = stat.rpartition(")")[2].split()
        return None if state in "ZX" else cls(pid=pid, started_ticks=int(fields[18]))

    @classmethod
    def current(cls) -> Self:
        """Return this process."""
        current = cls.of(os.getpid())
        assert current is not None
        return current

    @property
    def is_alive(self) -> bool:
        """Whether it has not ended yet."""
        return self.of(self.pid) == self

    def family(self) -> set[Self]:
        """Return it and all that descends from it, as far as they are alive."""
        if not self.is_alive:
            return set()
        try:
            children = psutil.Process(self.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return set()  # it has ended since
        found = {self.of(child.pid) for child in children}
        return {self, *(process for process in found if process is not None)}

    def send(self, number: signal.Signals) -> None:
        """Send a signal, unless it has ended.

        Raises:
            StartError: it is another user's.
        """
        if not self.is_alive:
            return
        try:
            os.kill(self.pid, number)
        except ProcessLookupError:
            pass  # it has ended since
        except PermissionError as error:
            raise StartError(
                f"Process {self.pid} of a platform that was killed cannot be ended "
                f"({error.strerror}); end it as the user who started that."
            ) from error


class ProcessRecord(Section):
    """`processes.json` in the platform's directory while it runs."""

    boot_id: str
    """Of the machine's start, from which moments are counted."""
    scratch: Path
    """The platform's temporary directory."""
    processes: tuple[ProcessId, ...] = ()

    @classmethod
    def read(cls, home: Path) -> Self | None:
        """Return what a platform left in `home`; None where each stopped what it had started."""
        try:
            return cls.model_validate_json((home / _RECORD).read_text())
        except FileNotFoundError:
            return None
        except ValueError:
            _logger.warning("%s cannot be read; what it names is left alone", home / _RECORD)
            return None

    def write(self, home: Path) -> None:
        """Leave the record for the next start."""
        write_private(home / _RECORD, self.model_dump_json())

    def brought_up_to_date(self, not_ours: Iterable[ProcessId]) -> Self:
        """Return the record with all that descends from this process now, but from `not_ours`."""
        # Who has lost its parent descends from this process no more, and is still ours.
        known = {process for process in self.processes if process.is_alive}
        ours = sorted(known | descendants(not_ours), key=lambda process: process.pid)
        return self.model_copy(update={"processes": tuple(ours)})

    async def clear(self, home: Path) -> None:
        """End what is on record, and remove the files of the platform that it was of.

        Raises:
            StartError: a process cannot be ended.
        """
        if self.boot_id == _boot_id():
            await end(self.processes)
        shutil.rmtree(self.scratch, ignore_errors=True)
        for name in (_RECORD, "state.json", "local.env"):
            (home / name).unlink(missing_ok=True)


async def end(processes: Iterable[ProcessId], grace_s: float = GRACE_S) -> None:
    """End processes and all that descends from them: by SIGTERM, and what stays by SIGKILL.

    Args:
        processes: those that have ended already are left out.
        grace_s: from SIGTERM to SIGKILL, and from there to giving up.

    Raises:
        StartError: one cannot be ended.
    """
    left = {each for process in processes for each in process.family()}
    for number in (signal.SIGTERM, signal.SIGKILL):
        for process in left:
            process.send(number)
        end_s = time.monotonic() + grace_s
        # Those that are no children of this process end without an event.
        while (left := {each for each in left if each.is_alive}) and time.monotonic() < end_s:  # noqa: ASYNC110
            await asyncio.sleep(_POLL_S)
    if left:
        pids = ", ".join(str(process.pid) for process in left)
        raise StartError(f"What a platform started cannot be ended, not even by force: {pids}")


@asynccontextmanager
async def on_record(home: Path) -> AsyncGenerator[Path]:
    """Keep all that this process starts on record in `home` while the block runs.

    Yields a temporary directory, which the record names too. Nothing of both is left at the end.

    Raises:
        StartError: a process cannot be ended.
    """
    # Unix sockets live here, and their paths may have 107 characters: not below a home that may
    # be deep.
    scratch = Path(tempfile.mkdtemp(prefix="tera-"))
    record = ProcessRecord(boot_id=_boot_id(), scratch=scratch)
    record.write(home)
    not_ours = descendants()
    looking = asyncio.create_task(_keep(record, home, not_ours))
    try:
        yield scratch
    finally:
        looking.cancel()
        last = ProcessRecord.read(home) or record
        await last.brought_up_to_date(not_ours).clear(home)


async def _keep(record: ProcessRecord, home: Path, not_ours: set[ProcessId]) -> None:
    while True:
        latest = record.brought_up_to_date(not_ours)
        if latest != record:
            record = latest
            try:
                record.write(home)
            except OSError as error:
                _logger.warning("The record of processes cannot be written: %s", error)
        await asyncio.sleep(LOOK_EVERY_S)


def descendants(apart_from: Iterable[ProcessId] = ()) -> set[ProcessId]:
    """Return all that descends from this process, without some and what descends from those."""
    current = ProcessId.current()
    left_out = {each for process in apart_from for each in process.family()}
    return current.family() - left_out - {current}


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()

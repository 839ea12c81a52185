"""Records the processes of a platform on one machine, so that none outlives it.

The kernel reuses process ids, so an id names a process only together with its start time. `tera
serve` records both for all its descendants. If it is killed, nobody is left to stop them, and this
is how they end:

1. The kernel ends Ray's own processes and Redis, which have asked it to, and Ray's workers end
   themselves when Ray is gone. HAProxy may survive and hold the port; so may vLLM's engine
   processes, Ray's agents, and anything that is frozen.
2. The next `tera serve` in the same directory takes the directory's lock. So no platform runs
   there, and the processes on record are leftovers.
3. It ends those that are still the recorded processes, and their children.
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
"""How often the record is updated, which takes milliseconds. Processes that start between the last
update and a kill are not on record."""
GRACE_S: Final = 3.0
_POLL_S: Final = 0.02

_RECORD: Final = "processes.json"


class ProcessId(Section):
    """Identifies one process; a later process with the same id is not mistaken for it."""

    pid: int
    started_ticks: int
    """Start time since boot, by the kernel's clock, which setting the time does not change."""

    @classmethod
    def of(cls, pid: int) -> Self | None:
        """Return the process that has this id now; None if there is none, or it has ended."""
        try:
            stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            return None
        # See proc_pid_stat(5). The program's name is in parentheses and may contain parentheses.
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
        """Return this process and its descendants, those that are alive."""
        if not self.is_alive:
            return set()
        try:
            children = psutil.Process(self.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return set()  # it has ended meanwhile
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
            pass  # it has ended meanwhile
        except PermissionError as error:
            raise StartError(
                f"Process {self.pid} of a platform that was killed cannot be ended "
                f"({error.strerror}); end it as the user who started that."
            ) from error


class ProcessRecord(Section):
    """The content of `processes.json`, which is in the platform's directory while it runs."""

    boot_id: str
    """Identifies the boot since which start times are counted."""
    scratch: Path
    """The platform's temporary directory."""
    processes: tuple[ProcessId, ...] = ()

    @classmethod
    def read(cls, home: Path) -> Self | None:
        """Return the record that a killed platform left in `home`; None if there is none."""
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
        """Return the record with this process's current descendants added, except `not_ours`."""
        # A process whose parent has ended is no longer a descendant of this one, but still ours.
        known = {process for process in self.processes if process.is_alive}
        ours = sorted(known | descendants(not_ours), key=lambda process: process.pid)
        return self.model_copy(update={"processes": tuple(ours)})

    async def clear(self, home: Path) -> None:
        """End the processes on record, and remove the files of their platform.

        Raises:
            StartError: a process cannot be ended.
        """
        if self.boot_id == _boot_id():
            await end(self.processes)
        shutil.rmtree(self.scratch, ignore_errors=True)
        for name in (_RECORD, "state.json", "local.env"):
            (home / name).unlink(missing_ok=True)


async def end(processes: Iterable[ProcessId], grace_s: float = GRACE_S) -> None:
    """End processes and their descendants: by SIGTERM, and those that survive it by SIGKILL.

    Args:
        processes: may include processes that have already ended.
        grace_s: time from SIGTERM to SIGKILL, and from there to giving up.

    Raises:
        StartError: one cannot be ended.
    """
    left = {each for process in processes for each in process.family()}
    for number in (signal.SIGTERM, signal.SIGKILL):
        for process in left:
            process.send(number)
        end_s = time.monotonic() + grace_s
        # Processes that are not our children end without notifying us.
        while (left := {each for each in left if each.is_alive}) and time.monotonic() < end_s:  # noqa: ASYNC110
            await asyncio.sleep(_POLL_S)
    if left:
        pids = ", ".join(str(process.pid) for process in left)
        raise StartError(f"What a platform started cannot be ended, not even by force: {pids}")


@asynccontextmanager
async def on_record(home: Path) -> AsyncGenerator[Path]:
    """Keep this process's descendants on record in `home` while the block runs.

    Yields a temporary directory, which is recorded too. Both are removed at the end.

    Raises:
        StartError: a process cannot be ended.
    """
    # Unix sockets are created here, and their paths may have 107 characters at most: so not below
    # `home`, whose path may be long.
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
    """Return this process's descendants, except some and the descendants of those."""
    current = ProcessId.current()
    left_out = {each for process in apart_from for each in process.family()}
    return current.family() - left_out - {current}


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.serve.conftest import until

from tera.local.processes import ProcessId, ProcessRecord, end

DEAF = """
import signal, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def started(stack: ExitStack, *command: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(  # noqa: S603  our own
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    stack.enter_context(process)
    stack.callback(process.kill)
    return process


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def id_of(process: subprocess.Popen[str]) -> ProcessId:
    found = ProcessId.of(process.pid)
    assert found is not None
    return found


def record_of(process: ProcessId, scratch: Path) -> ProcessRecord:
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ProcessRecord(boot_id=boot_id, scratch=scratch, processes=(process,))


def test_a_process_that_has_ended_is_none_even_before_its_parent_asks(stack: ExitStack) -> None:
    process = started(stack, "true")
    until(lambda: ProcessId.of(process.pid) is None)
    assert psutil.Process(process.pid).status() == psutil.STATUS_ZOMBIE
    process.wait()
    assert ProcessId.of(process.pid) is None


async def test_what_is_on_record_is_ended_with_its_children_and_files(
    stack: ExitStack, tmp_path: Path
) -> None:
    parent = started(stack, "sh", "-c", "sleep 600 & echo $!; wait")
    child = psutil.Process(int(first_line(parent)))
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    for name in ("state.json", "local.env"):
        (tmp_path / name).touch()
    record_of(id_of(parent), scratch).write(tmp_path)

    left = ProcessRecord.read(tmp_path)
    assert left is not None
    await left.clear(tmp_path)
    parent.wait(timeout=10)
    assert ProcessId.of(child.pid) is None
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("process", "record"),
    [
        pytest.param({"started_ticks": 1}, {}, id="who has the id of one on record"),
        pytest.param({}, {"boot_id": "another"}, id="who started as long after another boot"),
    ],
)
async def test_a_stranger_survives(
    stack: ExitStack, tmp_path: Path, process: dict[str, Any], record: dict[str, Any]
) -> None:
    stranger = started(stack, "sleep", "600")
    taken_for = record_of(id_of(stranger).model_copy(update=process), tmp_path / "scratch")
    await taken_for.model_copy(update=record).clear(tmp_path)
    assert stranger.poll() is None


@pytest.mark.parametrize("why", ["deaf", "frozen"])
async def test_what_does_not_end_when_it_is_told_is_killed(stack: ExitStack, why: str) -> None:
    process = started(stack, sys.executable, "-c", DEAF)
    first_line(process)
    if why == "frozen":
        process.send_signal(signal.SIGSTOP)
    await end([id_of(process)], grace_s=0.1)
    assert process.wait() == -signal.SIGKILL


def test_a_record_that_cannot_be_read_names_nobody(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "processes.json").write_text('{"boot_id": ')
    assert ProcessRecord.read(tmp_path) is None
    assert "cannot be read" in caplog.text


# A process of its own: at the end, all that descends from it is ended.
PLATFORM = """
import asyncio, subprocess, sys
from pathlib import Path
from tera.local.processes import on_record

async def main():
    async with on_record(Path(sys.argv[1])):
        subprocess.Popen(["sh", "-c", "sleep 600 & echo $!; wait"])
        await asyncio.to_thread(sys.stdin.readline)

asyncio.run(main())
"""


def on_record(home: Path) -> tuple[ProcessId, ...]:
    record = ProcessRecord.read(home)
    return record.processes if record else ()


def test_a_killed_platform_leaves_a_record_of_all_that_it_has_started(
    stack: ExitStack, tmp_path: Path
) -> None:
    platform = started(stack, sys.executable, "-c", PLATFORM, str(tmp_path))
    child = psutil.Process(int(first_line(platform)))
    stack.callback(child.kill)
    until(lambda: len(on_record(tmp_path)) == 2)
    # Then it has no parent, and descends from the platform no more.
    child.parents()[0].kill()
    until(lambda: len(on_record(tmp_path)) == 1)
    platform.kill()
    platform.wait()
    assert on_record(tmp_path) == (ProcessId.of(child.pid),)


def test_a_platform_that_stops_leaves_nothing(stack: ExitStack, tmp_path: Path) -> None:
    platform = started(stack, sys.executable, "-c", PLATFORM, str(tmp_path))
    child = psutil.Process(int(first_line(platform)))
    record = ProcessRecord.read(tmp_path)
    assert record is not None
    assert record.scratch.is_dir()
    platform.communicate("\n", timeout=30)
    assert platform.returncode == 0
    assert ProcessId.of(child.pid) is None
    assert not record.scratch.exists()
    assert list(tmp_path.iterdir()) == []

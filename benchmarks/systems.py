"""The systems under measurement: each starts in its own processes and ends with its block."""

import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from signal import SIGINT
from tempfile import TemporaryDirectory

import psutil

from tera.local.cluster import free_port

START_DEADLINE_S = 240.0
STOP_DEADLINE_S = 30.0


@dataclass(frozen=True)
class System:
    """A server that listens on loopback."""

    name: str
    process: psutil.Process
    """The first of its processes; the others descend from it."""
    port: int
    model: str
    api_key: str = "none"
    home: Path = Path()
    """TERA_HOME of a `tera serve`, for the commands that talk to it."""

    def command(self, *arguments: str) -> str:
        """Return what a `tera` command prints."""
        env = shutil.which("env")
        assert env is not None
        tera_program = str(Path(sys.executable).with_name("tera"))
        return subprocess.run(  # noqa: S603  our own program
            [env, f"TERA_HOME={self.home}", tera_program, *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=True,
        ).stdout


class StartError(Exception):
    """A system did not start; the message holds its last lines."""


@dataclass(frozen=True)
class Source:
    """A checkout of Tera to run, other than this one."""

    name: str
    """Of the system, in tables."""
    path: Path


@contextmanager
def tera(
    values: str | None, models: Path | None = None, source: Source | None = None
) -> Iterator[System]:
    """Run `tera serve` in a directory of its own.

    Args:
        values: text of a values file; None is the demo platform.
        models: directory of demo models that are made already.
        source: run that checkout, with the packages that are installed for this one.
    """
    with _directory() as directory:
        home = directory / "home"
        home.mkdir()
        if models is not None:
            (home / "models").symlink_to(models)
        port = free_port()
        command = [str(Path(sys.executable).with_name("tera")), "serve", "--port", str(port)]
        if values is not None:
            (directory / "values.yaml").write_text(values)
            command += ["-f", "values.yaml"]
        environment = {"TERA_HOME": str(home)}
        if source is not None:
            environment["PYTHONPATH"] = str(source.path / "platform")
        with _process(command, environment, directory) as process:
            ready = home / "local.env"
            _wait(process, directory, ready.exists)
            found = dict(line.split("=", 1) for line in ready.read_text().splitlines())
            name = "Tera" if source is None else source.name
            yield System(name, process, port, found["TERA_MODEL"], found["TERA_API_KEY"], home)


@contextmanager
def floor(events: list[bytes], answer: bytes, step_s: float) -> Iterator[System]:
    """Run `benchmarks.floor`, which answers everybody alike: with events, or with one body."""
    with _directory() as directory:
        (directory / "events").write_bytes(b"".join(events))
        (directory / "answer").write_bytes(answer)
        port = free_port()
        command = [sys.executable, "-m", "benchmarks.floor", str(directory), str(port), str(step_s)]
        with _process(command, {}, Path.cwd(), directory) as process:
            _wait(process, directory, lambda: _listens(port))
            yield System("floor", process, port, "simulated")


@contextmanager
def vllm_server(model_path: Path, model: str, arguments: list[str]) -> Iterator[System]:
    """Run vLLM's own OpenAI server, as quiet about requests as Tera is."""
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *arguments]
    command += ["--model", str(model_path), "--served-model-name", model]
    command += ["--host", "127.0.0.1", "--port", str(port), "--disable-uvicorn-access-log"]
    environment = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }
    with _directory() as directory, _process(command, environment, directory) as process:
        _wait(process, directory, lambda: _answers(port, "/health"))
        yield System("vLLM's server", process, port, model)


@contextmanager
def _directory() -> Iterator[Path]:
    with TemporaryDirectory(prefix="tera-bench-", ignore_cleanup_errors=True) as name:
        yield Path(name)


@contextmanager
def _process(
    command: list[str], environment: Mapping[str, str], directory: Path, logs: Path | None = None
) -> Iterator[psutil.Process]:
    """Run a command with more variables than ours, and end it and all its children.

    `env` adds the variables and then becomes the command, so the process id stays.
    """
    env = shutil.which("env")
    assert env is not None
    assignments = [f"{name}={value}" for name, value in environment.items()]
    with ((logs or directory) / "log").open("wb") as log:
        child = subprocess.Popen(  # noqa: S603  our own commands
            [env, *assignments, *command],
            cwd=directory,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C ends this program, which ends the child
        )
    process = psutil.Process(child.pid)
    try:
        yield process
    finally:
        processes = process.children(recursive=True) if child.poll() is None else []
        child.send_signal(SIGINT)
        try:
            child.wait(STOP_DEADLINE_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        _, left = psutil.wait_procs(processes, timeout=5)
        for orphan in left:
            with suppress(psutil.NoSuchProcess):
                orphan.kill()


def _wait(process: psutil.Process, logs: Path, is_ready: Callable[[], bool]) -> None:
    end = time.monotonic() + START_DEADLINE_S
    while not is_ready():
        gone = not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
        if gone or time.monotonic() > end:
            log = (logs / "log").read_text(errors="replace")
            raise StartError(f"{' '.join(process.cmdline() if not gone else [])}\n{log[-3000:]}")
        time.sleep(0.2)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _answers(port: int, path: str) -> bool:
    connection = HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except (OSError, HTTPException):
        return False
    finally:
        connection.close()

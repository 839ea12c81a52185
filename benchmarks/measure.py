"""CPU time by kind of process, and how idle the machine was beside it."""

import signal
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import msgspec
import psutil

from benchmarks.load import Load, LoadProcess, Outcome
from benchmarks.systems import System

QUIET_CORES = 0.15
"""More than this in use by others disturbs a measurement."""
QUIET_PATIENCE_S = 8.0
TRIES = 2

_KINDS = (
    ("ServeReplica:gateway", "gateway replica"),
    ("ServeReplica:model-", "engine replica"),
    ("VLLM::Worker", "vLLM worker"),
    ("VLLM::EngineCore", "vLLM engine core"),
    ("vllm.entrypoints", "vLLM API server"),
    ("haproxy", "HAProxy"),
    ("ServeController", "Serve controller"),
    ("ProxyActor", "Serve proxy actor"),
    ("raylet/raylet", "raylet"),
    ("gcs_server", "GCS"),
    ("redis-server", "Redis"),
    ("tera serve", "tera serve"),
    ("benchmarks.floor", "floor"),
)
OTHER = "Ray, the rest"


class Measurement(msgspec.Struct, frozen=True):
    """One load on one system."""

    outcome: Outcome
    cpu_s: dict[str, float]
    """By kind of process, the load generator left out."""
    others_cores: float
    """Cores that processes other than the system and its clients used meanwhile."""

    @property
    def requests_per_s(self) -> float:
        """Requests per second of the closed loop."""
        return self.outcome.requests / self.outcome.wall_s

    @property
    def tokens_per_s(self) -> float:
        """Completion tokens per second."""
        return self.outcome.completion_tokens / self.outcome.wall_s

    @property
    def cpu_ms_per_request(self) -> float:
        """CPU time of all the system's processes."""
        return 1000 * sum(self.cpu_s.values()) / self.outcome.requests


def measure(system: System, load: Load) -> Measurement:
    """Put a load on a system, again when others disturb it; the least disturbed run counts."""
    runs: list[Measurement] = []
    while len(runs) < TRIES and not any(run.others_cores <= QUIET_CORES for run in runs):
        _wait_until_quiet(system)
        runs.append(measure_once(system, load))
    return min(runs, key=lambda run: run.others_cores)


def median(runs: list[Measurement]) -> Measurement:
    """Return the run in the middle by throughput."""
    middle = statistics.median_low(run.tokens_per_s for run in runs)
    return next(run for run in runs if run.tokens_per_s == middle)


def idle_cpu_ms_per_s(system: System, seconds: float) -> dict[str, float]:
    """Return what the system uses without requests, by kind of process."""
    before = _read(system.process)
    time.sleep(seconds)
    used = _by_kind(before, _read(system.process))
    return {kind: 1000 * cpu_s / seconds for kind, cpu_s in used.items()}


@contextmanager
def paused(system: System) -> Iterator[None]:
    """Stop a system's processes within the block, so that what it does idle disturbs nobody."""
    processes = [system.process, *system.process.children(recursive=True)]
    try:
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGSTOP)
        yield
    finally:
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGCONT)


def measure_once(system: System, load: Load) -> Measurement:
    """Put a load on a system, whatever else goes on."""
    with LoadProcess(load) as clients:
        busy_s, before, began = _busy_s(), _read(system.process), time.monotonic()
        outcome = clients.run()
        cpu_s = _by_kind(before, _read(system.process))
        wall_s = time.monotonic() - began
        others_s = _busy_s() - busy_s - sum(cpu_s.values()) - outcome.client_cpu_s
    return Measurement(outcome, cpu_s, max(0.0, others_s / wall_s))


def _wait_until_quiet(system: System) -> None:
    end = time.monotonic() + QUIET_PATIENCE_S
    while time.monotonic() < end:
        busy_s, before = _busy_s(), _read(system.process)
        time.sleep(1.0)
        own_s = sum(_by_kind(before, _read(system.process)).values())
        if _busy_s() - busy_s - own_s <= QUIET_CORES:
            return
    print("The machine is busy; measuring all the same.", file=sys.stderr)


def _busy_s() -> float:
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - times.iowait - times.guest - times.guest_nice)


_Reading = dict[int, tuple[str, float]]


def _read(root: psutil.Process) -> _Reading:
    reading: _Reading = {}
    for process in [root, *root.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            reading[process.pid] = (_kind(process), times.user + times.system)
    return reading


def _kind(process: psutil.Process) -> str:
    command = " ".join(process.cmdline())
    return next((kind for part, kind in _KINDS if part in command), OTHER)


def _by_kind(before: _Reading, after: _Reading) -> dict[str, float]:
    used: dict[str, float] = defaultdict(float)
    for pid, (kind, cpu_s) in after.items():
        used[kind] += cpu_s - before.get(pid, (kind, 0.0))[1]
    return dict(used)

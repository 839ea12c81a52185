"""Platforms as a user runs them: `tera serve` as a process, reached only from outside."""

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families

from tera.local.cluster import free_port
from tera.local.state import LocalState
from tera.local.status import read_status

TERA = Path(sys.executable).with_name("tera")

# What a developer's shell may hold must not reach the platforms of these tests.
_FOREIGN = (
    "TERA_HOST",
    "TERA_REDIS_URL",
    "TERA_KEY_PEPPER",
    "TERA_CLUSTER_SECRET",
    "TERA_CHANNEL_HOST",
    "TERA_BASE_URL",
    "TERA_API_KEY",
    "RAY_ADDRESS",
)

START_DEADLINE_S = 240
STOP_DEADLINE_S = 20
"""Promised in `docs/architecture.md`: whatever it started is gone by then."""


def until(condition: Callable[[], object], *, timeout_s: float = 30, every_s: float = 0.3) -> None:
    """Return once `condition` holds; another process's state comes without an event."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, f"not so within {timeout_s} s"
        time.sleep(every_s)


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def command(home: Path, port: int, *arguments: str) -> list[str]:
    """Return a `tera` command line; `env` becomes `tera`, so the process id is tera's."""
    unset = [part for name in _FOREIGN for part in ("-u", name)]
    return ["env", *unset, f"TERA_HOME={home}", f"TERA_PORT={port}", str(TERA), *arguments]


def tera(
    home: Path, *arguments: str, port: int = 0, timeout_s: float = 120
) -> subprocess.CompletedProcess[str]:
    """Run a `tera` command to its end."""
    return subprocess.run(  # noqa: S603  our own program
        command(home, port or free_port(), *arguments),
        cwd=home.parent,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


@dataclass
class Platform:
    """A `tera serve` and what a tenant and an operator know of it."""

    home: Path
    port: int
    process: subprocess.Popen[bytes]
    log: Path
    env: dict[str, str] = field(default_factory=dict)

    @classmethod
    def launch(
        cls, home: Path, values: str, over: Sequence[Path] = (), port: int | None = None
    ) -> "Platform":
        """Start it with values over those of other files, in a session of its own; do not wait."""
        home.mkdir(parents=True, exist_ok=True)
        file = home.parent / "values.yaml"
        file.write_text(values)
        files = [str(path) for path in (*over, file)]
        port, log = port or free_port(), home.parent / "serve.log"
        with log.open("wb") as output:
            process = subprocess.Popen(  # noqa: S603  our own program
                command(home, port, "serve", *(part for path in files for part in ("-f", path))),
                cwd=home.parent,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return cls(home, port, process, log)

    @classmethod
    @contextmanager
    def running(cls, home: Path, values: str, over: Sequence[Path] = ()) -> Iterator["Platform"]:
        """Have one that is ready, for as long as the block runs."""
        platform = cls.launch(home, values, over)
        try:
            yield platform.wait_until_ready()
        finally:
            # The deadline is `test_life.py`'s to prove; a busy machine must not fail another test.
            with suppress(subprocess.TimeoutExpired):
                platform.stop()

    def wait_until_ready(self) -> "Platform":
        file = self.home / "local.env"
        until(
            lambda: file.exists() or self.process.poll() is not None,
            timeout_s=START_DEADLINE_S,
        )
        assert file.exists(), self.output
        self.env = dict(line.split("=", 1) for line in file.read_text().splitlines())
        return self

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    @property
    def base_url(self) -> str:
        return self.env["TERA_BASE_URL"]

    @property
    def api_key(self) -> str:
        return self.env["TERA_API_KEY"]

    def http(self, key: str | None = None) -> httpx.Client:
        """Return a plain client of `/v1`, with the platform's own key if none is given."""
        return httpx.Client(
            base_url=self.base_url,
            headers={"authorization": f"Bearer {self.api_key if key is None else key}"},
            timeout=120,
        )

    def tera(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return tera(self.home, *arguments, port=self.port)

    def apply(self, values: str) -> None:
        """Give it other values; return once it has them."""
        file = self.home.parent / "applied.yaml"
        file.write_text(values)
        applied = self.tera("apply", "-f", str(file))
        assert applied.returncode == 0, applied.stderr

    def become(self, values: str) -> None:
        """Give it other values; return once exactly the replicas that they start with run."""
        self.apply(values)
        wanted = yaml.safe_load(values)
        models = {name: _least(model) for name, model in wanted["models"].items()}

        def settled() -> bool:
            status = self.status()
            found = {each["name"]: each["replicas"] for each in status["models"]}
            return (
                {name: len(replicas) for name, replicas in found.items()} == models
                and len(status["gateway"]) == _least(wanted.get("gateway", {}))
                and all(
                    each["running"] is not None and not each["draining"]
                    for replicas in found.values()
                    for each in replicas
                )
            )

        until(settled, timeout_s=120)

    def status(self) -> dict[str, Any]:
        """Return what `tera status --json` prints, without a process for each look."""
        return read_status(LocalState.read(self.home))

    def replicas(self, model: str) -> list[dict[str, Any]]:
        """Return a model's replicas, by its short name."""
        models = {each["name"]: each for each in self.status()["models"]}
        found: list[dict[str, Any]] = models[model]["replicas"]
        return found

    def wait_until_idle(self, model: str, replicas: int, *, timeout_s: float = 90) -> None:
        """Return once that many replicas run, and none of them has work."""

        def idle() -> bool:
            loads = [
                sample.value
                for family in text_string_to_metric_families(self.metrics())
                for sample in family.samples
                if sample.name in ("tera_engine_running", "tera_engine_waiting")
                and sample.labels["model"] == model
            ]
            return loads == [0.0] * 2 * replicas

        until(idle, timeout_s=timeout_s)

    def metrics(self) -> str:
        return httpx.get(f"{self.base_url}/metrics/all", timeout=30).raise_for_status().text

    def sample(self, name: str, **labels: str) -> float:
        """Return the sum of a metric's samples that carry these labels."""
        return sum(
            sample.value
            for family in text_string_to_metric_families(self.metrics())
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    def descendants(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def stop(self, number: int = signal.SIGINT) -> int:
        """Send the signal and return the exit code.

        What outlives the deadline fails the test that asked, and is ended.
        """
        family = self.descendants() if self.process.poll() is None else []
        self.process.send_signal(number)
        try:
            return self.process.wait(STOP_DEADLINE_S)
        finally:
            for process in family:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            self.process.kill()
            self.process.wait()


def _least(values: dict[str, Any]) -> int:
    """Return how many replicas values of a model or of the gateway start with."""
    replicas: int = values.get("replicas", {}).get("min", 1)
    return replicas


SIMULATED_VALUES = """\
models:
  small:
    id: sim/small
    aliases: [sim]
    engine:
      kind: simulated
      args:
        profile: {decode_step_s: 0.01, context_tokens: 2048}
        faults: {only_prompts_with: FAULT, fail_after_tokens: 5}
    replicas: {min: 2, max: 2}
  slow:
    id: sim/slow
    engine:
      kind: simulated
      args:
        # A prompt of a thousand tokens is half a minute without a token.
        profile: {prefill_tokens_per_s: 33, context_tokens: 2048, max_running: 1}
        faults: {only_prompts_with: FAULT, refuse: true}
gateway: {requests: {maxBodyBytes: 1048576}}
"""

VLLM_VALUES = """\
models:
  smollm2:
    id: HuggingFaceTB/SmolLM2-135M-Instruct
    source: demo://smollm2-135m-instruct
    engine:
      kind: vllm
      args: {dtype: float32, max_model_len: 2048, max_num_seqs: 16, enforce_eager: true}
"""


@pytest.fixture
def client(simulated: Platform) -> Iterator[OpenAI]:
    """The official client, which tries nothing twice."""
    with OpenAI(
        base_url=f"{simulated.base_url}/v1", api_key=simulated.api_key, max_retries=0
    ) as found:
        yield found

"""`python -m benchmarks [--quick] [name …]`: run the benchmarks and print their tables."""

import argparse
import platform
import signal
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import msgspec
import psutil
from rich.console import Console
from rich.table import Table

from benchmarks import (
    attacks,
    chain,
    hostile,
    isolation,
    kills,
    limits,
    routing,
    scaling,
    steps,
    text,
    vllm,
)

RESULTS = Path(__file__).parent / "results"

Benchmark = Callable[[bool], tuple[Table, dict[str, object]]]
"""Returns its table and its figures; quickly, if that is asked."""

BENCHMARKS: dict[str, Benchmark] = {
    "attacks": attacks.run,
    "chain": chain.run,
    "hostile": hostile.run,
    "isolation": isolation.run,
    "kills": kills.run,
    "limits": limits.run,
    "routing": routing.run,
    "scaling": scaling.run,
    "steps": steps.run,
    "text": text.run,
    "vllm": vllm.run,
}


def main() -> None:
    """Run what the command line names, or all, and keep the figures in `results`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", choices=[*BENCHMARKS, []], metavar="name")
    parser.add_argument("--quick", action="store_true", help="fewer rounds; keeps no results")
    parser.add_argument(
        "--beside", type=Path, help="another checkout, which `chain` measures in the same run"
    )
    options = parser.parse_args()
    # Ended as by Ctrl-C, so that the systems under measurement end as well.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    console = Console(width=max(100, Console().width))
    benchmarks: dict[str, Benchmark] = {
        **BENCHMARKS,
        "chain": partial(chain.run, beside=options.beside),
    }
    for name in options.names or benchmarks:
        began = time.monotonic()
        table, figures = benchmarks[name](options.quick)
        console.print(table)
        console.print(f"{name} took {time.monotonic() - began:.0f} s\n")
        if not options.quick:
            _keep(name, figures)


def _keep(name: str, figures: dict[str, object]) -> None:
    machine = {
        "cores": psutil.cpu_count(),
        "processor": _processor(),
        "memory_gib": round(psutil.virtual_memory().total / 1024**3),
        "system": platform.system(),
        "python": platform.python_version(),
    }
    kept = {"at": datetime.now(UTC).isoformat(timespec="seconds"), "machine": machine, **figures}
    RESULTS.mkdir(exist_ok=True)
    text = msgspec.json.format(msgspec.json.encode(kept), indent=1)
    (RESULTS / f"{name}.json").write_bytes(text + b"\n")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


if __name__ == "__main__":
    main()

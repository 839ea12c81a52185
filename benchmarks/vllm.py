"""What Tera takes from vLLM's throughput and adds to its time to first token, on this CPU."""

import json
import random
from collections import defaultdict
from typing import Any

import yaml
from rich.table import Table

from benchmarks.load import Load
from benchmarks.measure import Measurement, measure, measure_once, median, paused
from benchmarks.systems import System, tera, vllm_server
from tera.config.environment import Runtime
from tera.config.values_file import default_values_file, load_platform
from tera.local.demo_model import ensure_demo_model

TOKENS = 48
GOAL_RATIO = 0.95
REQUESTS = {1: 6, 4: 16, 16: 48}
"""By number of clients."""
_SUBJECTS = ("river", "market", "engine", "garden", "letter", "harbour", "mirror", "planet")
_QUALITIES = ("old", "silent", "copper", "distant", "frozen", "hidden", "narrow", "golden")


def run(quick: bool) -> tuple[Table, dict[str, object]]:
    """Return the table and the figures behind it."""
    rounds = 1 if quick else 3
    models = Runtime.from_environment().home / "models"
    path = ensure_demo_model("smollm2-135m-instruct", models, "bfloat16", lambda *_: None)
    runs: dict[int, dict[str, list[Measurement]]] = {
        clients: defaultdict(list) for clients in REQUESTS
    }
    with (
        tera(None, models) as platform,
        vllm_server(path, platform.model, _arguments()) as plain,
    ):
        for number in range(rounds):
            for clients in REQUESTS:
                pair = [(platform, plain), (plain, platform)]
                for system, other in pair if number % 2 else reversed(pair):
                    with paused(other):
                        measured = _measure(system, clients, number)
                    runs[clients][system.name].append(measured)
    table = _table(runs, platform.name, plain.name)
    return table, {"runs": {str(clients): found for clients, found in runs.items()}}


def _arguments() -> list[str]:
    """Return the demo model's engine arguments as vLLM's command line has them."""
    platform = load_platform(default_values_file())
    args: dict[str, Any] = next(iter(platform.models.values())).engine.args
    words: list[str] = []
    for name, value in args.items():
        flag = "--" + name.replace("_", "-")
        words += [flag] if value is True else [flag, yaml.safe_dump(value).split("\n")[0]]
    return words


def _measure(system: System, clients: int, number: int) -> Measurement:
    # The warm-up's prompts are its own, so that it fills no prefix cache for what follows.
    measure_once(system, _load(system, clients, clients, f"warm {number}"))
    return measure(system, _load(system, clients, REQUESTS[clients], f"round {number}"))


def _load(system: System, clients: int, requests: int, seed: str) -> Load:
    chosen = random.Random(f"{seed} {clients}")  # noqa: S311  the same prompts for both systems
    bodies = []
    for _ in range(requests):
        words = ", ".join(
            f"{chosen.choice(_QUALITIES)} {chosen.choice(_SUBJECTS)} {chosen.randrange(1000)}"
            for _ in range(4)
        )
        bodies.append(
            json.dumps(
                {
                    "model": system.model,
                    "prompt": f"{words}. Once upon a time, in a country far from here, there was",
                    "max_tokens": TOKENS,
                    "temperature": 0,
                    "stream": True,
                    "stream_options": {"include_usage": True},
                }
            )
        )
    return Load(system.port, system.api_key, bodies, clients, requests)


def _table(
    runs: dict[int, dict[str, list[Measurement]]], platform_name: str, plain_name: str
) -> Table:
    busiest = max(
        run.others_cores for found in runs.values() for each in found.values() for run in each
    )
    table = Table(
        "clients",
        "vLLM tokens/s",
        "Tera tokens/s",
        "ratio",
        "vLLM first token",
        "Tera first token",
        "added",
        title=f"vllm: the demo model, streams of ≤ {TOKENS} tokens; goal ratio ≥ {GOAL_RATIO}",
        caption=f"medians of {len(runs[1][platform_name])} rounds; used by others meanwhile: at "
        f"most {busiest:.2f} cores",
    )
    for clients, found in runs.items():
        ours, plain = median(found[platform_name]), median(found[plain_name])
        ratio = ours.tokens_per_s / plain.tokens_per_s
        first_s, plain_first_s = ours.outcome.first_token_p50_s, plain.outcome.first_token_p50_s
        table.add_row(
            str(clients),
            f"{plain.tokens_per_s:.1f}",
            f"{ours.tokens_per_s:.1f}",
            f"[{'green' if ratio >= GOAL_RATIO else 'red'}]{ratio:.3f}[/]",
            f"{1000 * plain_first_s:.0f} ms",
            f"{1000 * first_s:.0f} ms",
            f"{1000 * (first_s - plain_first_s):+.0f} ms",
        )
    return table

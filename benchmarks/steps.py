"""How soon replicas are asked for when a queue steps up, and how soon a model at zero answers."""

import asyncio
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import uvloop
from rich.table import Table

from benchmarks.streams import StreamClient
from benchmarks.systems import System, tera
from tera.config.names import ENGINE_DEPLOYMENT, application_name
from tera.local.cluster import attached
from tera.local.state import LocalSecrets, LocalState

STREAMS, TARGET = 32, 4
WANTED = STREAMS // TARGET
DELAY_S = 10
GOAL_S = 5.0
DEADLINE_S = 90.0

VALUES = f"""
models:
  at-once:
    id: at-once
    engine: {{kind: simulated, args: {{profile: {{decode_step_s: 0.1}}}}}}
    replicas: {{min: 1, max: {WANTED + 2}}}
    scaling: {{targetOngoingRequests: {TARGET}, upscaleDelaySeconds: 0}}
  delayed:
    id: delayed
    engine: {{kind: simulated, args: {{profile: {{decode_step_s: 0.1}}}}}}
    replicas: {{min: 1, max: {WANTED + 2}}}
    scaling: {{targetOngoingRequests: {TARGET}, upscaleDelaySeconds: {DELAY_S}}}
  at-zero:
    id: at-zero
    engine: {{kind: simulated}}
    replicas: {{min: 0, max: 4}}
    scaling: {{targetOngoingRequests: {STREAMS}}}
"""

Figures = dict[str, Any]


def run(quick: bool) -> tuple[Table, dict[str, object]]:
    """Return the table and the figures behind it."""
    with tera(VALUES) as platform:
        home = Path(platform.process.environ()["TERA_HOME"])
        state, secrets = LocalState.read(home), LocalSecrets.of(home)
        with attached(state, secrets) as client:

            def replicas(model: str) -> tuple[int, int]:
                details = client.get_serve_details()["applications"][application_name(model)]
                found = details["deployments"][ENGINE_DEPLOYMENT]
                running = [each for each in found["replicas"] if each["state"] == "RUNNING"]
                return found["target_num_replicas"], len(running)

            models = ("at-once",) if quick else ("at-once", "delayed")
            figures = {model: uvloop.run(_step(platform, model, replicas)) for model in models}
            figures["at-zero"] = uvloop.run(_step(platform, "at-zero", replicas, wanted=1))
    return _table(figures), dict(figures)


async def _step(
    platform: System, model: str, replicas: Callable[[str], tuple[int, int]], wanted: int = WANTED
) -> Figures:
    """Return what happens when `STREAMS` streams begin at once and stay."""
    began = time.monotonic()
    tokens = 1_500 if wanted > 1 else 20

    async def stream(number: int) -> float:
        body = {"model": model, "prompt": f"Story number {number}", "max_tokens": tokens}
        async with StreamClient(platform.port, platform.api_key) as client:
            answer = await client.ask(body)
            assert not answer.error, answer.error
            return answer.arrivals_s[0] - began

    streams = [asyncio.create_task(stream(number)) for number in range(STREAMS)]
    targets: list[int] = []
    asked_s = running_s = None
    async with asyncio.timeout(DEADLINE_S):
        while running_s is None:
            target, running = await asyncio.to_thread(replicas, model)
            now = time.monotonic() - began
            if [target] != targets[-1:]:
                targets.append(target)
            if target >= wanted and asked_s is None:
                asked_s = now
            if running >= wanted:
                running_s = now
            await asyncio.sleep(0.05)
    figures = {"targets": targets, "asked_s": asked_s, "running_s": running_s}
    if wanted == 1:
        first_s = await asyncio.gather(*streams)
        return {**figures, "last_first_token_s": max(first_s)}
    for each in streams:
        each.cancel()
    for each in streams:
        with suppress(asyncio.CancelledError):
            await each
    return figures


def _table(figures: dict[str, Figures]) -> Table:
    table = Table(
        "what",
        "replicas asked for",
        "all asked for after",
        "running after",
        "goal",
        title=f"steps: {STREAMS} streams at once, {TARGET} aimed at per replica",
        caption=f"on {os.cpu_count()} cores, which the new processes share",
    )
    met = "met" if figures["at-once"]["asked_s"] <= GOAL_S else "missed"
    rows = {
        "at-once": ("no delay", f"≤ {GOAL_S:.0f} s: {met}"),
        "delayed": (f"upscaleDelaySeconds {DELAY_S}", "the same after the delay"),
        "at-zero": ("woken from zero", ""),
    }
    for model, found in figures.items():
        steps = " → ".join(map(str, found["targets"]))
        after = [f"{found[name]:.1f} s" for name in ("asked_s", "running_s")]
        what, goal = rows[model]
        if "last_first_token_s" in found:
            goal = f"all {STREAMS} first tokens after {found['last_first_token_s']:.1f} s"
        table.add_row(what, steps, *after, goal)
    return table

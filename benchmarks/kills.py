"""What a client notices when a replica is killed each five seconds: requests, texts, silences."""

import asyncio
import itertools
import json
import os
import random
import signal
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import msgspec
import uvloop
from rich.table import Table

from benchmarks.streams import Answer, StreamClient, ask_all
from benchmarks.systems import System, tera

REPLICAS = 3
STREAMS = 100
PROMPTS = 200
TOKENS = 150
STEP_S = 0.02
BETWEEN_KILLS_S = 5
"""Longer than any stream: one that loses two replicas within seconds is held to be their killer."""
STILL_ARRIVING_S = 0.1
SETTLE_DEADLINE_S = 20.0
GOAL_P50_S, GOAL_P99_S = 0.05, 0.1
"""Beside one prefill."""
PREFILL_P50_S, PREFILL_P99_S = 1.5 * STEP_S, 2 * STEP_S
"""The simulated engine ends the step under way and makes another: that is all that the prefill of
what a stream has so far takes."""

VALUES = f"""
models:
  simulated:
    id: simulated
    engine:
      kind: simulated
      args: {{profile: {{decode_step_s: {STEP_S}, prefill_tokens_per_s: 0, max_running: 256}}}}
    replicas: {{min: {REPLICAS}, max: {REPLICAS}}}
    scaling: {{maxOngoingRequests: 256}}
"""


class Used(msgspec.Struct, frozen=True):
    """Requests and their tokens, as the ledger or the answers have them."""

    requests: int
    prompt_tokens: int
    completion_tokens: int

    def difference(self, other: "Used") -> int:
        """Return the sum of all differences: 0 when both are the same."""
        pairs = zip(msgspec.structs.astuple(self), msgspec.structs.astuple(other), strict=True)
        return sum(abs(mine - theirs) for mine, theirs in pairs)


class Figures(msgspec.Struct, frozen=True):
    """What came of a run; a gap is the silence around a kill less the stream's usual one."""

    seconds: float
    kills: int
    requests: int
    failed: int
    first_errors: list[str]
    changed: int
    moved: int
    """Streams that went on from another replica."""
    moved_gap_s: dict[str, float]
    other_gap_s: dict[str, float]
    """Of streams that stayed where they were: what the machine itself adds."""
    ledger_difference: int


def run(quick: bool) -> tuple[Table, dict[str, object]]:
    """Return the table and the figures behind it."""
    with tera(VALUES) as platform:
        figures = uvloop.run(_run(platform, 15.0 if quick else 60.0))
    return _table(figures), msgspec.structs.asdict(figures)


async def _run(platform: System, seconds: float) -> Figures:
    bodies = [_body(platform.model, number) for number in range(PROMPTS)]
    calm = await ask_all(platform.port, platform.api_key, bodies, clients=STREAMS)
    undisturbed = [answer.text for answer in calm]
    errors = {answer.error for answer in calm} - {""}
    assert not errors, f"failed before any replica did: {errors}"
    killed_s, answers = await asyncio.gather(
        _kill(platform, seconds), _load(platform, bodies, seconds)
    )
    all_answers = [*calm, *(answer for _, answer in answers)]
    difference = await _ledger_difference(platform, _used(all_answers))
    moved_ids = await asyncio.to_thread(_moved, platform)
    whole = [(number, answer) for number, answer in answers if not answer.error]
    gaps_s = [
        (answer.request_id in moved_ids, gap_s)
        for _, answer in whole
        for moment_s in killed_s
        if (gap_s := _gap_s(answer, moment_s)) is not None
    ]
    return Figures(
        seconds=seconds,
        kills=len(killed_s),
        requests=len(answers),
        failed=len(answers) - len(whole),
        first_errors=[answer.error for _, answer in answers if answer.error][:3],
        changed=sum(answer.text != undisturbed[number] for number, answer in whole),
        moved=len(moved_ids),
        moved_gap_s=_quantiles([gap_s for moved, gap_s in gaps_s if moved]),
        other_gap_s=_quantiles([gap_s for moved, gap_s in gaps_s if not moved]),
        ledger_difference=difference,
    )


def _body(model: str, number: int) -> dict[str, Any]:
    """Return a request of its own prompt: every other one greedy, the rest seeded."""
    sampling = {"temperature": 0} if number % 2 else {"temperature": 0.8, "seed": number}
    prompt = f"Write about subject number {number} and what follows from it."
    return {"model": model, "prompt": prompt, "max_tokens": TOKENS, **sampling}


async def _load(
    platform: System, bodies: list[dict[str, Any]], seconds: float
) -> list[tuple[int, Answer]]:
    """Return the numbers of the prompts that were sent, and their answers."""
    answers: list[tuple[int, Answer]] = []
    numbers = itertools.cycle(range(len(bodies)))
    end = time.monotonic() + seconds

    async def client() -> None:
        async with StreamClient(platform.port, platform.api_key) as connection:
            while time.monotonic() < end:
                number = next(numbers)
                answers.append((number, await connection.ask(bodies[number])))

    await asyncio.gather(*(client() for _ in range(STREAMS)))
    return answers


async def _kill(platform: System, seconds: float) -> list[float]:
    """Kill a replica at a time, while others are there; return when each was killed."""
    rng = random.Random(0)  # noqa: S311  no secret
    began = time.monotonic()
    earlier = set(_replicas(platform))
    killed_s: list[float] = []
    for after_s in range(BETWEEN_KILLS_S // 2, int(seconds), BETWEEN_KILLS_S):
        await asyncio.sleep(began + after_s - time.monotonic())
        replicas = set(_replicas(platform))
        # One that was there at the last kill has work by now.
        victims = sorted(replicas & earlier)
        if len(victims) > 1:
            killed_s.append(time.monotonic())
            os.kill(rng.choice(victims), signal.SIGKILL)
        earlier = replicas
    return killed_s


def _replicas(platform: System) -> list[int]:
    """Return the process ids of the replicas.

    From the processes: `tera status` says the same, and takes a second of CPU from the streams.
    """
    return [
        process.pid
        for process in platform.process.children(recursive=True)
        if "ServeReplica:model-" in "".join(process.cmdline())
    ]


async def _ledger_difference(platform: System, expected: Used) -> int:
    """Return how far the ledger is from what clients were told, once it stands still."""
    end = time.monotonic() + SETTLE_DEADLINE_S
    while True:
        rows = json.loads(await asyncio.to_thread(platform.command, "usage", "--json"))
        names = Used.__struct_fields__
        difference = Used(*(sum(row[name] for row in rows) for name in names)).difference(expected)
        if not difference or time.monotonic() > end:
            return difference
        await asyncio.sleep(0.5)


def _used(answers: list[Answer]) -> Used:
    usages = [answer.usage for answer in answers if answer.usage is not None]
    return Used(
        len(answers),
        sum(usage["prompt_tokens"] for usage in usages),
        sum(usage["completion_tokens"] for usage in usages),
    )


def _moved(platform: System) -> set[str]:
    """Return the ids of the requests that another replica went on with, from the ledger."""
    with TemporaryDirectory(prefix="tera-bench-") as directory:
        platform.command("usage", "export", "--directory", directory)
        lines = [
            json.loads(line)
            for file in Path(directory).rglob("*.jsonl")
            for line in file.read_text().splitlines()
        ]
    return {line["request_id"] for line in lines if line.get("replica_switches")}


def _gap_s(answer: Answer, moment_s: float) -> float | None:
    """Return the silence around a kill, less the stream's usual one; None if it spans no kill."""
    arrivals_s = answer.arrivals_s
    if not arrivals_s or not arrivals_s[0] < moment_s < arrivals_s[-1]:
        return None
    around = [
        after_s - before_s
        for before_s, after_s in itertools.pairwise(arrivals_s)
        # What the replica had sent before its death arrives a moment later.
        if after_s > moment_s and before_s < moment_s + STILL_ARRIVING_S
    ]
    return max(around) - statistics.median(answer.silences_s())


def _quantiles(gaps_s: list[float]) -> dict[str, float]:
    if not gaps_s:
        return {}
    ordered = sorted(gaps_s)
    places = {"p50": 0.5, "p99": 0.99, "max": 1.0}
    return {name: ordered[int(place * (len(ordered) - 1))] for name, place in places.items()}


def _table(figures: Figures) -> Table:
    table = Table(
        "what",
        "figure",
        "goal",
        title=f"kills: {REPLICAS} simulated replicas, {STREAMS} streams at a time, one replica "
        f"killed each {BETWEEN_KILLS_S} s for {figures.seconds:g} s",
        caption=f"{1000 * STEP_S:g} ms a token, a prefill is the step under way and one more; a "
        "gap is a stream's longest silence around a kill less its median one",
    )

    def row(what: str, figure: str, goal: str = "", met: bool | None = None) -> None:
        verdict = "" if met is None else ": met" if met else ": missed"
        table.add_row(what, figure, goal + verdict)

    def gaps(gaps_s: dict[str, float]) -> str:
        return ", ".join(f"{name} {1000 * gap_s:.0f} ms" for name, gap_s in gaps_s.items()) or "–"

    row("replicas killed; streams moved", f"{figures.kills}; {figures.moved}")
    row("requests", f"{figures.requests:,}")
    row("failed", str(figures.failed), "0", figures.failed == 0)
    row("changed texts", str(figures.changed), "0", figures.changed == 0)
    moved = figures.moved_gap_s
    row(
        "gap of a moved stream",
        gaps(moved),
        f"p50 ≤ {1000 * GOAL_P50_S:g} + {1000 * PREFILL_P50_S:g} ms, "
        f"p99 ≤ {1000 * GOAL_P99_S:g} + {1000 * PREFILL_P99_S:g} ms",
        bool(moved)
        and moved["p50"] <= GOAL_P50_S + PREFILL_P50_S
        and moved["p99"] <= GOAL_P99_S + PREFILL_P99_S,
    )
    row("the same of the other streams", gaps(figures.other_gap_s))
    row("ledger difference", str(figures.ledger_difference), "0", figures.ledger_difference == 0)
    for error in figures.first_errors:
        row("  an error", error[:60])
    return table

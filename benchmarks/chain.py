"""What Tera adds to a streamed request: the whole chain without a model, beside bare uvicorn."""

import http.client
import json

from rich.table import Table

from benchmarks.load import Load
from benchmarks.measure import Measurement, idle_cpu_ms_per_s, measure, measure_once, median, paused
from benchmarks.systems import System, bare_uvicorn, tera

CLIENTS = 64
TOKENS = 64
GOAL_CPU_MS = 5.0

VALUES = """
models:
  simulated:
    id: simulated
    engine:
      kind: simulated
      args: {profile: {decode_step_s: 0, prefill_tokens_per_s: 0, max_running: 256}}
    scaling: {maxOngoingRequests: 256}
redis:
  embedded: true
"""


def run(quick: bool) -> tuple[Table, dict[str, object]]:
    """Return the table and the figures behind it."""
    rounds, seconds = (1, 3.0) if quick else (3, 6.0)
    with tera(VALUES) as platform:
        body, events = _long_answer(platform)
        with bare_uvicorn(events, platform.model) as bare:
            idle = idle_cpu_ms_per_s(platform, seconds)
            runs: dict[str, list[Measurement]] = {bare.name: [], platform.name: []}
            for _ in range(rounds):
                for system, other in ((bare, platform), (platform, bare)):
                    with paused(other):
                        measure_once(system, _load(system, body, 1.0))  # warm
                        runs[system.name].append(measure(system, _load(system, body, seconds)))
    floor, whole = median(runs[bare.name]), median(runs[platform.name])
    return _table(floor, whole, idle), {"idle_cpu_ms_per_s": idle, "runs": runs}


def _load(system: System, body: str, seconds: float) -> Load:
    return Load(system.port, system.api_key, [body], CLIENTS, 100_000, seconds)


def _long_answer(platform: System) -> tuple[str, list[bytes]]:
    """Return a request whose answer is no shorter than `TOKENS`, and the answer's events."""
    for number in range(100):
        body = json.dumps(
            {
                "model": platform.model,
                "prompt": f"Write about subject number {number} and what follows from it.",
                "max_tokens": TOKENS,
                "temperature": 0,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
        )
        connection = http.client.HTTPConnection("127.0.0.1", platform.port, timeout=30)
        headers = {
            "authorization": f"Bearer {platform.api_key}",
            "content-type": "application/json",
        }
        connection.request("POST", "/v1/completions", body, headers)
        answer = connection.getresponse().read()
        connection.close()
        if b'"finish_reason":"length"' in answer:
            return body, [event + b"\n\n" for event in answer.split(b"\n\n") if event]
    raise AssertionError("no simulated answer is long enough")


def _table(floor: Measurement, whole: Measurement, idle: dict[str, float]) -> Table:
    goal = "met" if whole.cpu_ms_per_request <= GOAL_CPU_MS else "missed"
    table = Table(
        "system",
        "requests/s",
        "CPU ms/request",
        "× bare",
        "first token p50",
        "whole p50",
        "idle CPU ms/s",
        title=f"chain: {TOKENS}-token streams, {CLIENTS} clients, no model time; "
        f"goal ≤ {GOAL_CPU_MS:g} ms: {goal}",
        caption=f"{whole.outcome.events / whole.outcome.requests:.1f} events per answer; used by "
        f"others meanwhile: {floor.others_cores:.2f} (bare) and {whole.others_cores:.2f} cores",
    )
    for name, run, idle_ms in (
        ("bare uvicorn", floor, 0.0),
        ("Tera, all processes", whole, sum(idle.values())),
    ):
        table.add_row(
            name,
            f"{run.requests_per_s:.0f}",
            f"{run.cpu_ms_per_request:.2f}",
            f"{run.cpu_ms_per_request / floor.cpu_ms_per_request:.2f}",
            f"{1000 * run.outcome.first_token_p50_s:.0f} ms",
            f"{1000 * run.outcome.request_p50_s:.0f} ms",
            f"{idle_ms:.0f}",
        )
    for kind, cpu_s in sorted(whole.cpu_s.items(), key=lambda item: -item[1]):
        cpu_ms = 1000 * cpu_s / whole.outcome.requests
        share = f"{100 * cpu_s / sum(whole.cpu_s.values()):.0f} %"
        table.add_row(f"  {kind}", "", f"{cpu_ms:.2f}", share, "", "", f"{idle.get(kind, 0):.0f}")
    return table

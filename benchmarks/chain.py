"""What Tera adds to a request: the whole chain without a model, beside a bare uvloop server.

Streams come as users meet them, a token each 20 ms and every token an event of its own, with 64
and 200 of them open; and unpaced, as fast as everything goes; and a short JSON answer.
"""

import http.client
import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from benchmarks.load import Load
from benchmarks.measure import Measurement, idle_cpu_ms_per_s, measure, measure_once, median, paused
from benchmarks.systems import Source, System, floor, tera

TOKENS = 64
STEP_S = 0.02
PROMPT = "Write about subject number 0 and what follows from it."
"""The simulated engine answers it with `TOKENS` tokens and more."""

VALUES = """
models:
  simulated:
    id: simulated
    engine:
      kind: simulated
      args: {{profile: {{decode_step_s: {step_s}, prefill_tokens_per_s: 0, max_running: 256}}}}
    scaling: {{maxOngoingRequests: 256}}
redis:
  embedded: true
"""


@dataclass(frozen=True)
class Scenario:
    """One kind of load, and what it may cost."""

    name: str
    clients: int
    step_s: float = 0.0
    stream: bool = True
    goal_all_ms: float | None = None
    """CPU of all processes per request."""
    goal_gateway_floors: float | None = None
    """CPU of the gateway per request, in multiples of the floor's."""
    goal_first_token_ms: float | None = None


SCENARIOS = (
    Scenario("unpaced stream", 64, goal_all_ms=2.2),
    Scenario("JSON of 16 tokens", 64, stream=False, goal_all_ms=1.8),
    Scenario("one client", 1, goal_first_token_ms=3.0),
    Scenario("paced, 64 open", 64, STEP_S, goal_gateway_floors=2.5),
    Scenario("paced, 200 open", 200, STEP_S),
)
GATEWAY = "gateway replica"


def run(quick: bool, beside: Path | None = None) -> tuple[Table, dict[str, object]]:
    """Return the table and the figures behind it; `beside` is another checkout to compare with."""
    rounds, seconds = (1, 3.0) if quick else (3, 6.0)
    results: dict[str, dict[str, list[Measurement]]] = {}
    idle: dict[str, float] = {}
    for step_s in (0.0, STEP_S):
        with _systems(step_s, beside) as systems:
            if not step_s:
                idle = idle_cpu_ms_per_s(systems[1], seconds)
            for scenario in SCENARIOS:
                if scenario.step_s == step_s:
                    results[scenario.name] = _interleaved(scenario, systems, rounds, seconds)
    return _table(results, idle), {"idle_cpu_ms_per_s": idle, "runs": results}


@contextmanager
def _systems(step_s: float, beside: Path | None) -> Iterator[list[System]]:
    """Run the floor, this checkout and perhaps another one, all with the same step."""
    values = VALUES.format(step_s=step_s)
    with ExitStack() as stack:
        platforms = [stack.enter_context(tera(values))]
        if beside is not None:
            other = tera(values, source=Source("before", beside))
            platforms.append(stack.enter_context(other))
        events, answer = _recorded(platforms[0])
        yield [stack.enter_context(floor(events, answer, step_s)), *platforms]


def _interleaved(
    scenario: Scenario, systems: list[System], rounds: int, seconds: float
) -> dict[str, list[Measurement]]:
    runs: dict[str, list[Measurement]] = {system.name: [] for system in systems}
    for _ in range(rounds):
        for system in systems:
            with ExitStack() as stack:
                for other in systems:
                    if other is not system:
                        stack.enter_context(paused(other))
                measure_once(system, _load(scenario, system, 1.0))  # warm
                runs[system.name].append(measure(system, _load(scenario, system, seconds)))
    return runs


def _load(scenario: Scenario, system: System, seconds: float) -> Load:
    body = _body(system.model, stream=scenario.stream)
    return Load(
        system.port, system.api_key, [body], scenario.clients, 1_000_000, seconds, scenario.stream
    )


def _body(model: str, *, stream: bool) -> str:
    fields: dict[str, object] = {
        "model": model,
        "prompt": PROMPT,
        "max_tokens": TOKENS if stream else 16,
        "temperature": 0,
    }
    if stream:
        fields |= {"stream": True, "stream_options": {"include_usage": True}}
    return json.dumps(fields)


def _recorded(platform: System) -> tuple[list[bytes], bytes]:
    """Return the events of a stream and the body of a JSON answer, as a platform gives them."""
    stream = _asked(platform, _body(platform.model, stream=True))
    answer = _asked(platform, _body(platform.model, stream=False))
    # Else the simulated text has changed, and the figures are not those of 64 tokens.
    assert b'"finish_reason":"length"' in stream, "the simulated answer is too short"
    return [event + b"\n\n" for event in stream.split(b"\n\n") if event], answer


def _asked(platform: System, body: str) -> bytes:
    connection = http.client.HTTPConnection("127.0.0.1", platform.port, timeout=30)
    headers = {
        "authorization": f"Bearer {platform.api_key}",
        "content-type": "application/json",
    }
    connection.request("POST", "/v1/completions", body, headers)
    answer = connection.getresponse().read()
    connection.close()
    return answer


def _table(
    results: Mapping[str, Mapping[str, list[Measurement]]], idle: Mapping[str, float]
) -> Table:
    table = Table(
        "load",
        "system",
        "requests/s",
        "CPU ms, all",
        "CPU ms, gateway",
        "× floor",
        "µs a token",
        "first token p50",
        "goal",
        title=f"chain: {TOKENS}-token streams and short JSON answers, no model time; idle "
        f"{sum(idle.values()):.0f} ms/s",
    )
    for scenario in SCENARIOS:
        floor_ms = 0.0
        for name, runs in results[scenario.name].items():
            middle = median(runs)
            all_ms, gateway_ms = middle.cpu_ms_per_request, _gateway_ms(middle)
            floor_ms = floor_ms or all_ms
            tokens = middle.outcome.completion_tokens / middle.outcome.requests
            table.add_row(
                scenario.name,
                name,
                f"{middle.requests_per_s:.0f}",
                f"{all_ms:.2f}",
                f"{gateway_ms:.2f}",
                f"{gateway_ms / floor_ms:.2f}",
                f"{1000 * gateway_ms / tokens:.0f}",
                f"{1000 * middle.outcome.first_token_p50_s:.1f} ms",
                _verdict(scenario, middle, floor_ms) if name == "Tera" else "",
            )
    return table


def _gateway_ms(measured: Measurement) -> float:
    cpu_s = measured.cpu_s.get(GATEWAY)
    if cpu_s is None:  # the floor is one process
        return measured.cpu_ms_per_request
    return 1000 * cpu_s / measured.outcome.requests


def _verdict(scenario: Scenario, measured: Measurement, floor_ms: float) -> str:
    found = {
        "all ms": (measured.cpu_ms_per_request, scenario.goal_all_ms),
        "× floor": (_gateway_ms(measured) / floor_ms, scenario.goal_gateway_floors),
        "ms": (1000 * measured.outcome.first_token_p50_s, scenario.goal_first_token_ms),
    }
    return ", ".join(
        f"≤ {goal:g} {unit}: {'met' if value <= goal else 'missed'}"
        for unit, (value, goal) in found.items()
        if goal is not None
    )

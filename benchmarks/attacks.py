"""What a tenant feels of another one's attacks: times to the first token and between tokens.

A platform with one gateway replica and one simulated engine. One tenant asks for streams, with a
token each 20 ms, at first alone and then while another tenant attacks at full speed; so for each
attack. Nothing bounds the attacker: it has no limits.
"""

import asyncio
import itertools
import json
import subprocess
import sys
from contextlib import suppress
from typing import Any, Final

import httpx
import msgspec
import uvloop
from prometheus_client.parser import text_string_to_metric_families
from rich.table import Table

from benchmarks.hostile_senders import ATTACKS, Sent
from benchmarks.streams import Answer, StreamClient
from benchmarks.systems import System, tera

STEP_S = 0.02
STREAMS = 8
TOKENS = 40
GOAL_RATIO: Final = 2.0
GOAL_STALL_S = 0.02

VALUES = f"""
gateway:
  replicas: {{min: 1, max: 1}}
models:
  simulated:
    id: simulated
    engine:
      kind: simulated
      args:
        profile: {{decode_step_s: {STEP_S}, prefill_tokens_per_s: 0, max_running: 1024,
                   context_tokens: 8192}}
    replicas: {{min: 1, max: 1}}
    scaling: {{maxOngoingRequests: 1024}}
"""


class Felt(msgspec.Struct, frozen=True):
    """What one tenant's clients saw in a while, in seconds."""

    first_token_p99_s: float
    between_tokens_p99_s: float
    streams: int
    failed: int
    stalls: int
    """Times that the gateway's event loop was over 20 ms late."""
    longest_stall_s: float
    """The bound of the bucket that the longest one is in."""


class Attacked(msgspec.Struct, frozen=True):
    """One attack."""

    before: Felt
    during: Felt
    sent: Sent
    charged_tokens: int

    @property
    def ratios(self) -> tuple[float, float]:
        """Times to the first token and between tokens, beside those before."""
        return (
            self.during.first_token_p99_s / self.before.first_token_p99_s,
            self.during.between_tokens_p99_s / self.before.between_tokens_p99_s,
        )


def run(quick: bool) -> tuple[Table, dict[str, object]]:
    """Return the table and the figures behind it."""
    seconds = 4.0 if quick else 20.0
    names = list(ATTACKS)[:2] if quick else list(ATTACKS)
    found: dict[str, Attacked] = {}
    with tera(VALUES) as platform:
        tenant, attacker = (_key(platform, name) for name in ("quiet", "hostile"))
        uvloop.run(_streams(platform, tenant, 2.0))  # what the first requests load
        for name in names:
            found[name] = _attacked(platform, tenant, attacker, name, seconds)
    return _table(found), {name: msgspec.to_builtins(it) for name, it in found.items()}


def _key(platform: System, tenant: str) -> str:
    made = json.loads(platform.command("keys", "create", "--tenant", tenant, "--json"))
    return str(made["key"])


def _attacked(platform: System, tenant: str, attacker: str, name: str, seconds: float) -> Attacked:
    before = _felt(platform, tenant, seconds)
    charged = _charged(platform)
    command = [sys.executable, "-m", "benchmarks.hostile_senders", name, str(platform.port)]
    process = subprocess.Popen(  # noqa: S603  our own module
        [*command, attacker, str(seconds + 2)], stdout=subprocess.PIPE
    )
    try:
        during = _felt(platform, tenant, seconds)
        told, _ = process.communicate(timeout=seconds + 60)
    finally:
        process.kill()
        process.wait()
    sent = msgspec.json.decode(told, type=Sent)
    return Attacked(before, during, sent, _charged(platform) - charged)


def _felt(platform: System, api_key: str, seconds: float) -> Felt:
    lags = _lags(platform)
    answers = uvloop.run(_streams(platform, api_key, seconds))
    late = {bound: count - lags.get(bound, 0.0) for bound, count in _lags(platform).items()}
    good = [answer for answer in answers if not answer.error]
    firsts = [answer.arrivals_s[0] - answer.sent_s for answer in good]
    gaps = [gap for answer in good for gap in answer.silences_s()]
    stalls, longest_s = _stalls(late)
    return Felt(
        *(_p99(firsts), _p99(gaps), len(answers), len(answers) - len(good)), stalls, longest_s
    )


async def _streams(platform: System, api_key: str, seconds: float) -> list[Answer]:
    loop = asyncio.get_running_loop()
    until = loop.time() + seconds
    prompts = itertools.count()
    answers: list[Answer] = []

    async def client() -> None:
        async with StreamClient(platform.port, api_key) as connection:
            while loop.time() < until:
                body: dict[str, Any] = {"model": "simulated", "max_tokens": TOKENS}
                body["prompt"] = f"Question {next(prompts)}"
                body["logit_bias"] = {"256": -100}  # the model does not end its text by itself
                answers.append(await connection.ask(body))

    await asyncio.gather(*(client() for _ in range(STREAMS)))
    return answers


def _p99(values: list[float]) -> float:
    ordered = sorted(values)
    return ordered[int(0.99 * (len(ordered) - 1))] if ordered else float("inf")


def _lags(platform: System) -> dict[float, float]:
    """Return how often the event loop has been late by at most each bound."""
    url = f"http://127.0.0.1:{platform.port}/metrics/all"
    text = httpx.get(url, timeout=30, trust_env=False).text
    return {
        float(sample.labels["le"]): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == "tera_event_loop_lag_seconds_bucket"
    }


def _stalls(late: dict[float, float]) -> tuple[int, float]:
    """Return how many were over the goal, and the bound of the longest."""
    bounds = sorted(late)
    within = [bound for bound in bounds if bound <= GOAL_STALL_S]
    if not within:
        return 0, 0.0
    over = late[bounds[-1]] - late[within[-1]]
    longest_s = next((bound for bound in bounds if late[bound] >= late[bounds[-1]]), 0.0)
    return round(over), longest_s


def _charged(platform: System) -> int:
    """Return the tokens in the ledger for the attacker's requests so far."""
    rows: list[dict[str, Any]] = []
    with suppress(json.JSONDecodeError):
        told = platform.command("usage", "--tenant", "hostile", "--since", "1h", "--json")
        rows = json.loads(told)
    return sum(row["prompt_tokens"] + row["completion_tokens"] for row in rows)


def _table(found: dict[str, Attacked]) -> Table:
    table = Table(
        *("attack", "requests", "answers", "tokens charged", "first token p99", "between p99"),
        *("loop over 20 ms", "failed"),
        title=f"attacks: what a tenant with {STREAMS} streams feels of another one's",
        caption=f"before → during; at most {GOAL_RATIO:g} × before, and no stall of the event loop "
        "over 20 ms",
    )
    for name, it in found.items():
        first, between = it.ratios
        longest_ms = 1000 * it.during.longest_stall_s
        table.add_row(
            name,
            str(it.sent.requests),
            " ".join(f"{status}: {count}" for status, count in sorted(it.sent.by_status.items())),
            f"{it.charged_tokens:,}",
            _change(it.before.first_token_p99_s, it.during.first_token_p99_s, first),
            _change(it.before.between_tokens_p99_s, it.during.between_tokens_p99_s, between),
            f"{it.before.stalls} → {it.during.stalls}, up to {longest_ms:.0f} ms",
            f"{it.during.failed} of {it.during.streams}",
        )
    return table


def _change(before_s: float, during_s: float, ratio: float) -> str:
    return f"{1000 * before_s:.0f} → {1000 * during_s:.0f} ms ({ratio:.1f} ×)"

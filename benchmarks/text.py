"""What text costs in the gateway: validation and rendering of a request, relaying of a token."""

import asyncio
import json
import random
import re
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from rich.table import Table

from benchmarks.load import Load
from benchmarks.measure import idle_cpu_ms_per_s, measure_once
from benchmarks.systems import System, tera
from tera.config.environment import Runtime, set_environment
from tera.contract.common import parse_request
from tera.contract.completions import CompletionRequest
from tera.contract.json_body import parse_json_object
from tera.gateway.dialects.chat import ChatQuestion
from tera.gateway.grammars import Grammars
from tera.gateway.request import Conversation
from tera.gateway.vllm_text import VllmTextModel
from tera.local.demo_model import ensure_demo_model

GOAL_CHAT_MS, GOAL_SHORT_MS, GOAL_RELAY_US = 3.0, 0.5, 30.0
CONTEXT_TOKENS = 8192
TURNS, WORDS = 10, 95
CLIENTS, TOKENS = 32, 256

_VOCABULARY = re.findall(
    r"\w+",
    "river market engine garden letter harbour mirror planet the a of under with quickly old "
    "silent copper walked wrote asked because whenever nobody thirty light window answer",
)

RELAY_VALUES = """
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
STEPS_S = {"under load": 0.0, "a step each 20 ms": 0.02}
"""As fast as it goes, and as slow as a large model: then every token is an event and a write of
its own, and the process wakes up for it with cold caches."""


def run(quick: bool) -> tuple[Table, dict[str, object]]:
    """Return the table and the figures behind it."""
    repeats = 20 if quick else 100
    rendering = asyncio.run(_rendering(repeats))
    relay_us = {name: _relay_us(step_s) for name, step_s in STEPS_S.items()}
    table = Table(
        "what",
        "prompt tokens",
        "CPU",
        "of it validation",
        "goal",
        title="text: CPU in the gateway, medians, with the demo model's tokenizer",
        caption=f"relaying: {CLIENTS} streams at once; the gateway replica's CPU for {TOKENS} "
        "tokens over its CPU for one",
    )
    for name, found in rendering.items():
        goal_ms = GOAL_SHORT_MS if "completion" in name else GOAL_CHAT_MS
        table.add_row(
            name,
            str(found["prompt_tokens"]),
            f"{found['whole_ms']:.2f} ms",
            f"{found['validation_ms']:.2f} ms",
            _verdict(found["whole_ms"], goal_ms, "ms"),
        )
    for name, cost_us in relay_us.items():
        table.add_row(
            f"relay a token ({name})",
            "",
            f"{cost_us:.1f} µs",
            "",
            _verdict(cost_us, GOAL_RELAY_US, "µs"),
        )
    return table, {"rendering": rendering, "relay_us": relay_us}


def _verdict(found: float, goal: float, unit: str) -> str:
    return f"≤ {goal:g} {unit}: {'met' if found <= goal else 'missed'}"


async def _rendering(repeats: int) -> dict[str, dict[str, Any]]:
    set_environment({"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}, keep_existing=True)
    set_environment({"VLLM_LOGGING_LEVEL": "ERROR"}, keep_existing=True)
    models = Runtime.from_environment().home / "models"
    path = ensure_demo_model("smollm2-135m-instruct", models, "bfloat16", lambda *_: None)
    model = VllmTextModel.load(
        str(path), {"max_model_len": CONTEXT_TOKENS, "dtype": "bfloat16"}, Grammars()
    )

    async def completion(body: bytes) -> tuple[float, int]:
        request = parse_request(CompletionRequest, parse_json_object(body))
        validated = time.process_time()
        (prompt,) = request.prompt
        assert isinstance(prompt, str)
        return validated, len(await model.encode(prompt))

    async def chat(body: bytes) -> tuple[float, int]:
        content = ChatQuestion(parse_json_object(body)).request.content
        validated = time.process_time()
        assert isinstance(content, Conversation)
        return validated, len((await model.render_chat(content)).token_ids)

    seeds = [random.Random(number) for number in range(repeats)]  # noqa: S311  the same each time
    new = [_conversation(seed) for seed in seeds]
    longer = [
        [*messages, _message("user", seed)] for messages, seed in zip(new, seeds, strict=True)
    ]
    return {
        "short completion": await _timed(
            completion, [{"prompt": f"The capital of country {n} is"} for n in range(repeats)]
        ),
        "chat, all new": await _timed(chat, [{"messages": messages} for messages in new]),
        "chat, one message more": await _timed(chat, [{"messages": them} for them in longer]),
    }


def _message(role: str, seed: random.Random) -> dict[str, str]:
    return {"role": role, "content": " ".join(seed.choices(_VOCABULARY, k=WORDS))}


def _conversation(seed: random.Random) -> list[dict[str, str]]:
    return [_message(role, seed) for _ in range(TURNS) for role in ("user", "assistant")]


async def _timed(
    work: Callable[[bytes], Awaitable[tuple[float, int]]], bodies: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Return the medians over the bodies, each of which is rendered once."""
    await work(_body({"prompt": "warm", "messages": [{"role": "user", "content": "warm"}]}))
    whole_ms, validation_ms, prompt_tokens = [], [], 0
    for body in map(_body, bodies):
        began = time.process_time()
        validated, prompt_tokens = await work(body)
        whole_ms.append(1000 * (time.process_time() - began))
        validation_ms.append(1000 * (validated - began))
    middle = len(bodies) // 2
    return {
        "prompt_tokens": prompt_tokens,
        "whole_ms": sorted(whole_ms)[middle],
        "validation_ms": sorted(validation_ms)[middle],
    }


def _body(fields: dict[str, Any]) -> bytes:
    return json.dumps({"model": "m", "max_tokens": 64, **fields}).encode()


def _relay_us(step_s: float) -> float:
    """Return the gateway replica's CPU per token beyond the first of a stream, in µs."""
    with tera(RELAY_VALUES.format(step_s=step_s)) as platform:
        measure_once(platform, _load(platform, TOKENS, CLIENTS))  # warm
        idle_s = idle_cpu_ms_per_s(platform, 5.0)["gateway replica"] / 1000
        long = measure_once(platform, _load(platform, TOKENS, 4 * CLIENTS))
        short = measure_once(platform, _load(platform, 1, 16 * CLIENTS))
    long_s, short_s = (
        run.cpu_s["gateway replica"] - idle_s * run.outcome.wall_s for run in (long, short)
    )
    tokens_s = long_s - short_s * long.outcome.requests / short.outcome.requests
    return 1e6 * tokens_s / (long.outcome.completion_tokens - long.outcome.requests)


def _load(system: System, tokens: int, requests: int) -> Load:
    bodies = [
        json.dumps(
            {
                "model": system.model,
                "prompt": f"Write about subject number {number} and what follows from it.",
                "max_tokens": tokens,
                "temperature": 0,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
        )
        for number in range(CLIENTS)
    ]
    return Load(system.port, system.api_key, bodies, CLIENTS, requests)

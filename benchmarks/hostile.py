"""What the dearest bodies and prompts cost the gateway, and what they cost another tenant.

Those that are refused, and those that are accepted; each is measured in its own process.
"""

import gc
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
from rich.table import Table

from benchmarks.hostile_bodies import BODIES
from benchmarks.hostile_neighbours import Felt
from tera.contract.common import parse_request
from tera.contract.json_body import parse_json_object
from tera.errors import InvalidRequestError
from tera.gateway.encode import TextEncoder
from tera.gateway.least_tokens import ContextBound, least_tokens
from tera.gateway.text_pool import SHORT_BYTES
from tera.local.demo_model import ensure_demo_model

MOST_BYTES = 10 * 1024 * 1024
"""Of a body, by default."""
GOALS_S = {SHORT_BYTES: 0.02, MOST_BYTES: 1.0}
GOAL_MIB = 200
CONTEXT_TOKENS = 8192

PROMPTS = {
    "digits": "1234567890",
    "a word of one letter": "a",
    "prose": "It is a truth, universally acknowledged: that. ",
    "Japanese": "日本語",
    "spaces": " ",
}
"""What a prompt repeats."""


class Cost(msgspec.Struct, frozen=True):
    """What one body or prompt took, and what was answered."""

    cpu_s: float
    memory_mib: float
    """At the most, beside what the process and the request take before."""
    answer: str


def run(quick: bool) -> tuple[Table, dict[str, object]]:
    """Return the table and the figures behind it."""
    sizes = [SHORT_BYTES] if quick else list(GOALS_S)
    cases = [(name, size) for size in sizes for name in BODIES]
    model_path = ensure_demo_model(
        "smollm2-135m-instruct", Path(".tera/models"), "bfloat16", lambda *_: None
    )
    bodies = {(name, size): _measured("body", name, str(size)) for name, size in cases}
    texts = {name: _measured("prompt", name, str(model_path)) for name in PROMPTS}
    felt = _felt_by_others(str(model_path))
    table = Table(
        "what",
        *(column for size in sizes for column in (_size(size), "memory")),
        "answer",
        title="hostile: CPU and memory of one request, up to its refusal; what others feel of "
        "those that are accepted",
        caption=", ".join(f"{_size(size)}: {GOALS_S[size]} s" for size in sizes)
        + f" and {GOAL_MIB} MiB at the most; prompts for a context of {CONTEXT_TOKENS} tokens",
    )
    for name in BODIES:
        found = [bodies[name, size] for size in sizes]
        table.add_row(name, *(cell for each in found for cell in _cells(each)), found[-1].answer)
    for name, cost in texts.items():
        before = [""] * (2 * len(sizes) - 2)
        table.add_row(f"prompt: {name}", *before, *_cells(cost), cost.answer)
    for name, it in felt.items():
        what = (
            f"{1000 * it.stall_s:.0f} ms at the most that the event loop stands still, "
            f"{1000 * it.waited_s:.0f} that another tenant waits"
        )
        before = [""] * (2 * len(sizes) - 2)
        table.add_row(f"accepted: {name}", *before, f"{it.each_s:.3f} s", "", what)
    figures = {f"{name}, {_size(size)}": cost for (name, size), cost in bodies.items()}
    return table, {
        "bodies": msgspec.to_builtins(figures),
        "prompts": msgspec.to_builtins(texts),
        "felt_by_others": msgspec.to_builtins(felt),
    }


def _size(size: int) -> str:
    return f"{size // 1024} KiB"


def _cells(cost: Cost) -> tuple[str, str]:
    return f"{cost.cpu_s:.3f} s", f"{cost.memory_mib:.0f} MiB"


def _measured(*arguments: str) -> Cost:
    """Measure in a new process: the memory that one body took is not given back."""
    command = [sys.executable, "-m", "benchmarks.hostile", *arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE)  # noqa: S603  of ourselves
    return msgspec.json.decode(done.stdout, type=Cost)


def _felt_by_others(model_path: str) -> dict[str, Felt]:
    command = [sys.executable, "-m", "benchmarks.hostile_neighbours", model_path]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE)  # noqa: S603  of ourselves
    return msgspec.json.decode(done.stdout.splitlines()[-1], type=dict[str, Felt])


def body_cost(name: str, size: int) -> Cost:
    """Read one body in this process."""
    kind, make = BODIES[name]
    body = make(size)
    return _cost(lambda: parse_request(kind, parse_json_object(body)))


def prompt_cost(name: str, model_path: str) -> Cost:
    """Encode a prompt of ten megabytes in this process, or refuse to."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_file=f"{model_path}/tokenizer.json")
    encoder = TextEncoder.of(tokenizer)
    assert encoder is not None
    bound = ContextBound(CONTEXT_TOKENS, least_tokens(tokenizer))
    piece = PROMPTS[name]
    prompt = piece * (MOST_BYTES // len(piece.encode()))

    def encode() -> None:
        bound.check(prompt, "prompt")
        encoder.encode(prompt, add_special_tokens=True)

    return _cost(encode)


def _cost(work: Callable[[], object]) -> Cost:
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # forget how much memory there ever was
    before_mib = _memory_mib()
    began = time.process_time()
    answer = "accepted"
    try:
        work()
    except InvalidRequestError as error:
        answer = f"{error.code}: {error.message}"
    return Cost(time.process_time() - began, _memory_mib() - before_mib, answer[:200])


def _memory_mib() -> float:
    """Return the most memory that this process has had since it was told to forget."""
    status = Path("/proc/self/status").read_text()
    found = re.search(r"VmHWM:\s*(\d+) kB", status)
    assert found is not None
    return int(found[1]) / 1024


def main(what: str, name: str, argument: str) -> None:
    """Print the cost of one body or prompt as JSON."""
    cost = body_cost(name, int(argument)) if what == "body" else prompt_cost(name, argument)
    print(msgspec.json.encode(cost).decode())


if __name__ == "__main__":
    main(*sys.argv[1:])

"""A vLLM model's `engine.args`: vLLM's own arguments, except those that are set elsewhere."""

import difflib
from collections.abc import Iterable, Iterator
from collections.abc import Set as AbstractSet
from typing import Any, Final

from tera.config.vllm_arguments import VLLM_ARGUMENTS

FRONTEND_ARGS: Final = ("tool_call_parser", "chat_template")
"""Entries of a vllm model's `engine.args` that are for the gateway, not for the engine."""

SET_ELSEWHERE: Final = {
    "model": "set source instead",
    "tensor_parallel_size": "set parallelism.tensor instead",
    "pipeline_parallel_size": "set parallelism.pipeline instead",
    "enable_sleep_mode": "set gpuSharing.replicasPerGpu instead",
    "worker_extension_cls": "Tera uses its own extension there",
}
"""vLLM's arguments that `engine.args` may not contain, and why."""

SCHEMA: Final[dict[str, Any]] = {
    "if": {"properties": {"kind": {"const": "vllm"}}},
    "then": {
        "properties": {
            "args": {
                "properties": dict.fromkeys(sorted({*VLLM_ARGUMENTS, *FRONTEND_ARGS}), True),
                "additionalProperties": False,
            }
        }
    },
}
"""What the JSON Schema of an engine says of its arguments; a kind that is absent is vllm."""


def argument_faults(args: Iterable[str], known: AbstractSet[str], path: str) -> Iterator[str]:
    """Yield one line for each argument that vLLM does not have, or that is set elsewhere.

    Args:
        args: names in a model's `engine.args`.
        known: vLLM's own arguments.
        path: that of `engine.args` in the values.
    """
    for name in args:
        if name in SET_ELSEWHERE:
            yield f"{path}.{name}: {SET_ELSEWHERE[name]}"
        elif name not in known and name not in FRONTEND_ARGS:
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            yield f"{path}.{name}: vLLM has no such argument; {nearest} is nearest"

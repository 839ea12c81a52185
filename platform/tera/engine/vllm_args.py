"""A vLLM model's `engine.args`: vLLM's own arguments, except those that are set elsewhere."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import JsonValue

from tera.config.engine_args import argument_faults
from tera.engine.vllm_worker import WorkerExtension
from tera.errors import ConfigError
from tera.upstream.vllm import argument_names
from tera.upstream.xgrammar import BACKEND

if TYPE_CHECKING:
    from vllm.engine.arg_utils import AsyncEngineArgs

_STRUCTURED = "structured_outputs_config"

WORKER_EXTENSION = f"{WorkerExtension.__module__}.{WorkerExtension.__qualname__}"

_SHARED_GPU_MEMORY_RATIO = 0.85
"""Default `gpu_memory_utilization` on a shared GPU: sleeping engines keep about a GiB each."""


def async_engine_args(
    args: Mapping[str, JsonValue], *, sleeps: bool, **decided: JsonValue
) -> "AsyncEngineArgs":
    """Return the arguments to start vLLM with.

    Args:
        args: a model's `engine.args`.
        sleeps: whether the engine can release its GPU's memory.
        decided: arguments that come from other parts of the model's configuration.

    Raises:
        ConfigError: an argument is unknown, or is set elsewhere.
        ValueError: vLLM refuses a value.
        TypeError: likewise.
    """
    from vllm.config.structured_outputs import StructuredOutputsConfig
    from vllm.engine.arg_utils import AsyncEngineArgs

    check_args(args, "engine.args")
    given: dict[str, Any] = {**(_sleep_args() if sleeps else {}), **args, **decided}
    structured = {**(given.get(_STRUCTURED) or {}), "backend": BACKEND}
    given[_STRUCTURED] = StructuredOutputsConfig(**structured)  # vLLM sets attributes of it
    return AsyncEngineArgs(**given, worker_extension_cls=WORKER_EXTENSION)


def check_args(args: Mapping[str, JsonValue], path: str) -> None:
    """Refuse arguments that the installed vLLM does not have, without taking seconds to import it.

    Args:
        args: vLLM's `AsyncEngineArgs` by name.
        path: their path in the values.

    Raises:
        ConfigError: one line per unknown argument, with the nearest existing name.
    """
    known = argument_names()
    if not known:
        return
    faults = [*argument_faults(args, known, path)]
    structured = args.get(_STRUCTURED)
    if isinstance(structured, Mapping) and structured.get("backend", BACKEND) != BACKEND:
        faults.append(f"{path}.{_STRUCTURED}.backend: is always {BACKEND}")
    if faults:
        raise ConfigError("\n".join(faults))


def _sleep_args() -> dict[str, Any]:
    from vllm.platforms import current_platform

    if not current_platform.is_sleep_mode_available():
        return {}
    return {"enable_sleep_mode": True, "gpu_memory_utilization": _SHARED_GPU_MEMORY_RATIO}

"""Tera's uses of private parts of vLLM's engine.

Tested with vLLM 0.32. `vllm_text`, `vllm_grammar` and `vllm_penalties` have the rest: the
text side, structured output, and penalties. To move to another vLLM, see `symbols.PAGE`.
"""

import ast
import importlib.util
from collections.abc import Callable
from importlib.metadata import entry_points
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tera.errors import ConfigError, StartError
from tera.upstream.symbols import PAGE, Literal, Symbol, check

if TYPE_CHECKING:
    from vllm.outputs import RequestOutput
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.output_processor import RequestOutputCollector
    from vllm.v1.metrics.loggers import StatLoggerBase

_ASYNC = "vllm.v1.engine.async_llm"
_CLIENT = "vllm.v1.engine.core_client"
_COLLECTOR = "vllm.v1.engine.output_processor"
_ENVIRONMENT = "vllm.envs"
_LOGGERS = "vllm.v1.metrics.loggers"
_OUTPUTS = "vllm.outputs"
_SAMPLING = "vllm.sampling_params"

PLUGIN_GROUP = "vllm.general_plugins"
PLUGIN = "tera"
"""The entry point through which vLLM's own processes load `tera.engine.vllm_plugin`."""

NEEDS = (
    Symbol(
        _ASYNC,
        "AsyncLLM.from_engine_args",
        "an engine is made of the arguments in the values, and reports its steps to us",
        call="engine_args stat_loggers",
    ),
    Symbol(
        _ASYNC,
        "AsyncLLM.add_request",
        "a generation begins without a task that waits for its tokens",
        call="request_id prompt params",
        awaited=True,
    ),
    Symbol(
        _ASYNC,
        "AsyncLLM.abort",
        "what nobody wants any more frees its KV blocks; `internal` is vLLM's own name of it",
        call="request_id internal",
        awaited=True,
    ),
    Symbol(
        _ASYNC,
        "AsyncLLM.collective_rpc",
        "each worker is told once to count resumed tokens",
        call="method",
        awaited=True,
    ),
    Symbol(_ASYNC, "AsyncLLM.check_health", "a dead engine is seen", call="", awaited=True),
    Symbol(
        _ASYNC,
        "AsyncLLM.sleep",
        "engines that share a GPU take turns, and open generations wait: `mode` is keep",
        call="level mode",
        awaited=True,
    ),
    Symbol(_ASYNC, "AsyncLLM.wake_up", "they go on", call="", awaited=True),
    Symbol(_ASYNC, "AsyncLLM.shutdown", "the engine's processes end", call="timeout"),
    Symbol(_ASYNC, "AsyncLLM.engine_core", "the way to those processes"),
    Symbol(_CLIENT, "MPClient.resources", "the way to those processes"),
    Symbol(_CLIENT, "BackgroundResources.engine_manager", "the way to those processes"),
    Symbol(
        "vllm.v1.engine.utils",
        "CoreEngineProcManager.processes",
        "vLLM kills a late one without waiting for it, and its GPU memory stays taken meanwhile",
    ),
    Symbol(
        _COLLECTOR,
        "RequestOutputCollector.put",
        "vLLM delivers a step's outputs by it; ours takes its place",
        exact="self output",
    ),
    Symbol(
        _COLLECTOR,
        "RequestOutputCollector.get_nowait",
        "what was delivered before that",
        call="",
    ),
    Symbol(_COLLECTOR, "RequestOutputCollector.request_id", "vLLM's own name of a request"),
    Symbol(
        _LOGGERS,
        "StatLoggerBase.record",
        "the running generations, the KV cache's use and the time of each step",
        exact="self scheduler_stats iteration_stats mm_cache_stats engine_idx",
    ),
    Symbol(_LOGGERS, "StatLoggerBase.__init__", "as above", exact="self vllm_config engine_index"),
    Symbol(_LOGGERS, "StatLoggerBase.log_engine_initialized", "as above", exact="self"),
    Symbol("vllm.v1.metrics.stats", "SchedulerStats.num_running_reqs", "as above"),
    Symbol("vllm.v1.metrics.stats", "SchedulerStats.kv_cache_usage", "as above"),
    Literal(_LOGGERS, "vllm:num_preemptions", "docs/sizing.md names it"),
    Symbol("vllm.engine.arg_utils", "EngineArgs", "values are checked by the names of its fields"),
    Symbol("vllm.engine.arg_utils", "AsyncEngineArgs", "as above"),
    Symbol(
        "vllm.engine.arg_utils",
        "EngineArgs.worker_extension_cls",
        "`tera.engine.vllm_worker` comes into vLLM's workers by it",
    ),
    Symbol(
        "vllm.platforms.interface",
        "Platform.is_sleep_mode_available",
        "on a CPU an engine keeps its memory while it sleeps",
        call="",
    ),
    Symbol(
        "vllm.inputs.engine",
        "tokens_input",
        "token ids in, and the salt that keeps tenants apart in the prefix cache",
        call="prompt_token_ids cache_salt",
    ),
    Symbol(_SAMPLING, "SamplingParams.extra_args", "how many tokens of the prompt were generated"),
    Symbol(_SAMPLING, "SamplingParams.skip_clone", "a copy of each request's parameters is saved"),
    Symbol(_SAMPLING, "RequestOutputKind.DELTA", "outputs hold what is new"),
    Symbol(_OUTPUTS, "RequestOutput.num_cached_tokens", "usage tells it"),
    Symbol(_OUTPUTS, "RequestOutput.prompt_logprobs", "log-probabilities of a prompt"),
    Symbol(_OUTPUTS, "CompletionOutput.token_ids", "token ids out"),
    Symbol(_OUTPUTS, "CompletionOutput.finish_reason", "why a generation ended"),
    Symbol(_OUTPUTS, "CompletionOutput.logprobs", "log-probabilities of its tokens"),
    Symbol("vllm.logprobs", "Logprob.rank", "the likeliest tokens are told in order"),
    Symbol("vllm.exceptions", "VLLMClientError", "a refusal is the client's fault"),
    Symbol("vllm.exceptions", "GracefulHTTPError", "a full engine is nobody's fault"),
    Symbol("vllm.v1.engine.exceptions", "EngineDeadError", "a dead engine is replaced"),
    Literal("vllm.plugins", PLUGIN_GROUP, "the plugin is loaded"),
    Literal(_ENVIRONMENT, "VLLM_PLUGINS", "whether the plugin is loaded"),
    Literal(_ENVIRONMENT, "VLLM_CACHE_ROOT", "the chart keeps what vLLM compiles"),
    Literal(_ENVIRONMENT, "VLLM_CPU_KVCACHE_SPACE", "`tera serve` bounds an engine's memory"),
    Literal(_ENVIRONMENT, "VLLM_LOGGING_LEVEL", "`tera serve` keeps the terminal quiet"),
    Literal(_ENVIRONMENT, "VLLM_NO_USAGE_STATS", "nothing is sent to anybody"),
)
"""What an engine process uses."""


def check_engine() -> None:
    """Check that Tera can run the engine of this version of vLLM.

    Raises:
        StartError: it cannot, or vLLM would not load Tera's plugin.
        ConfigError: `VLLM_PLUGINS` leaves Tera's plugin out.
    """
    check(NEEDS)
    from vllm import envs

    check_plugin(envs.VLLM_PLUGINS)


def check_plugin(allowed: list[str] | None) -> None:
    """Check that vLLM's processes will load Tera's plugin.

    Without it, vLLM would run as usual, but structured answers that moved to another replica would
    not fit their format.

    Args:
        allowed: the plugins named in `VLLM_PLUGINS`; None if it is not set, so that all are loaded.

    Raises:
        StartError: vLLM cannot find it.
        ConfigError: `VLLM_PLUGINS` leaves it out.
    """
    if not entry_points(group=PLUGIN_GROUP, name=PLUGIN):
        raise StartError(
            f"vLLM does not find Tera's plugin, the entry point {PLUGIN!r} of {PLUGIN_GROUP}: "
            f"install Tera as a package. See {PAGE}."
        )
    if allowed is not None and PLUGIN not in allowed:
        raise ConfigError(f"VLLM_PLUGINS: has to name {PLUGIN!r} too, or not to be set at all")


def argument_names() -> set[str]:
    """Return the names of vLLM's engine arguments from its source; none if there is no vLLM.

    Raises:
        StartError: they are not where they used to be.
    """
    vllm = importlib.util.find_spec("vllm")
    if vllm is None or not vllm.submodule_search_locations:
        return set()
    # Read and not imported, since an import of vLLM takes seconds.
    source = Path(vllm.submodule_search_locations[0], "engine", "arg_utils.py")
    names = {
        statement.target.id
        for block in (ast.parse(source.read_text("utf-8")).body if source.is_file() else [])
        if isinstance(block, ast.ClassDef) and block.name in ("EngineArgs", "AsyncEngineArgs")
        for statement in block.body
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)
    }
    if not names:
        raise StartError(f"vLLM's engine arguments are not in {source}; see {PAGE}.")
    return names


def deliver(
    collector: "RequestOutputCollector", put: "Callable[[RequestOutput | Exception], None]"
) -> None:
    """Call `put` with each output of a request, from vLLM's own loop over a step's outputs.

    `AsyncLLM.generate` instead waits on the collector, which wakes a task for each token of each
    request. Outputs that vLLM put into the collector before this call are delivered at once.
    """
    early: RequestOutput | Exception | None
    try:
        early = collector.get_nowait()  # type: ignore[assignment]  # no pooling request is made
    except Exception as error:  # noqa: BLE001  the error that ended the request is delivered
        early = error
    collector.put = put  # type: ignore[method-assign,assignment]
    if early is not None:
        put(early)


def stat_logger(record: Callable[[Any], None]) -> "type[StatLoggerBase]":
    """Return a class for `AsyncLLM` that calls `record` after each step.

    Args:
        record: called with vLLM's `SchedulerStats`, or None if a step produced none.
    """
    from vllm.v1.metrics.loggers import StatLoggerBase

    class StepLogger(StatLoggerBase):
        """Runs beside vLLM's own loggers."""

        def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
            del vllm_config, engine_index

        def record(
            self,
            scheduler_stats: Any,
            iteration_stats: Any,
            mm_cache_stats: Any = None,
            engine_idx: int = 0,
        ) -> None:
            record(scheduler_stats)

        def log_engine_initialized(self) -> None:
            pass

    return StepLogger


def engine_processes(llm: "AsyncLLM") -> list[BaseProcess]:
    """Return the processes of the engine core; the workers are their children."""
    from vllm.v1.engine.utils import CoreEngineProcManager

    manager = llm.engine_core.resources.engine_manager
    return list(manager.processes) if isinstance(manager, CoreEngineProcManager) else []

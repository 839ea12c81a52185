"""vLLM behind the engine protocol: token ids in, token ids out, no text."""

import ast
import asyncio
import contextlib
import difflib
import importlib.util
import logging
import re
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prometheus_client import REGISTRY, CollectorRegistry, Metric, generate_latest
from prometheus_client.registry import Collector
from pydantic import JsonValue

from tera.engine.vllm_plugin import RESUMED
from tera.errors import (
    ConfigError,
    ContextLengthError,
    EngineError,
    EngineStalledError,
    InvalidValueError,
    ReplicaLostError,
    TeraError,
)
from tera.generation import (
    FinishReason,
    Generation,
    ReplicaLoad,
    TokenDelta,
    TokenLogprobs,
)
from tera.upstream.vllm import deliver

# vLLM takes ten seconds to import and is not installed beside every part of Tera, so it is
# imported where an engine starts and wherever one has started.
if TYPE_CHECKING:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.outputs import RequestOutput
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.metrics.loggers import StatLoggerBase

log = logging.getLogger(__name__)

_SET_ELSEWHERE = {
    "model": "source",
    "tensor_parallel_size": "parallelism.tensor",
    "pipeline_parallel_size": "parallelism.pipeline",
    "enable_sleep_mode": "gpuSharing.replicasPerGpu",
}
"""vLLM arguments that other parts of a model's configuration decide."""

_SHUTDOWN_S = 20
"""How long vLLM's processes may take to end before they are killed; they take about six."""

_SHARED_GPU_MEMORY_RATIO = 0.85
"""`gpu_memory_utilization` on a shared GPU, unless said: sleeping engines keep about a GiB each."""

_SEED_STRIDE = 0x9E3779B97F4A7C15
_PARAMETER_SUFFIX = re.compile(r" \(parameter=.*\)$", re.DOTALL)
"""What vLLM appends to a validation message for its own server."""


class _StepFigures:
    """What vLLM reported after its latest step."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.running = 0
        self.kv_usage_ratio = 0.0
        self.steps = 0
        self.progress_at = clock()

    def record(self, scheduler_stats: Any) -> None:
        self.steps += 1
        self.progress_at = self._clock()
        if scheduler_stats is not None:
            self.running = scheduler_stats.num_running_reqs
            self.kv_usage_ratio = scheduler_stats.kv_cache_usage


class VllmEngine:
    """vLLM's `AsyncLLM`, whose engine core runs in a process of its own.

    A resumed generation is a prompt to vLLM, which keeps its sampling state elsewhere than in
    token ids. What is done about it:

    - greedy: exact in float32; in bfloat16 near-ties may fall the other way after the cut.
    - seed: the continuation is deterministic, but not the one that the lost replica would have
      sampled. It draws from a seed of its own, so it does not repeat the first part's draws.
    - frequency and presence penalty count the resumed tokens, through `logit_bias`. One
      deviation: a resumed token that is generated again meets the presence penalty twice.
    - repetition penalty counts prompt and generated tokens alike, so it is exact.
    - structured output: `vllm_plugin` leads the grammar through the resumed tokens.
    """

    def __init__(
        self, llm: "AsyncLLM", figures: _StepFigures, stall_s: float, clock: Callable[[], float]
    ) -> None:
        self._llm = llm
        self._figures = figures
        self._stall_s = stall_s
        self._clock = clock
        self._context_tokens: int = llm.model_config.max_model_len
        self._open: dict[_Run, None] = {}
        self._aborting: set[asyncio.Task[None]] = set()
        self._asleep = False
        self._closing: asyncio.Task[None] | None = None

    @classmethod
    async def launch(
        cls,
        model_path: str,
        args: dict[str, JsonValue],
        *,
        tensor_parallel: int = 1,
        pipeline_parallel: int = 1,
        sleeps: bool = False,
        stall_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> "VllmEngine":
        """Load a model; blocks the event loop until it is loaded.

        Args:
            model_path: directory with the model's files.
            args: a model's `engine.args`, vLLM's `AsyncEngineArgs` by name.
            tensor_parallel: GPUs that share every layer.
            pipeline_parallel: workers that hold consecutive layers.
            sleeps: whether it can give its GPU's memory back; on a CPU it sleeps and keeps it.
            stall_s: with work and no step for this long, `check_health` raises. The longest
                step is one prefill of `max_num_batched_tokens`.
            clock: monotonic seconds.

        Raises:
            ConfigError: an argument is unknown, or vLLM refuses its value.
            ReplicaLostError: vLLM's processes failed to start.
        """
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        _check_args(args, {field.name for field in fields(AsyncEngineArgs)}, "engine.args")
        figures = _StepFigures(clock)
        try:
            engine_args = _engine_args(
                {**_sleep_args(), **args} if sleeps else args,
                model=model_path,
                tensor_parallel_size=tensor_parallel,
                pipeline_parallel_size=pipeline_parallel,
            )
            # Not in a thread: AsyncLLM binds its sockets and tasks to the running loop.
            llm = AsyncLLM.from_engine_args(engine_args, stat_loggers=[_stat_logger(figures)])
        except (ValueError, TypeError) as error:
            raise ConfigError(f"engine.args: vLLM refuses them: {error}") from error
        except RuntimeError as error:
            raise ReplicaLostError("The engine did not start.") from error
        return cls(llm, figures, stall_s, clock)

    def start(
        self,
        generation: Generation,
        emit: Callable[[TokenDelta], None],
        ended: Callable[[TeraError], None],
    ) -> Callable[[], None]:
        """Begin a generation; see `TextEngine.start`."""
        if not self._open:
            self._figures.progress_at = self._clock()  # idle time is no stall
        run = _Run(generation, emit, ended, self._forget)
        self._open[run] = None
        run.adding = asyncio.create_task(self._add(run))
        return run.abort

    async def _add(self, run: "_Run") -> None:
        """Give a generation to vLLM, which adds it in a coroutine of its own."""
        from vllm.inputs import tokens_input

        if run.over:
            return
        generation = run.generation
        try:
            if self._closing is not None:
                raise ReplicaLostError("The engine has stopped.")
            self._check(generation)
            collector = await self._llm.add_request(
                generation.request_id,
                tokens_input(generation.token_ids),
                _sampling_params(generation),
            )
        except TeraError as error:
            run.end(error)
        except Exception as error:  # noqa: BLE001  vLLM refuses with errors of many kinds
            run.end(_refusal(error))
        else:
            run.vllm_id = collector.request_id
            if run.over:  # aborted before vLLM had it
                self._forget(run)
            deliver(collector, run.put)

    def _forget(self, run: "_Run") -> None:
        """Forget a run that is over, and have vLLM forget one that it still works on."""
        self._open.pop(run, None)
        if run.vllm_id is not None and not run.finished:
            abort = asyncio.create_task(self._abort(run.vllm_id))
            self._aborting.add(abort)
            abort.add_done_callback(self._aborting.discard)

    async def _abort(self, vllm_id: str) -> None:
        from vllm.v1.engine.exceptions import EngineDeadError

        with contextlib.suppress(EngineDeadError):
            await self._llm.abort(vllm_id, internal=True)

    def load(self) -> ReplicaLoad:
        """Return the figures of the latest step; see `Engine.load`."""
        # vLLM reports after a step, so a generation that has just come or gone is known here
        # before it is in a report.
        if not self._open:
            return ReplicaLoad()
        running = min(self._figures.running, len(self._open))
        return ReplicaLoad(running, len(self._open) - running, self._figures.kv_usage_ratio)

    def metrics_text(self) -> str:
        """Return vLLM's `vllm:` families in Prometheus text form."""
        # vLLM registers them in the process's default registry, one engine per process.
        registry = CollectorRegistry()
        registry.register(_VllmFamilies())
        return generate_latest(registry).decode()

    async def check_health(self) -> None:
        """Return if the engine can make progress; see `Engine.check_health`."""
        from vllm.v1.engine.exceptions import EngineDeadError

        if self._closing is not None:
            raise ReplicaLostError("The engine has stopped.")
        try:
            await self._llm.check_health()
        except EngineDeadError as error:
            raise ReplicaLostError("The engine has stopped.") from error
        stalled = self._clock() - self._figures.progress_at > self._stall_s
        if self._open and not self._asleep and stalled:
            raise EngineStalledError("The engine makes no progress.")

    async def sleep(self) -> None:
        """Move the weights to the host's memory and drop the KV cache; see `Sleeper.sleep`.

        Open generations stay with vLLM, which computes their KV cache anew when it wakes.

        Raises:
            ReplicaLostError: vLLM failed.
        """
        self._asleep = True
        await self._told(self._llm.sleep(level=1, mode="keep"))

    async def wake(self) -> None:
        """Bring the weights back; see `Sleeper.wake`.

        Raises:
            ReplicaLostError: vLLM failed, such as for want of GPU memory.
        """
        await self._told(self._llm.wake_up())
        self._figures.progress_at = self._clock()
        self._asleep = False

    async def _told(self, order: Awaitable[object]) -> None:
        try:
            await order
        except Exception as error:  # the engine core's own, of any kind
            raise ReplicaLostError("The engine did not fall asleep or wake up.") from error

    async def close(self) -> None:
        """Stop the engine core and its workers; takes some seconds."""
        if self._closing is None:
            self._closing = asyncio.create_task(asyncio.to_thread(_shut_down, self._llm))
            for run in list(self._open):
                run.end(ReplicaLostError("The engine has stopped."))
        await asyncio.shield(self._closing)

    def _check(self, generation: Generation) -> None:
        prompt_tokens = len(generation.token_ids)
        if prompt_tokens >= self._context_tokens:
            raise ContextLengthError(
                f"This model's context is {self._context_tokens} tokens; the prompt has "
                f"{prompt_tokens} and leaves no room for an answer.",
                param="prompt",
            )


class _Run:
    """One generation inside vLLM."""

    def __init__(
        self,
        generation: Generation,
        emit: Callable[[TokenDelta], None],
        ended: Callable[[TeraError], None],
        on_over: Callable[["_Run"], None],
    ) -> None:
        """`on_over` is called once, when nobody is to be told anything any more."""
        self.generation = generation
        self._emit = emit
        self._ended = ended
        self._on_over = on_over
        self.adding: asyncio.Task[None] | None = None
        """Held, since the event loop holds tasks only weakly."""
        self.vllm_id: str | None = None
        """vLLM's own name of it, from when vLLM has it."""
        self.over = False
        self.finished = False
        """vLLM has nothing more to do for it."""

    def put(self, output: "RequestOutput | Exception") -> None:
        """Take what vLLM's step has made, or the error by which vLLM has ended.

        Raises nothing: vLLM calls it from its loop over all generations.
        """
        if self.over:
            return
        if isinstance(output, Exception):
            self.end(_failure(output))
            return
        reason = output.outputs[0].finish_reason
        if reason not in (None, "stop", "length"):
            self.end(EngineError("The engine gave this generation up."))
            return
        try:
            delta = _delta(self.generation, output)
        except Exception as error:  # noqa: BLE001  what vLLM has made of it is of no use
            self.end(_failure(error), finished=reason is not None)
            return
        if reason is not None:
            self._leave(finished=True)
        try:
            self._emit(delta)
        except Exception:
            log.exception("Nobody could take a generation's tokens; it is aborted.")
            self.abort()

    def end(self, error: TeraError, *, finished: bool = True) -> None:
        """Say that it has ended without a finish reason; `finished` if vLLM knows it."""
        if self.over:
            return
        self._leave(finished=finished)
        try:
            self._ended(error)
        except Exception:
            log.exception("Nobody could be told that a generation has ended.")

    def abort(self) -> None:
        """Let it go; see `TextEngine.start`."""
        if not self.over:
            self._leave(finished=False)

    def _leave(self, *, finished: bool) -> None:
        self.over = True
        self.finished = finished
        self._on_over(self)


class _VllmFamilies(Collector):
    def collect(self) -> Iterable[Metric]:
        return [family for family in REGISTRY.collect() if family.name.startswith("vllm:")]


def check_args(args: Mapping[str, JsonValue], path: str) -> None:
    """Refuse arguments that vLLM does not have, without the seconds that importing it takes.

    Args:
        args: vLLM's `AsyncEngineArgs` by name.
        path: where they stand in the values.

    Raises:
        ConfigError: one line for each argument, with the nearest name that there is.
    """
    known = argument_names()
    if known:
        _check_args(args, known, path)


def argument_names() -> set[str]:
    """Return the names of vLLM's engine arguments from its source; none if there is no vLLM."""
    vllm = importlib.util.find_spec("vllm")
    if vllm is None or not vllm.submodule_search_locations:
        return set()
    source = Path(vllm.submodule_search_locations[0]) / "engine" / "arg_utils.py"
    return {
        statement.target.id
        for block in ast.parse(source.read_text(encoding="utf-8")).body
        if isinstance(block, ast.ClassDef) and block.name in ("EngineArgs", "AsyncEngineArgs")
        for statement in block.body
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)
    }


def _check_args(args: Mapping[str, JsonValue], known: set[str], path: str) -> None:
    faults = []
    for name in args:
        if name in _SET_ELSEWHERE:
            faults.append(f"{path}.{name}: set {_SET_ELSEWHERE[name]} instead")
        elif name not in known:
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            faults.append(f"{path}.{name}: vLLM has no such argument; {nearest} is nearest")
    if faults:
        raise ConfigError("\n".join(faults))


def _sleep_args() -> dict[str, Any]:
    from vllm.platforms import current_platform

    if not current_platform.is_sleep_mode_available():
        return {}
    return {"enable_sleep_mode": True, "gpu_memory_utilization": _SHARED_GPU_MEMORY_RATIO}


def _engine_args(args: Mapping[str, Any], **decided: Any) -> "AsyncEngineArgs":
    from vllm.engine.arg_utils import AsyncEngineArgs

    return AsyncEngineArgs(**args, **decided)


def _stat_logger(figures: _StepFigures) -> "type[StatLoggerBase]":
    from vllm.v1.metrics.loggers import StatLoggerBase

    class StepLogger(StatLoggerBase):
        """Keeps the figures of the latest step; vLLM's own loggers stay beside it."""

        def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
            del vllm_config, engine_index

        def record(
            self,
            scheduler_stats: Any,
            iteration_stats: Any,
            mm_cache_stats: Any = None,
            engine_idx: int = 0,
        ) -> None:
            figures.record(scheduler_stats)

        def log_engine_initialized(self) -> None:
            pass

    return StepLogger


def _sampling_params(generation: Generation) -> "SamplingParams":
    from vllm.sampling_params import (
        RequestOutputKind,
        SamplingParams,
        StructuredOutputsParams,
    )

    sampling = generation.sampling
    greedy = sampling.temperature <= 0 or sampling.top_p <= 0
    return SamplingParams(
        max_tokens=sampling.max_tokens,
        temperature=0.0 if greedy else sampling.temperature,
        top_p=1.0 if greedy else sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        seed=_seed(sampling.seed, generation.resumed_tokens),
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        repetition_penalty=sampling.repetition_penalty,
        logit_bias=_logit_bias(generation),
        logprobs=sampling.logprobs,
        prompt_logprobs=sampling.prompt_logprobs,
        ignore_eos=sampling.ignore_eos,
        structured_outputs=(
            None if sampling.structured is None else StructuredOutputsParams(**sampling.structured)
        ),
        extra_args={RESUMED: generation.resumed_tokens} if generation.resumed_tokens else None,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
        skip_clone=True,  # this object belongs to this generation alone
    )


def _seed(seed: int | None, resumed_tokens: int) -> int | None:
    """Return a seed that torch takes: 63 bits, and another one for each place of resumption."""
    if seed is None:
        return None
    return (seed + resumed_tokens * _SEED_STRIDE) & (2**63 - 1)


def _logit_bias(generation: Generation) -> dict[int, float] | None:
    """Return the asked bias, and as bias what the resumed tokens owe to the penalties.

    vLLM counts only tokens that it has generated itself.
    """
    sampling = generation.sampling
    bias = dict(sampling.logit_bias or {})
    resumed_tokens = generation.resumed_tokens
    if resumed_tokens and (sampling.presence_penalty or sampling.frequency_penalty):
        for token_id, count in Counter(generation.token_ids[-resumed_tokens:]).items():
            owed = sampling.presence_penalty + sampling.frequency_penalty * count
            bias[token_id] = bias.get(token_id, 0.0) - owed
    return bias or None


def _delta(generation: Generation, output: "RequestOutput") -> TokenDelta:
    completion = output.outputs[0]
    token_ids = list(completion.token_ids)
    logprobs = prompt_logprobs = None
    count = generation.sampling.logprobs
    if count is not None and completion.logprobs is not None:
        positions: Iterable[Any] = completion.logprobs
        logprobs = [
            _token_logprobs(token_id, entries, count)
            for token_id, entries in zip(token_ids, positions, strict=True)
        ]
    count = generation.sampling.prompt_logprobs
    if count is not None and output.prompt_logprobs:  # empty on every delta but the first
        positions = output.prompt_logprobs
        prompt_logprobs = [
            None if entries is None else _token_logprobs(token_id, entries, count)
            for token_id, entries in zip(generation.token_ids, positions, strict=True)
        ]
    return TokenDelta(
        generation.generation_id,
        token_ids,
        None if completion.finish_reason is None else FinishReason(completion.finish_reason),
        output.num_cached_tokens or 0,
        logprobs,
        prompt_logprobs,
    )


def _token_logprobs(token_id: int, entries: Mapping[int, Any], count: int) -> TokenLogprobs:
    # vLLM gives the chosen token besides the asked number of likeliest ones.
    ranked = sorted((entry.rank, other, entry.logprob) for other, entry in entries.items())
    top = [(other, logprob) for rank, other, logprob in ranked if rank <= count]
    return TokenLogprobs(token_id, entries[token_id].logprob, top[:count])


def _refusal(error: Exception) -> TeraError:
    """Return our error for what vLLM raises when it is given a generation."""
    from vllm.exceptions import GracefulHTTPError, VLLMClientError

    if isinstance(error, VLLMClientError | ValueError):
        return _caused(_invalid(error), error)
    if isinstance(error, GracefulHTTPError):  # vLLM's own queue bounds, if somebody sets them
        return _caused(EngineError("The engine is busy."), error)
    return _failure(error)


def _failure(error: Exception) -> TeraError:
    """Return our error for what has ended a generation, or vLLM with all of them."""
    from vllm.v1.engine.exceptions import EngineDeadError

    if isinstance(error, EngineDeadError):
        return _caused(ReplicaLostError("The engine has stopped."), error)
    log.error("vLLM failed a generation.", exc_info=error)
    return _caused(EngineError("The engine failed this generation."), error)


def _caused(error: TeraError, cause: Exception) -> TeraError:
    error.__cause__ = cause
    return error


def _invalid(error: Exception) -> InvalidValueError:
    """Return vLLM's refusal without what it says to its own server."""
    parameter = getattr(error, "parameter", None)
    message = _PARAMETER_SUFFIX.sub("", str(error)).splitlines()
    return InvalidValueError(
        message[0] if message else "The engine refuses these parameters.", param=parameter
    )


def _shut_down(llm: "AsyncLLM") -> None:
    manager = llm.engine_core.resources.engine_manager
    llm.shutdown(timeout=_SHUTDOWN_S)
    for process in getattr(manager, "processes", []):
        process.join(_SHUTDOWN_S)  # vLLM kills a late one and does not wait for it

"""vLLM behind the engine protocol: token ids in, token ids out, no text."""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from pydantic import JsonValue

from tera.engine.bounds import check_bounds
from tera.engine.vllm_args import async_engine_args
from tera.engine.vllm_figures import StepFigures, metrics_text
from tera.engine.vllm_run import Run, refusal
from tera.engine.vllm_sampling import sampling_params
from tera.engine.vllm_worker import WorkerExtension
from tera.errors import (
    ConfigError,
    EngineStalledError,
    ReplicaLostError,
    StartError,
    TeraError,
)
from tera.generation import Generation, ReplicaLoad, TokenDelta
from tera.upstream.vllm import check_engine, deliver, engine_processes, stat_logger
from tera.upstream.vllm_grammar import leave_check_to_gateways

# vLLM takes ten seconds to import and is not installed with every part of Tera, so it is only
# imported in functions that start an engine or run once one has started.
if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

_SHUTDOWN_S = 20
"""Seconds that vLLM's processes get to end before they are killed; they take about six."""


class VllmEngine:
    """vLLM's `AsyncLLM`, whose engine core runs in a process of its own.

    To vLLM a resumed generation is a new prompt, but its sampling state is not in the token ids.
    So these cases are handled:

    - greedy: exact in float32; in bfloat16 near-ties may be decided differently afterwards.
    - seed: the continuation is deterministic, but not the one that the lost replica would have
      sampled. It uses a different seed, so that it does not repeat the first part's draws.
    - penalties count the resumed tokens as generated ones (`vllm_penalties`), so they are exact.
    - structured output: `vllm_plugin` advances the grammar through the resumed tokens.
    """

    def __init__(
        self, llm: "AsyncLLM", figures: StepFigures, stall_s: float, clock: Callable[[], float]
    ) -> None:
        self._llm = llm
        self._figures = figures
        self._stall_s = stall_s
        self._clock = clock
        self._context_tokens: int = llm.model_config.max_model_len
        self._open: dict[Run, None] = {}
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
            sleeps: whether it can release its GPU's memory; on a CPU it sleeps but keeps its
            memory.
            stall_s: if there is work but no step for this long, `check_health` raises. The longest
                step is one prefill of `max_num_batched_tokens`.
            clock: monotonic seconds.

        Raises:
            ConfigError: an argument is unknown, or vLLM refuses its value.
            ReplicaLostError: vLLM's processes failed to start.
            StartError: Tera does not work with this version of vLLM.
        """
        check_engine()
        leave_check_to_gateways()
        from vllm.v1.engine.async_llm import AsyncLLM

        figures = StepFigures(clock)
        try:
            engine_args = async_engine_args(
                args,
                sleeps=sleeps,
                model=model_path,
                tensor_parallel_size=tensor_parallel,
                pipeline_parallel_size=pipeline_parallel,
            )
            # Not in a thread: AsyncLLM binds its sockets and tasks to the running loop.
            llm = AsyncLLM.from_engine_args(engine_args, stat_loggers=[stat_logger(figures.record)])
        except (ValueError, TypeError) as error:
            raise ConfigError(f"engine.args: vLLM refuses them: {error}") from error
        except RuntimeError as error:
            raise ReplicaLostError("The engine did not start.") from error
        try:
            await llm.collective_rpc(WorkerExtension.count_resumed_tokens.__name__)
        except Exception as error:  # the workers' own, told by vLLM as text
            llm.shutdown(timeout=_SHUTDOWN_S)
            raise StartError(f"vLLM's workers are not as Tera needs them: {error}") from error
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
        run = Run(generation, emit, ended, self._forget)
        self._open[run] = None
        run.adding = asyncio.create_task(self._add(run))
        return run.abort

    async def _add(self, run: Run) -> None:
        """Pass a generation to vLLM, whose API for that is a coroutine."""
        from vllm.inputs import tokens_input

        if run.over:
            return
        generation = run.generation
        try:
            if self._closing is not None:
                raise ReplicaLostError("The engine has stopped.")
            check_bounds(generation, self._context_tokens)
            collector = await self._llm.add_request(
                generation.request_id,
                tokens_input(generation.token_ids, cache_salt=generation.cache_salt or None),
                sampling_params(generation),
            )
        except TeraError as error:
            run.end(error)
        except Exception as error:  # noqa: BLE001  vLLM refuses with errors of many kinds
            run.end(refusal(error))
        else:
            run.vllm_id = collector.request_id
            if run.over:  # aborted before vLLM had it
                self._forget(run)
            deliver(collector, run.put)

    def _forget(self, run: Run) -> None:
        """Remove a run that is over, and abort it in vLLM if that still works on it."""
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
        # vLLM reports after each step, so what has just been added or has ended is known here
        # before a report shows it.
        if not self._open:
            return ReplicaLoad()
        running = min(self._figures.running, len(self._open))
        return ReplicaLoad(running, len(self._open) - running, self._figures.kv_usage_ratio)

    def metrics_text(self) -> str:
        """Return vLLM's own metrics; see `Engine.metrics_text`."""
        return metrics_text()

    async def check_health(self) -> None:
        """Check that the engine can make progress; see `Engine.check_health`."""
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
        """Move the weights to host memory and drop the KV cache; see `Sleeper.sleep`.

        Open generations stay in vLLM, which recomputes their KV cache when it wakes.

        Raises:
            ReplicaLostError: vLLM failed.
        """
        self._asleep = True
        await self._told(self._llm.sleep(level=1, mode="keep"))

    async def wake(self) -> None:
        """Bring the weights back; see `Sleeper.wake`.

        Raises:
            ReplicaLostError: vLLM failed, for example for lack of GPU memory.
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


def _shut_down(llm: "AsyncLLM") -> None:
    processes = engine_processes(llm)
    llm.shutdown(timeout=_SHUTDOWN_S)
    for process in processes:
        process.join(_SHUTDOWN_S)  # vLLM kills a late process but does not wait for it

"""An engine without a model: deterministic tokens, configurable timing, faults on demand.

It is for tests and for experiments with load and scale, never a substitute for a model.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from functools import partial

from pydantic import JsonValue

from tera.engine.bounds import check_bounds
from tera.engine.simulated_args import SimulatedArgs
from tera.engine.simulated_batch import Batch, Slot
from tera.engine.simulated_faults import FaultInjection
from tera.engine.simulated_model import VOCABULARY, Continuation, prompt_logprobs
from tera.errors import (
    ConfigError,
    EngineError,
    EngineStalledError,
    InvalidValueError,
    ReplicaLostError,
    TeraError,
    UnsupportedParameterError,
)
from tera.generation import Generation, ReplicaLoad, TokenDelta

log = logging.getLogger(__name__)

MAX_LOGPROBS = 20
"""Most alternatives that can be requested, as in vLLM."""
_ENDLESS = 2**62


class SimulatedEngine:
    """A continuous-batching engine whose model is a hash function.

    Each step gives every running generation one token and lasts `decode_step_s`, plus the
    prefill of the prompts that join it. Prompt tokens found in the prefix cache cost nothing.
    """

    def __init__(
        self,
        args: SimulatedArgs,
        *,
        stall_s: float,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._profile = args.profile
        self._faults = FaultInjection(args.faults)
        self._stall_s = stall_s
        self._clock = clock
        self._sleep = sleep
        self._loop = asyncio.get_running_loop()
        self._batch = Batch(args.profile)
        self._progress_at = clock()
        self._work = asyncio.Event()
        self._gpu = asyncio.Lock()
        """Held during a step, and while the engine sleeps."""
        self._asleep = False
        self._woken_at = clock()
        self._closed = False
        self._steps = asyncio.create_task(self._run())
        self._steps.add_done_callback(self._end_all)

    @classmethod
    async def launch(
        cls,
        args: dict[str, JsonValue],
        *,
        stall_s: float,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> "SimulatedEngine":
        """Return an engine after `startup_s`, the time a model would take to load.

        Args:
            args: a model's `engine.args`: `profile` and `faults`.
            stall_s: if there is work but no step for this long, `check_health` raises.
            clock: monotonic seconds.
            sleep: waits for the given number of seconds; 0 yields to other tasks.

        Raises:
            ConfigError: the arguments are refused, or `fail_start` is set.
        """
        parsed = SimulatedArgs.parse(args)
        await sleep(parsed.profile.startup_s)
        if parsed.faults.fail_start:
            raise ConfigError("engine.args.faults.failStart: the engine was told not to start")
        return cls(parsed, stall_s=stall_s, clock=clock, sleep=sleep)

    def start(
        self,
        generation: Generation,
        emit: Callable[[TokenDelta], None],
        ended: Callable[[TeraError], None],
    ) -> Callable[[], None]:
        """Begin a generation; see `TextEngine.start`."""
        try:
            slot = self._slot(generation, emit, ended)
        except TeraError as error:
            return self._loop.call_soon(ended, error).cancel
        if not self._batch:
            self._progress_at = self._clock()  # idle time is no stall
        self._batch.add(slot)
        self._work.set()
        return partial(self._batch.release, slot)

    def load(self) -> ReplicaLoad:
        """Return the figures of the latest step; see `Engine.load`."""
        return self._batch.load()

    def metrics_text(self) -> str:
        """Return an empty string: it has no metrics of its own."""
        return ""

    async def check_health(self) -> None:
        """Check that the engine can make progress; see `Engine.check_health`."""
        if self._has_stopped():
            raise ReplicaLostError("The engine has stopped.")
        busy = self._batch and not self._asleep
        if busy and self._clock() - self._progress_at > self._stall_s:
            raise EngineStalledError("The engine makes no progress.")

    async def sleep(self) -> None:
        """Make no more steps and forget the prefix cache; see `Sleeper.sleep`."""
        await self._gpu.acquire()
        self._asleep = True
        self._batch.forget_prefixes()

    async def wake(self) -> None:
        """Make steps again; see `Sleeper.wake`."""
        self._asleep = False
        self._woken_at = self._progress_at = self._clock()
        self._gpu.release()

    async def close(self) -> None:
        """Stop the engine; open generations fail."""
        self._closed = True
        self._steps.cancel()
        await asyncio.wait([self._steps])

    def _has_stopped(self) -> bool:
        return self._closed or self._steps.done()

    def _slot(
        self,
        generation: Generation,
        emit: Callable[[TokenDelta], None],
        ended: Callable[[TeraError], None],
    ) -> Slot:
        if self._has_stopped():
            raise ReplicaLostError("The engine has stopped.")
        token_ids = generation.token_ids
        sampling = generation.sampling
        _check(generation, self._profile.context_tokens)
        meets_faults = self._faults.are_met_by(token_ids)
        if meets_faults and self._faults.refuses:
            raise InvalidValueError("The engine refuses this prompt.", param="prompt")
        first_resumed = len(token_ids) - generation.resumed_tokens
        text = Continuation(token_ids[:first_resumed], token_ids[first_resumed:], sampling)
        return Slot(
            generation=generation,
            emit=emit,
            ended=ended,
            token_ids=list(token_ids),
            text=text,
            remaining=min(sampling.max_tokens, self._profile.context_tokens - len(token_ids)),
            until_end=(
                _ENDLESS if sampling.ignore_eos else text.length - generation.resumed_tokens
            ),
            meets_faults=meets_faults,
            prompt_logprobs=prompt_logprobs(generation),
        )

    async def _run(self) -> None:
        due = self._clock()
        while True:
            if not self._batch:
                self._work.clear()
                await self._work.wait()
                due = self._clock()
            async with self._gpu:
                # Counting from when the last step was due, not from when its sleep returned,
                # keeps the rate exact even if timers fire late.
                due = max(due, self._woken_at) + self._begin_step()
                now = self._clock()
                due = max(due, now)
                await self._sleep(due - now)
                for slot in await self._faults.strike(self._batch.running):
                    self._end(slot, EngineError("The engine failed this generation."))
                for slot in self._batch.running:
                    self._grow(slot)
                self._progress_at = self._clock()

    def _begin_step(self) -> float:
        """Admit waiting generations; return the seconds that the step takes."""
        prefill_s = self._batch.admit()
        return prefill_s + self._profile.decode_step_s + self._faults.delay_s(self._batch.running)

    def _grow(self, slot: Slot) -> None:
        if slot not in self._batch:  # another generation's `emit` has aborted it
            return
        delta = self._batch.grow(slot)
        try:
            slot.emit(delta)
        except Exception:
            log.exception("Nobody could take a generation's tokens; it is aborted.")
            self._batch.release(slot)

    def _end(self, slot: Slot, error: TeraError) -> None:
        if slot not in self._batch:
            return
        self._batch.release(slot)
        try:
            slot.ended(error)
        except Exception:
            log.exception("Nobody could be told that a generation has ended.")

    def _end_all(self, steps: asyncio.Task[None]) -> None:
        for slot in self._batch.open:
            self._end(slot, ReplicaLostError("The engine has stopped."))
        if not steps.cancelled() and (error := steps.exception()) is not None:
            # Raised from a callback, so that the event loop's exception handler logs it.
            raise error


def _check(generation: Generation, context_tokens: int) -> None:
    token_ids = generation.token_ids
    sampling = generation.sampling
    if not token_ids:
        raise InvalidValueError("The prompt is empty.", param="prompt")
    if min(token_ids) < 0 or max(token_ids) >= VOCABULARY.size:
        raise InvalidValueError("The prompt holds a token id that does not exist.", param="prompt")
    check_bounds(generation, context_tokens)
    if sampling.max_tokens < 1:
        raise InvalidValueError("max_tokens must be at least 1.", param="max_tokens")
    if max(sampling.logprobs or 0, sampling.prompt_logprobs or 0) > MAX_LOGPROBS:
        raise InvalidValueError(f"logprobs must be at most {MAX_LOGPROBS}.", param="logprobs")
    if sampling.logit_bias and not all(0 <= key < VOCABULARY.size for key in sampling.logit_bias):
        raise InvalidValueError(
            "logit_bias names a token id that does not exist.", param="logit_bias"
        )
    if sampling.structured is not None:
        raise UnsupportedParameterError(
            "A simulated model cannot be held to a format.", param="response_format"
        )

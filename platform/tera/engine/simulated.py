"""An engine without a model: deterministic tokens, a measured profile's times, faults on demand.

It is for tests and for load and scale experiments, and never stands in for a model. The next
token is a function of all tokens before it and of the seed, so a generation that is resumed
from its prompt and what it has generated continues as if nothing had happened, whatever the
sampling. `top_p`, `top_k`, `min_p` and the penalties change nothing; `logit_bias` forces at
100 and forbids at -100, and is ignored in between.
"""

import asyncio
import logging
import math
import os
import secrets
import time
from array import array
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Self
from zlib import crc32

from pydantic import Field, JsonValue, ValidationError

from tera.config.faults import faults
from tera.config.section import Section
from tera.engine.simulated_vocabulary import SPELLED_CHARACTERS, Vocabulary
from tera.errors import (
    ConfigError,
    ContextLengthError,
    EngineError,
    EngineStalledError,
    InvalidValueError,
    ReplicaLostError,
    TeraError,
    UnsupportedParameterError,
)
from tera.generation import (
    FinishReason,
    Generation,
    ReplicaLoad,
    Sampling,
    TokenDelta,
    TokenLogprobs,
)

log = logging.getLogger(__name__)

BLOCK_TOKENS = 16
"""Tokens per block of the prefix cache, as in vLLM."""
MAX_LOGPROBS = 20
"""Most alternatives that can be asked for, as in vLLM."""
CRASH_STATUS = 86
"""Exit status of a process that `die_after_tokens` ends."""


class Profile(Section):
    """How fast the engine is and how much it holds."""

    prefill_tokens_per_s: float = Field(default=20_000, ge=0)
    """0 makes prefill take no time."""
    decode_step_s: float = Field(default=0.01, ge=0)
    """One token of every running generation; 0 goes as fast as it can."""
    max_running: int = Field(default=64, ge=1)
    startup_s: float = Field(default=0, ge=0)
    context_tokens: int = Field(default=8192, ge=2)
    kv_tokens: int = Field(default=262_144, ge=BLOCK_TOKENS)
    """Size of the KV cache. Nothing is preempted when running generations outgrow it."""


class Faults(Section):
    """What goes wrong, on every prompt or on those that hold a marker."""

    only_prompts_with: str = ""
    """Text that a prompt must hold to meet a fault; empty is every prompt."""
    fail_start: bool = False
    """The engine never starts, whatever the prompts."""
    refuse: bool = False
    """The generation is refused as an invalid request."""
    fail_after_tokens: int | None = Field(default=None, ge=0)
    """The generation fails, and the engine goes on."""
    stall_after_tokens: int | None = Field(default=None, ge=0)
    """The engine makes no further step."""
    die_after_tokens: int | None = Field(default=None, ge=0)
    """The process ends at once, as if killed."""
    slow_step_s: float = Field(default=0, ge=0)
    """Added to each step in which the generation runs."""


class SimulatedArgs(Section):
    """A simulated model's `engine.args`."""

    profile: Profile = Profile()
    faults: Faults = Faults()

    @classmethod
    def parse(cls, values: Any) -> Self:
        """Return the parsed arguments; one that is null is as if it was not there.

        A values file that puts this engine in the place of another sets the other's to null.

        Raises:
            ConfigError: one line for each fault, each beginning with the path of the value.
        """
        try:
            given = {name: value for name, value in values.items() if value is not None}
            return cls.model_validate(given)
        except ValidationError as error:
            lines = faults(error, below=("engine", "args"))
            raise ConfigError("\n".join(lines)) from error


_VOCABULARY = Vocabulary()
_EOS = Vocabulary.eos_id
_KEYS = [token_id.to_bytes(4, "little") for token_id in range(_VOCABULARY.size)]


class _Node(dict[int, "_Node"]):
    """The bytes that can follow a part of a spelled character; none when it is whole."""


def _spelling_tree() -> _Node:
    root = _Node()
    for character in SPELLED_CHARACTERS:
        node = root
        for byte in character.encode():
            node = node.setdefault(byte, _Node())
    return root


_ROOT = _spelling_tree()


def _plan() -> tuple[int, ...]:
    # Of 96 tokens 8 begin a spelled character (1 in 12), 9 are punctuation, the rest words.
    first_bytes = sorted(_ROOT)
    slots = []
    for index in range(4096):
        turn, part = divmod(index, 96)
        if part < 8:
            slots.append(first_bytes[(turn * 8 + part) % len(first_bytes)])
        elif part < 17:
            slots.append(b",,,,...\n?"[part - 8])
        else:
            slots.append(_VOCABULARY.word_ids[(index * 7) % len(_VOCABULARY.word_ids)])
    return tuple(slots)


_PLAN = _plan()


class _Text:
    """The continuation of some token ids: each next token depends on all before it.

    `state` is the CRC-32 of the ids so far, begun from the seed: both ways to the same ids,
    generating them or being given them, end in the same state.
    """

    __slots__ = ("_forbidden", "_forced", "_node", "length", "state")

    def __init__(self, prompt: Sequence[int], resumed: Sequence[int], sampling: Sampling) -> None:
        begin = _seed_state(sampling)
        self.state = crc32(array("I", prompt).tobytes(), begin)
        self.length = 20 + _mix(self.state) % 381
        """How many tokens the text has before its end of sequence."""
        self.state = crc32(array("I", resumed).tobytes(), self.state)
        self._node = _ROOT
        for token_id in [*prompt[-3:], *resumed[-3:]][-3:]:  # no character is longer than 4 bytes
            self._node = self._node.get(token_id) or _ROOT.get(token_id) or _ROOT
        bias = sampling.logit_bias or {}
        forced = [(-value, token_id) for token_id, value in bias.items() if value >= 100]
        self._forced = min(forced)[1] if forced else None
        self._forbidden = frozenset(token_id for token_id, value in bias.items() if value <= -100)

    def next_token(self, may_end: bool) -> int:
        """Return the next token and move past it; `may_end` asks for the end of sequence.

        A character that has begun is finished first.
        """
        mixed = _mix(self.state)
        node = self._node
        if node is not _ROOT:
            choices = tuple(node)
            token_id = choices[mixed % len(choices)]
        elif may_end:
            token_id = _EOS
        else:
            token_id = _PLAN[mixed & 4095]
        if self._forced is not None:
            token_id = self._forced
        elif token_id in self._forbidden:
            token_id = self._allowed(mixed)
        self.state = crc32(_KEYS[token_id], self.state)
        if token_id < 256:
            self._node = node.get(token_id) or _ROOT.get(token_id) or _ROOT
        else:
            self._node = _ROOT
        return token_id

    def _allowed(self, mixed: int) -> int:
        for offset in range(len(_PLAN)):
            token_id = _PLAN[(mixed + offset) & 4095]
            if token_id not in self._forbidden:
                return token_id
        return _EOS


def _is_greedy(sampling: Sampling) -> bool:
    return sampling.temperature <= 0 or sampling.top_p <= 0 or sampling.top_k == 1


def _seed_state(sampling: Sampling) -> int:
    if _is_greedy(sampling):
        return 0
    seed = secrets.randbits(64) if sampling.seed is None else sampling.seed
    return crc32(str(seed).encode(), 1)


def _mix(state: int) -> int:
    return (state * 2_654_435_761 >> 12) & 0xFFFFF  # Knuth's multiplicative hash, 20 of its bits


def _logprobs(state: int, token_id: int, rank: int, count: int) -> TokenLogprobs:
    """Return a distribution whose token of rank r has probability 2^-(r+1)."""
    top: list[tuple[int, float]] = []
    candidate = _mix(state)
    for place in range(count):
        if place == rank:
            alternative = token_id
        else:
            taken = {token_id, *(other for other, _ in top)}
            while (alternative := _VOCABULARY.word_ids[candidate % 512]) in taken:
                candidate += 1
            candidate += 37
        top.append((alternative, -math.log(2) * (place + 1)))
    return TokenLogprobs(token_id, -math.log(2) * (rank + 1), top)


def _sampled_rank(state: int) -> int:
    bits = _mix(state ^ 0x5BD1E995) | 1 << 19
    return (bits & -bits).bit_length() - 1


class _PrefixCache:
    """Which blocks of tokens the KV cache holds; the longest unused go first."""

    def __init__(self, capacity_tokens: int) -> None:
        self._capacity = capacity_tokens // BLOCK_TOKENS
        self._blocks: OrderedDict[int, None] = OrderedDict()

    def match(self, token_ids: Sequence[int]) -> int:
        """Return how many leading tokens are held; the last one always has to be computed."""
        held = 0
        for key in _block_keys(token_ids[:-1]):
            if key not in self._blocks:
                break
            self._blocks.move_to_end(key)
            held += BLOCK_TOKENS
        return held

    def add(self, token_ids: Sequence[int]) -> None:
        for key in _block_keys(token_ids):
            self._blocks[key] = None
            self._blocks.move_to_end(key)
        while len(self._blocks) > self._capacity:
            self._blocks.popitem(last=False)


def _block_keys(token_ids: Sequence[int]) -> list[int]:
    data = array("I", token_ids).tobytes()
    width = BLOCK_TOKENS * 4
    keys = []
    key = 0
    for end in range(width, len(data) + 1, width):
        key = hash((key, data[end - width : end]))
        keys.append(key)
    return keys


@dataclass(slots=True, eq=False)
class _Slot:
    """One generation inside the engine."""

    generation: Generation
    emit: Callable[[TokenDelta], None]
    ended: Callable[[TeraError], None]
    token_ids: list[int]
    text: _Text
    remaining: int
    """Tokens until `length` ends the text: `max_tokens`, or less where the context is full."""
    until_end: int
    """Tokens until the end of sequence is due."""
    faulty: bool
    prompt_logprobs: list[TokenLogprobs | None] | None
    """Until the first delta has carried them."""
    generated: int = 0
    cached_tokens: int = 0

    @property
    def sampling(self) -> Sampling:
        return self.generation.sampling

    @property
    def prompt_tokens(self) -> int:
        return len(self.generation.token_ids)

    def grow(self) -> TokenDelta:
        """Add one token."""
        text = self.text
        state = text.state
        token_id = text.next_token(self.until_end <= 0)
        self.until_end -= 1
        self.generated += 1
        self.remaining -= 1
        self.token_ids.append(token_id)
        sampling = self.sampling
        logprobs = None
        if sampling.logprobs is not None:
            rank = 0 if _is_greedy(sampling) else _sampled_rank(state)
            logprobs = [_logprobs(state, token_id, rank, sampling.logprobs)]
        finish_reason = None
        if token_id == _EOS and not sampling.ignore_eos:
            finish_reason = FinishReason.STOP
        elif self.remaining <= 0:
            finish_reason = FinishReason.LENGTH
        prompt_logprobs, self.prompt_logprobs = self.prompt_logprobs, None
        return TokenDelta(
            self.generation.generation_id,
            [token_id],
            finish_reason,
            self.cached_tokens,
            logprobs,
            prompt_logprobs,
        )


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
        self._faults = args.faults
        self._marker = args.faults.only_prompts_with.encode()
        self._any_fault = args.faults != Faults(only_prompts_with=args.faults.only_prompts_with)
        self._stall_s = stall_s
        self._clock = clock
        self._sleep = sleep
        self._loop = asyncio.get_running_loop()
        self._cache = _PrefixCache(args.profile.kv_tokens)
        self._running: dict[_Slot, None] = {}
        self._waiting: dict[_Slot, None] = {}
        self._held_tokens = 0
        self._progress_at = clock()
        self._work = asyncio.Event()
        self._gpu = asyncio.Lock()
        """Held by a step, and while the engine sleeps."""
        self._asleep = False
        self._woken_at = clock()
        self._closed = False
        self._steps = asyncio.create_task(self._run())
        self._steps.add_done_callback(self._fail_open)

    @classmethod
    async def launch(
        cls,
        args: dict[str, JsonValue],
        *,
        stall_s: float,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> "SimulatedEngine":
        """Return an engine after `startup_s`, as a model would take to load.

        Args:
            args: a model's `engine.args`: `profile` and `faults`.
            stall_s: with work and no step for this long, `check_health` raises.
            clock: monotonic seconds.
            sleep: waits for as many seconds as it is given; 0 yields to other tasks.

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
        if not self._running and not self._waiting:
            self._progress_at = self._clock()  # idle time is no stall
        self._waiting[slot] = None
        self._work.set()
        return partial(self._release, slot)

    def load(self) -> ReplicaLoad:
        """Return the figures of the latest step; see `Engine.load`."""
        usage_ratio = min(1.0, self._held_tokens / self._profile.kv_tokens)
        return ReplicaLoad(len(self._running), len(self._waiting), usage_ratio)

    def metrics_text(self) -> str:
        """Return an empty string: it has no metrics of its own."""
        return ""

    async def check_health(self) -> None:
        """Return if the engine can make progress; see `Engine.check_health`."""
        if self._closed or self._steps.done():
            raise ReplicaLostError("The engine has stopped.")
        busy = (self._running or self._waiting) and not self._asleep
        if busy and self._clock() - self._progress_at > self._stall_s:
            raise EngineStalledError("The engine makes no progress.")

    async def sleep(self) -> None:
        """Make no more steps and forget the prefix cache; see `Sleeper.sleep`."""
        await self._gpu.acquire()
        self._asleep = True
        self._cache = _PrefixCache(self._profile.kv_tokens)

    async def wake(self) -> None:
        """Make steps again; see `Sleeper.wake`."""
        self._asleep = False
        self._woken_at = self._progress_at = self._clock()
        self._gpu.release()

    async def close(self) -> None:
        """Stop the engine; generations that are open fail."""
        self._closed = True
        self._steps.cancel()
        await asyncio.wait([self._steps])

    def _slot(
        self,
        generation: Generation,
        emit: Callable[[TokenDelta], None],
        ended: Callable[[TeraError], None],
    ) -> _Slot:
        if self._closed or self._steps.done():
            raise ReplicaLostError("The engine has stopped.")
        token_ids = generation.token_ids
        sampling = generation.sampling
        _check(generation, self._profile.context_tokens)
        faulty = self._any_fault and (not self._marker or self._is_marked(token_ids))
        if faulty and self._faults.refuse:
            raise InvalidValueError("The engine refuses this prompt.", param="prompt")
        first_resumed = len(token_ids) - generation.resumed_tokens
        text = _Text(token_ids[:first_resumed], token_ids[first_resumed:], sampling)
        return _Slot(
            generation=generation,
            emit=emit,
            ended=ended,
            token_ids=list(token_ids),
            text=text,
            remaining=min(sampling.max_tokens, self._profile.context_tokens - len(token_ids)),
            until_end=2**62 if sampling.ignore_eos else text.length - generation.resumed_tokens,
            faulty=faulty,
            prompt_logprobs=_prompt_logprobs(generation),
        )

    def _is_marked(self, token_ids: list[int]) -> bool:
        return self._marker in b"".join(map(_VOCABULARY.token_bytes, token_ids))

    async def _run(self) -> None:
        due = self._clock()
        while True:
            if not self._running and not self._waiting:
                self._work.clear()
                await self._work.wait()
                due = self._clock()
            async with self._gpu:
                # Counting from when the last step was due, not from when its sleep returned,
                # keeps the rate exact under timers that are late.
                due = max(due, self._woken_at) + self._step_s()
                now = self._clock()
                due = max(due, now)
                await self._sleep(due - now)
                await self._meet_faults()
                for slot in list(self._running):
                    if slot in self._running:  # unless another one's `emit` has aborted it
                        self._grow(slot)
                self._progress_at = self._clock()

    def _grow(self, slot: _Slot) -> None:
        self._held_tokens += 1
        delta = slot.grow()
        if delta.finish_reason is not None:
            self._release(slot)
        try:
            slot.emit(delta)
        except Exception:
            log.exception("Nobody could take a generation's tokens; it is aborted.")
            self._release(slot)

    def _step_s(self) -> float:
        """Begin a step; return the seconds that it takes."""
        return self._admit() + self._profile.decode_step_s + self._slowness()

    def _admit(self) -> float:
        """Move waiting generations into the batch; return the seconds that their prefill takes."""
        computed = 0
        while self._waiting and len(self._running) < self._profile.max_running:
            slot = next(iter(self._waiting))
            fits = self._held_tokens + slot.prompt_tokens <= self._profile.kv_tokens
            if self._running and not fits:
                break
            del self._waiting[slot]
            self._running[slot] = None
            self._held_tokens += slot.prompt_tokens
            if slot.sampling.prompt_logprobs is None:  # those need every position computed
                slot.cached_tokens = self._cache.match(slot.token_ids)
            self._cache.add(slot.token_ids)
            computed += slot.prompt_tokens - slot.cached_tokens
        rate = self._profile.prefill_tokens_per_s
        return computed / rate if rate else 0.0

    def _slowness(self) -> float:
        slow_step_s = self._faults.slow_step_s
        return slow_step_s if slow_step_s and any(slot.faulty for slot in self._running) else 0.0

    async def _meet_faults(self) -> None:
        if not self._any_fault:
            return
        faults = self._faults
        for slot in [slot for slot in self._running if slot.faulty]:
            if _reached(slot, faults.die_after_tokens):
                os._exit(CRASH_STATUS)
            if _reached(slot, faults.stall_after_tokens):
                await asyncio.Event().wait()
            if _reached(slot, faults.fail_after_tokens):
                self._end(slot, EngineError("The engine failed this generation."))

    def _end(self, slot: _Slot, error: TeraError) -> None:
        self._release(slot)
        try:
            slot.ended(error)
        except Exception:
            log.exception("Nobody could be told that a generation has ended.")

    def _release(self, slot: _Slot) -> None:
        self._waiting.pop(slot, None)
        if slot in self._running:
            del self._running[slot]
            self._held_tokens -= slot.prompt_tokens + slot.generated
            self._cache.add(slot.token_ids)

    def _fail_open(self, steps: asyncio.Task[None]) -> None:
        for slot in [*self._running, *self._waiting]:
            self._end(slot, ReplicaLostError("The engine has stopped."))
        if not steps.cancelled() and (error := steps.exception()) is not None:
            # Raised where it is seen: the loop's exception handler logs it.
            raise error


def _reached(slot: _Slot, after_tokens: int | None) -> bool:
    return after_tokens is not None and slot.generated >= after_tokens


def _check(generation: Generation, context_tokens: int) -> None:
    token_ids = generation.token_ids
    sampling = generation.sampling
    if not token_ids:
        raise InvalidValueError("The prompt is empty.", param="prompt")
    if min(token_ids) < 0 or max(token_ids) >= _VOCABULARY.size:
        raise InvalidValueError("The prompt holds a token id that does not exist.", param="prompt")
    if len(token_ids) >= context_tokens:
        raise ContextLengthError(
            f"This model's context is {context_tokens} tokens; the prompt has {len(token_ids)} "
            "and leaves no room for an answer.",
            param="prompt",
        )
    if sampling.max_tokens < 1:
        raise InvalidValueError("max_tokens must be at least 1.", param="max_tokens")
    if max(sampling.logprobs or 0, sampling.prompt_logprobs or 0) > MAX_LOGPROBS:
        raise InvalidValueError(f"logprobs must be at most {MAX_LOGPROBS}.", param="logprobs")
    if sampling.logit_bias and not all(0 <= key < _VOCABULARY.size for key in sampling.logit_bias):
        raise InvalidValueError(
            "logit_bias names a token id that does not exist.", param="logit_bias"
        )
    if sampling.structured is not None:
        raise UnsupportedParameterError(
            "A simulated model cannot be held to a format.", param="response_format"
        )


def _prompt_logprobs(generation: Generation) -> list[TokenLogprobs | None] | None:
    count = generation.sampling.prompt_logprobs
    if count is None:
        return None
    found: list[TokenLogprobs | None] = [None]
    state = 0
    for before, token_id in zip(generation.token_ids, generation.token_ids[1:], strict=False):
        state = crc32(_KEYS[before], state)
        found.append(_logprobs(state, token_id, _sampled_rank(state), count))
    return found

"""The generations inside the simulated engine: the running batch, and a queue for it."""

from collections.abc import Callable
from dataclasses import dataclass

from tera.engine.simulated_args import Profile
from tera.engine.simulated_model import EOS, Continuation, token_logprobs
from tera.engine.simulated_prefix_cache import PrefixCache
from tera.errors import TeraError
from tera.generation import FinishReason, Generation, ReplicaLoad, TokenDelta, TokenLogprobs


@dataclass(slots=True, eq=False)
class Slot:
    """One generation inside the engine."""

    generation: Generation
    emit: Callable[[TokenDelta], None]
    ended: Callable[[TeraError], None]
    token_ids: list[int]
    """The prompt and what has been generated so far."""
    text: Continuation
    remaining: int
    """Tokens until the text ends with `length`: `max_tokens`, or fewer if the context is full."""
    until_end: int
    """Tokens until the end of sequence is due."""
    meets_faults: bool
    prompt_logprobs: list[TokenLogprobs | None] | None
    """Kept until the first delta has carried them."""
    generated: int = 0
    cached_tokens: int = 0

    @property
    def prompt_tokens(self) -> int:
        """The number of tokens in the prompt."""
        return len(self.generation.token_ids)

    @property
    def cache_salt(self) -> str:
        """Keeps its prompt apart from others in the prefix cache."""
        return self.generation.cache_salt

    def grow(self) -> TokenDelta:
        """Add one token."""
        state = self.text.state
        token_id = self.text.next_token(self.until_end <= 0)
        self.until_end -= 1
        self.generated += 1
        self.remaining -= 1
        self.token_ids.append(token_id)
        sampling = self.generation.sampling
        finish_reason = None
        if token_id == EOS and not sampling.ignore_eos:
            finish_reason = FinishReason.STOP
        elif self.remaining <= 0:
            finish_reason = FinishReason.LENGTH
        prompt_logprobs, self.prompt_logprobs = self.prompt_logprobs, None
        return TokenDelta(
            self.generation.generation_id,
            [token_id],
            finish_reason,
            self.cached_tokens,
            token_logprobs(state, token_id, sampling),
            prompt_logprobs,
        )


class Batch:
    """Which generations run and which wait, and how much of the KV cache they use."""

    def __init__(self, profile: Profile) -> None:
        self._profile = profile
        self._running: dict[Slot, None] = {}
        self._waiting: dict[Slot, None] = {}
        self._held_tokens = 0
        self._cache = PrefixCache(profile.kv_tokens)

    def __bool__(self) -> bool:
        """Whether there is work."""
        return bool(self._running or self._waiting)

    def __contains__(self, slot: Slot) -> bool:
        """Whether the slot runs or waits."""
        return slot in self._running or slot in self._waiting

    @property
    def running(self) -> list[Slot]:
        """The generations to which the next step adds a token, in order of arrival."""
        return list(self._running)

    @property
    def open(self) -> list[Slot]:
        """The generations that run or wait."""
        return [*self._running, *self._waiting]

    def load(self) -> ReplicaLoad:
        """Return the current figures."""
        usage_ratio = min(1.0, self._held_tokens / self._profile.kv_tokens)
        return ReplicaLoad(len(self._running), len(self._waiting), usage_ratio)

    def add(self, slot: Slot) -> None:
        """Queue a generation."""
        self._waiting[slot] = None

    def admit(self) -> float:
        """Move waiting generations into the batch; return the seconds that their prefill takes."""
        computed = 0
        while self._waiting and len(self._running) < self._profile.max_running:
            slot = next(iter(self._waiting))
            fits = self._held_tokens + slot.prompt_tokens <= self._profile.kv_tokens
            # A prompt that never fits beside others runs alone; otherwise it would wait for ever.
            if self._running and not fits:
                break
            del self._waiting[slot]
            self._running[slot] = None
            self._held_tokens += slot.prompt_tokens
            if slot.generation.sampling.prompt_logprobs is None:  # those need every position
                slot.cached_tokens = self._cache.match(slot.token_ids, slot.cache_salt)
            self._cache.add(slot.token_ids, slot.cache_salt)
            computed += slot.prompt_tokens - slot.cached_tokens
        rate = self._profile.prefill_tokens_per_s
        return computed / rate if rate else 0.0

    def grow(self, slot: Slot) -> TokenDelta:
        """Add one token to a running generation; remove it if it is finished."""
        self._held_tokens += 1
        delta = slot.grow()
        if delta.finish_reason is not None:
            self.release(slot)
        return delta

    def release(self, slot: Slot) -> None:
        """Remove a generation; harmless if it is gone already."""
        self._waiting.pop(slot, None)
        if slot in self._running:
            del self._running[slot]
            self._held_tokens -= slot.prompt_tokens + slot.generated
            self._cache.add(slot.token_ids, slot.cache_salt)

    def forget_prefixes(self) -> None:
        """Empty the prefix cache."""
        self._cache = PrefixCache(self._profile.kv_tokens)

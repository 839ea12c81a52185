"""The one interface between Tera and whatever turns token ids into token ids."""

from collections.abc import AsyncGenerator
from typing import Protocol

from tera.generation import Generation, ReplicaLoad, TokenDelta


class Engine(Protocol):
    """An engine process's inside: tokens in, tokens out.

    Built by an async factory that returns once the model is loaded. Greedy generations are
    deterministic; so are sampled ones with a seed, on one kind of replica.
    """

    def generate(self, generation: Generation) -> AsyncGenerator[TokenDelta]:
        """Yield what each engine step adds, until a delta carries `finish_reason`.

        Closing the generator early aborts the generation and frees its KV blocks at once.

        Raises:
            EngineError: the engine died or stalled.
            InvalidRequestError: the engine refuses these parameters.
        """
        ...

    def load(self) -> ReplicaLoad:
        """Return the figures of the latest step, without I/O."""
        ...

    def metrics_text(self) -> str:
        """Return the engine's own metrics in Prometheus text form, or an empty string."""
        ...

    async def check_health(self) -> None:
        """Return if the engine can make progress.

        Raises:
            EngineStalledError: work is running and no step has ended for the stall limit.
            EngineError: the engine is dead.
        """
        ...

    async def close(self) -> None:
        """Stop the engine and the processes that it started; calling it twice is harmless."""
        ...

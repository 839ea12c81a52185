"""The interface between Tera and its engines."""

from collections.abc import Callable
from typing import Protocol

from tera.errors import TeraError
from tera.generation import Generation, ReplicaLoad, TokenDelta


class Engine(Protocol):
    """What every engine provides, whatever kind of model it runs.

    An async factory creates it and returns once the model is loaded.
    """

    def load(self) -> ReplicaLoad:
        """Return the figures of the latest step, without I/O."""
        ...

    def metrics_text(self) -> str:
        """Return the engine's own metrics in Prometheus text form, or an empty string."""
        ...

    async def check_health(self) -> None:
        """Check that the engine can make progress.

        Raises:
            EngineStalledError: there is work, but no step has ended within the stall limit.
            EngineError: the engine is dead.
        """
        ...

    async def close(self) -> None:
        """Stop the engine and its child processes; calling it twice is harmless.

        Open generations end with an error.
        """
        ...


class TextEngine(Engine, Protocol):
    """An engine that generates text: tokens in, tokens out.

    Greedy generations are deterministic; so are sampled ones with a seed, on one kind of replica.
    """

    def start(
        self,
        generation: Generation,
        emit: Callable[[TokenDelta], None],
        ended: Callable[[TeraError], None],
    ) -> Callable[[], None]:
        """Begin a generation; return the function that aborts it.

        The engine uses plain callbacks, so that a token costs no task; they must be quick and never
        block. None is called before `start` has returned.

        Args:
            generation: what to continue, and how.
            emit: called from the engine's step with the new tokens. The delta with a
                `finish_reason` is the last call. If it raises, that is the caller's defect: the
                generation is aborted, and others continue.
            ended: called once, and last, if the generation ends without a finish reason: with an
                `EngineError` if the engine died, stalled or gave it up, or an
                `InvalidRequestError` if it refuses the parameters.

        Returns:
            A function that frees the generation's KV blocks at once; afterwards no callback is
            called any more. It may be called at any time, even from `emit`, and more than once.
        """
        ...

"""The one interface between Tera and whatever does a model's work."""

from collections.abc import Callable
from typing import Protocol

from tera.errors import TeraError
from tera.generation import Generation, ReplicaLoad, TokenDelta


class Engine(Protocol):
    """What every engine process has inside, whatever kind of work its model does.

    Built by an async factory that returns once the model is loaded.
    """

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
        """Stop the engine and the processes that it started; calling it twice is harmless.

        Generations that are open end with an error.
        """
        ...


class TextEngine(Engine, Protocol):
    """An engine that continues texts: tokens in, tokens out.

    Greedy generations are deterministic; so are sampled ones with a seed, on one kind of replica.
    """

    def start(
        self,
        generation: Generation,
        emit: Callable[[TokenDelta], None],
        ended: Callable[[TeraError], None],
    ) -> Callable[[], None]:
        """Begin a generation; return what aborts it.

        The engine calls, and never waits, so that a token costs no task: whoever is called does
        little and does not block. Nothing is called before `start` has returned.

        Args:
            generation: what to continue, and how.
            emit: called from the engine's step with what it has added. The delta that carries
                `finish_reason` is the last call. One that raises is a defect of the caller: the
                generation is aborted, and others go on.
            ended: called once, and last, if the generation ends without a finish reason: with an
                `EngineError` if the engine died, stalled or gave it up, or an
                `InvalidRequestError` if it refuses the parameters.

        Returns:
            A function that frees the generation's KV blocks at once, after which nothing is
            called any more. It may be called at any time, also from `emit`, and more than once.
        """
        ...

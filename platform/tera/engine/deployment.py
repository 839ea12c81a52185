"""The Ray Serve deployment of one model: hosts one engine in each replica."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping

import msgspec
from ray import serve

from tera.config.environment import Runtime
from tera.config.gateway import RequestLimits
from tera.config.names import model_name
from tera.engine.base import TextEngine
from tera.engine.channel import TokenSender
from tera.engine.runs import Runs
from tera.errors import InvalidRequestError, TeraError
from tera.generation import decode_generation, encode
from tera.observability import load_exposition, log_json_lines

log = logging.getLogger(__name__)

RESUMED_GRACE_RATIO = 0.5
"""Of the time that Serve lets a replica drain: the part for resumed generations once Serve's own
calls have ended. What is left then goes on elsewhere; after all of the time Serve kills it."""

EngineFactory = Callable[[], Awaitable[TextEngine]]


class EngineReplica:
    """One replica: takes generations by unary call, sends their tokens over the token channel.

    The call stays open until the generation ends, so Serve's queueing, autoscaling, draining
    and cancellation see it as what it is.
    """

    async def __init__(self, start_engine: EngineFactory) -> None:  # type: ignore[misc]  # Serve awaits it
        log_json_lines()
        # Read here and not when the application is built: Serve stores what it is built with.
        cluster_secret = Runtime.from_environment().cluster_secret
        self._engine = await start_engine()
        context = serve.get_replica_context()
        self._replica_id = context.replica_id.unique_id
        self._model = model_name(context.app_name)
        self._drain_s = RequestLimits().drain_seconds
        self._runs = Runs(self._engine)
        self._sender = TokenSender(
            self._replica_id, cluster_secret, self._engine.load, self._runs.obey
        )

    def reconfigure(self, user_config: Mapping[str, float]) -> None:
        """Take over what an edit of the values changes without a restart."""
        self._drain_s = user_config["drainSeconds"]

    async def generate(self, data: bytes) -> bytes:
        """Run one generation to its end; `data` and the answer are encoded records.

        Raises:
            EngineError: the engine, or the way to the gateway, failed.
            InvalidRequestError: the engine refuses the parameters.
        """
        try:
            generation = decode_generation(data)
        except msgspec.MsgspecError as error:
            raise InvalidRequestError("The dispatched generation cannot be read.") from error
        link = await self._sender.link(generation.reply_to)
        return encode(await self._runs.run(generation, link))

    async def metrics(self) -> tuple[str, str]:
        """Return this replica's id and its metrics, the engine's own beside them, as text."""
        load = load_exposition(self._model, self._engine.load())
        return self._replica_id, load + self._engine.metrics_text()

    async def check_health(self) -> None:
        """Tell Serve whether to keep this replica; an error gets it replaced."""
        await self._engine.check_health()

    async def __del__(self) -> None:
        """Close the engine: Serve calls this after the replica has drained."""
        engine = getattr(self, "_engine", None)
        if engine is None:
            return
        await self._runs.drained(self._drain_s * RESUMED_GRACE_RATIO)
        try:
            await self._sender.close()
            async with asyncio.timeout(10):
                await engine.close()
        except (TimeoutError, TeraError):
            log.exception("The engine did not close in time; its process dies with the replica's.")

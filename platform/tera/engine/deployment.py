"""The Ray Serve deployment of one model: hosts one engine in each replica."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping

from ray import serve

from tera.config.environment import Runtime
from tera.config.gateway import RequestLimits
from tera.config.names import model_name
from tera.engine.base import TextEngine
from tera.engine.link import GatewayLinks
from tera.engine.runs import Runs
from tera.errors import TeraError
from tera.observability import load_exposition, log_json_lines
from tera.upstream.ray_serve import ongoing, stay_on_loopback

log = logging.getLogger(__name__)

CLOSE_S = 3.0
"""How long an engine may take to close, out of the time that Serve gives a replica to drain."""

EngineFactory = Callable[[], Awaitable[TextEngine]]


class EngineReplica:
    """One replica: Serve starts, checks and ends it; its work comes over the token channel."""

    async def __init__(self, start_engine: EngineFactory) -> None:  # type: ignore[misc]  # Serve awaits it
        log_json_lines()
        # Read here and not when the application is built: Serve stores what it is built with.
        runtime = Runtime.from_environment()
        if runtime.on_one_machine:
            stay_on_loopback()
        self._engine = await start_engine()
        context = serve.get_replica_context()
        self._replica_id = context.replica_id.unique_id
        self._model = model_name(context.app_name)
        self._drain_s = RequestLimits().drain_seconds
        self._runs = Runs(self._engine)
        self._links = GatewayLinks(self._replica_id, runtime.cluster_secret, self._runs)

    def reconfigure(self, user_config: Mapping[str, float]) -> None:
        """Take over what an edit of the values changes without a restart."""
        self._drain_s = user_config["drainSeconds"]

    async def connect(self, host: str, port: int) -> None:
        """Connect to the token channel of the gateway replica that asks for it.

        Raises:
            ReplicaLostError: the gateway cannot be reached, or does not hold the secret.
        """
        await self._links.connect((host, port))

    async def metrics(self) -> tuple[str, str]:
        """Return this replica's id and its metrics, the engine's own beside them, as text."""
        load = load_exposition(self._model, self._engine.load())
        return self._replica_id, load + self._engine.metrics_text()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Tell Serve how much runs here, by which it scales; it asks twice a second."""
        return ongoing(self._runs.ongoing)

    async def check_health(self) -> None:
        """Tell Serve whether to keep this replica; an error gets it replaced."""
        await self._engine.check_health()

    async def __del__(self) -> None:
        """Finish what runs, then close the engine: Serve calls this when it takes a replica away.

        Serve knows of no request here, so it waits for none: waiting is done here, within the
        time after which it would kill the process.
        """
        engine = getattr(self, "_engine", None)
        if engine is None:
            return
        self._links.drain()
        await self._runs.drain(max(0.0, self._drain_s - CLOSE_S))
        try:
            await self._links.close()
            async with asyncio.timeout(CLOSE_S):
                await engine.close()
        except (TimeoutError, TeraError):
            log.exception("The engine did not close in time; its process dies with the replica's.")

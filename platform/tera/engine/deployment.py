"""The Ray Serve deployment of one model: hosts one engine in each replica."""

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from typing import Any

import msgspec
from ray import serve

from tera.config import Runtime
from tera.engine.base import Engine
from tera.engine.channel import TokenSender
from tera.errors import InvalidRequestError, ReplicaLostError, TeraError
from tera.generation import GenerationEnd, TokenDelta, decode_generation, encode
from tera.observability import load_exposition, log_json_lines

log = logging.getLogger(__name__)

EngineFactory = Callable[[], Awaitable[Engine]]


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
        self._model = context.app_name.removeprefix("model-")
        self._sender = TokenSender(self._replica_id, cluster_secret, self._engine.load)

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
        # An empty delta says «I have it»: from here on the loss of this replica is the
        # generation's loss, and before it, only the call's.
        link.send(TokenDelta(generation.generation_id, []))
        completion_tokens = 0
        async with aclosing(self._engine.generate(generation)) as deltas:
            async for delta in deltas:
                completion_tokens += len(delta.token_ids)
                link.send(delta)
                if delta.finish_reason is not None:
                    return encode(GenerationEnd(delta.finish_reason, completion_tokens))
        raise ReplicaLostError("The engine ended a generation without a reason.")

    async def status(self) -> dict[str, Any]:
        """Return this replica's id, process id and load, for `tera status`."""
        load = self._engine.load()
        return {
            "replica_id": self._replica_id,
            "pid": os.getpid(),
            "running": load.running,
            "waiting": load.waiting,
            "kv_usage_ratio": load.kv_usage_ratio,
        }

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
        try:
            await self._sender.close()
            async with asyncio.timeout(10):
                await engine.close()
        except (TimeoutError, TeraError):
            log.exception("The engine did not close in time; its process dies with the replica's.")

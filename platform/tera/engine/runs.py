"""The generations that run at one engine replica, and who asked for them."""

import asyncio
import logging

from tera.engine.base import TextEngine
from tera.engine.channel import GatewayLink
from tera.errors import ReplicaLostError, TeraError
from tera.generation import Abort, Generation, GenerationEnd, Order, TokenDelta

log = logging.getLogger(__name__)


class Runs:
    """Runs generations of an engine over links to gateway replicas.

    Most are asked for by Serve's call. Those that another replica has lost come over the link
    itself, which costs a tenth: when a replica dies, all that ran there has to go on at once.
    """

    def __init__(self, engine: TextEngine) -> None:
        self._engine = engine
        self._resumed: dict[tuple[GatewayLink, int], asyncio.Task[None]] = {}

    async def run(self, generation: Generation, link: GatewayLink) -> GenerationEnd:
        """Run one generation to its end and send its tokens.

        Raises:
            EngineError: the engine, or the way to the gateway, failed.
            InvalidRequestError: the engine refuses the parameters.
        """
        # An empty delta says «I have it»: from here on the loss of this replica is the
        # generation's loss, and before it, only the call's.
        link.send(TokenDelta(generation.generation_id, []))
        completion_tokens = 0
        end: asyncio.Future[GenerationEnd] = asyncio.get_running_loop().create_future()

        def emit(delta: TokenDelta) -> None:
            nonlocal completion_tokens
            completion_tokens += len(delta.token_ids)
            try:
                link.send(delta)
            except ReplicaLostError as error:
                abort()
                fail(error)
            else:
                if delta.finish_reason is not None and not end.done():
                    end.set_result(GenerationEnd(delta.finish_reason, completion_tokens))

        def fail(error: TeraError) -> None:
            if not end.done():
                end.set_exception(error)

        abort = self._engine.start(generation, emit, fail)
        try:
            return await end
        finally:
            abort()

    def obey(self, link: GatewayLink, order: Order) -> None:
        """Go on with what another replica has lost, or stop doing so."""
        if isinstance(order, Abort):
            task = self._resumed.get((link, order.generation_id))
            if task is not None:
                task.cancel()
            return
        key = (link, order.generation.generation_id)
        task = self._resumed[key] = asyncio.create_task(self._resume(order.generation, link))
        task.add_done_callback(lambda _: self._resumed.pop(key, None))

    async def drained(self, timeout_s: float) -> None:
        """Wait for what came over links, of which Serve does not know, for so long at the most."""
        if self._resumed:
            await asyncio.wait(self._resumed.values(), timeout=timeout_s)

    async def _resume(self, generation: Generation, link: GatewayLink) -> None:
        try:
            await self.run(generation, link)
        except TeraError as error:
            link.fail(generation.generation_id, error.message)
        except Exception:
            log.exception("A resumed generation failed.")
            link.fail(generation.generation_id, "The engine replica failed.")

"""The generations that run at one engine replica, and which gateway replica asked for each."""

import asyncio
import logging
from collections.abc import Callable
from functools import partial

from tera.engine.base import TextEngine
from tera.engine.link import GatewayLink
from tera.errors import InvalidRequestError, TeraError
from tera.generation import Abort, Begin, GenerationFailure, Order, ReplicaLoad, TokenDelta

log = logging.getLogger(__name__)

Key = tuple[GatewayLink, int]
"""A generation's id is its gateway replica's own, so it takes the link to tell it apart."""


class Runs:
    """Runs generations of an engine over links to gateway replicas.

    What the engine makes goes straight into the frame of its step: no task stands between.
    """

    def __init__(self, engine: TextEngine) -> None:
        self._engine = engine
        self._aborts: dict[Key, Callable[[], None]] = {}
        """What stops each running generation."""
        self._draining = False
        self._empty = asyncio.Event()
        self._empty.set()

    def load(self) -> ReplicaLoad:
        """Return the figures of the engine's latest step."""
        return self._engine.load()

    @property
    def ongoing(self) -> int:
        """How many generations run or wait in the engine, over all gateway replicas."""
        return len(self._aborts)

    def obey(self, link: GatewayLink, order: Order) -> None:
        """Begin a generation if there is room, or stop one."""
        if isinstance(order, Abort):
            self._abort((link, order.generation_id))
        elif self._draining or self.ongoing >= order.most_ongoing:
            link.refuse(order.generation.generation_id)
        else:
            self._begin(link, order)

    def lost(self, link: GatewayLink) -> None:
        """Stop what a gateway replica wanted that is gone."""
        for key in [key for key in self._aborts if key[0] is link]:
            self._abort(key)

    async def drain(self, timeout_s: float) -> None:
        """Take nothing new, and wait for what runs; what is left then has to go elsewhere."""
        self._draining = True
        try:
            async with asyncio.timeout(timeout_s):
                await self._empty.wait()
        except TimeoutError:
            log.warning("%d generations go on at other replicas", self.ongoing)
        for link, generation_id in list(self._aborts):
            self._abort((link, generation_id))
            link.refuse(generation_id)

    def _begin(self, link: GatewayLink, order: Begin) -> None:
        generation = order.generation
        key = (link, generation.generation_id)
        # An empty delta says «I have it»: from here on the loss of this replica may be the
        # generation's doing, and before it, it cannot.
        link.send(TokenDelta(generation.generation_id, []))
        self._empty.clear()
        self._aborts[key] = _nothing  # the engine may emit before `start` has returned
        try:
            abort = self._engine.start(
                generation, partial(self._emit, key), partial(self._failed, key)
            )
        except Exception as error:  # noqa: BLE001  one generation must not take the link along
            self._failed(key, error)
            return
        if key in self._aborts:
            self._aborts[key] = abort

    def _emit(self, key: Key, delta: TokenDelta) -> None:
        link, _ = key
        link.send(delta)
        if delta.finish_reason is not None:
            self._ended(key)

    def _failed(self, key: Key, error: Exception) -> None:
        link, generation_id = key
        if self._ended(key) is not None:
            link.fail(_failure(generation_id, error))

    def _abort(self, key: Key) -> None:
        abort = self._ended(key)
        if abort is not None:
            abort()

    def _ended(self, key: Key) -> Callable[[], None] | None:
        """Forget a generation; return what would stop it, if it was still running."""
        abort = self._aborts.pop(key, None)
        if not self._aborts:
            self._empty.set()
        return abort


def _nothing() -> None:
    """Stand in for the abort of a generation that is just beginning."""


def _failure(generation_id: int, error: Exception) -> GenerationFailure:
    if isinstance(error, InvalidRequestError):
        return GenerationFailure(generation_id, error.message, error.code, error.param)
    if isinstance(error, TeraError):
        return GenerationFailure(generation_id, error.message)
    log.error("A generation failed.", exc_info=error)
    return GenerationFailure(generation_id, "The engine replica failed.")

"""Run one generation to its end, on as many replicas as that takes."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import msgspec

from tera.errors import BackendFailureError, EngineError, ReplicaLostError, TeraError
from tera.generation import (
    FinishReason,
    Generation,
    Sampling,
    TokenDelta,
    decode_end,
    encode,
)
from tera.routing.channel import Inbox, TokenReceiver
from tera.routing.queue import Place, Queue
from tera.routing.retry_budget import RetryBudget
from tera.routing.switchboard import Route, Share

log = logging.getLogger(__name__)

LAST_FRAME_GRACE_S = 5.0
"""How long tokens may trail the end that the dispatch call has announced."""

FIRST_BACKOFF_S, LONGEST_BACKOFF_S = 0.05, 1.0
"""Pause before asking again while no replica takes the generation."""

FIRST_PATIENCE_S, LONGEST_PATIENCE_S = 2.0, 8.0
"""Wait for a replica to take the generation that it is sent, which needs milliseconds.

A replica that this gateway replica has no connection with may be frozen, and no heartbeat tells.
"""

POISON_LOSSES, POISON_WINDOW_S = 2, 10.0
"""Replicas lost so soon after they had taken a generation, and it is held to be the cause.

A request that makes an engine fail does so in its prefill or in the first steps. A long stream
whose replicas die minutes apart is an innocent that has seen much.
"""


class ModelHandle(Protocol):
    """What sends a generation to one of a model's replicas."""

    async def resume(self, generation: Generation, inbox: Inbox, route: Route) -> bool:
        """Have a generation that a replica has lost go on at one that is connected.

        It comes back when the inbox has ended; cancelling this aborts the replica's work.

        Returns:
            whether the replica that was chosen is connected; if not, nothing has been done.
        """
        ...

    def generate(self, generation: bytes, route: Route) -> Coroutine[None, None, bytes]:
        """Return the encoded `GenerationEnd`; cancelling this aborts the replica's work.

        Args:
            generation: an encoded `Generation`.
            route: what the choice of the replica is made of, and who is told of it.

        Raises:
            EngineError: the replica was lost or failed.
            TeraError: the replica refused the generation.
        """
        ...


@dataclass(frozen=True, slots=True)
class DispatchLimits:
    """How long and how often one generation is tried."""

    deadline_s: float
    """Counted from its start."""
    first_token_deadline_s: float
    """Counted from when a replica has taken the generation."""
    cold_start_deadline_s: float
    """Until a replica takes it; counted from its start, or the loss of the replica that had it."""
    retries: int
    """Further replicas after one that had taken the generation has failed."""
    most_queued: int = 256
    """Generations that may wait here until a replica takes them."""


@dataclass(slots=True)
class Attempts:
    """What happens to the generations of one request."""

    replica_switches: int = 0
    """Times that another replica went on, for the ledger and metrics."""
    inboxes: set[Inbox] = field(default_factory=set)
    """Of the attempts that are under way."""

    def next_is_here(self) -> bool:
        """Return whether the request's next tokens, or its end, need no waiting for.

        To be asked when a delta has just been taken, while its attempt is under way.
        """
        waited_for = [inbox for inbox in self.inboxes if not inbox.finished]
        return not waited_for or any(inbox.next_is_here for inbox in waited_for)


class Dispatcher:
    """Sends generations of one model to its replicas."""

    def __init__(
        self, handle: ModelHandle, receiver: TokenReceiver, limits: DispatchLimits
    ) -> None:
        self._handle = handle
        self._receiver = receiver
        self._limits = limits
        self._queue = Queue(limits.most_queued, time.monotonic)
        self._budget = RetryBudget()
        self._ending: set[asyncio.Task[None]] = set()
        """Dispatch calls whose tokens have all come; a task that nobody holds may be collected."""

    async def run(
        self,
        request_id: str,
        share: Share,
        prompt_token_ids: list[int],
        sampling: Sampling,
        attempts: Attempts,
    ) -> AsyncGenerator[TokenDelta]:
        """Yield the generation's deltas, whatever happens to replicas on the way.

        After a loss another replica goes on from the ids generated so far, so the consumer sees
        one sequence, no id twice. Closing the generator stops the engine's work.

        Raises:
            EngineOverloadedError: too many wait for the model, or the place there went to a tenant
                with fewer.
            BackendFailureError: retries, their budget or a deadline were used up, or the request
                itself seems to make engines fail.
            InvalidRequestError: the engine refuses the parameters.
        """
        place = self._queue.enter(share.tenant)
        self._budget.earn()
        try:
            run = self._run(request_id, share, prompt_token_ids, sampling, attempts, place)
            async with aclosing(run) as deltas:
                async for delta in deltas:
                    yield delta
        finally:
            place.leave()

    async def _run(
        self,
        request_id: str,
        share: Share,
        prompt_token_ids: list[int],
        sampling: Sampling,
        attempts: Attempts,
        place: Place,
    ) -> AsyncGenerator[TokenDelta]:
        loop = asyncio.get_running_loop()
        end = loop.time() + self._limits.deadline_s
        take_by = self._take_by(end)
        generated: list[int] = []
        lost = False
        failures = _Failures(request_id, self._limits.retries, self._budget)
        backoff_s, patience_s = FIRST_BACKOFF_S, FIRST_PATIENCE_S
        while True:
            if len(generated) >= sampling.max_tokens:
                # Every token came and only the word that it was the last was lost.
                yield TokenDelta(0, [], FinishReason.LENGTH)
                return
            place.check()
            inbox = self._receiver.open()
            place.on_eviction = inbox.fail
            inbox.on_taken = partial(place.leave, taken=True)
            attempts.inboxes.add(inbox)
            generation = _resumed(
                inbox.generation_id,
                request_id,
                prompt_token_ids,
                generated,
                sampling,
                self._receiver.address,
            )
            try:
                attempt = self._attempt(inbox, generation, share, take_by, patience_s, end, lost)
                async with aclosing(attempt) as deltas:
                    async for delta in deltas:
                        generated.extend(delta.token_ids)
                        backoff_s = FIRST_BACKOFF_S
                        yield delta
                return
            except EngineError as error:
                # A replica that never took the generation cannot have been harmed by it, so
                # that is no failure to count: ask again, until the deadline.
                taken = inbox.replica_id is not None
                if taken:
                    failures.add(error, loop.time() - inbox.taken_at)
                    attempts.replica_switches += 1
                lost = taken
            finally:
                attempts.inboxes.discard(inbox)
                inbox.close()
            if taken:
                take_by = self._take_by(end)
                patience_s = FIRST_PATIENCE_S
                continue
            if loop.time() + backoff_s > take_by:
                raise _too_late()
            await asyncio.sleep(backoff_s)
            backoff_s = min(2 * backoff_s, LONGEST_BACKOFF_S)
            patience_s = min(2 * patience_s, LONGEST_PATIENCE_S)

    def _take_by(self, end: float) -> float:
        """Return the loop time until which a replica has to take what waits from now on."""
        return min(asyncio.get_running_loop().time() + self._limits.cold_start_deadline_s, end)

    async def _attempt(
        self,
        inbox: Inbox,
        generation: Generation,
        share: Share,
        take_by: float,
        patience_s: float,
        end: float,
        lost: bool,
    ) -> AsyncGenerator[TokenDelta]:
        """Yield what one replica generates; `lost` says that another has lost it just now."""
        loop = asyncio.get_running_loop()
        offers = _Offers(inbox, patience_s, self._receiver.doubt)
        tokens = len(generation.token_ids) + generation.sampling.max_tokens
        route = Route(share, generation.token_ids, tokens, offers.offered)
        call = asyncio.create_task(self._watch(inbox, generation, route, lost))
        timer = _fail_at(inbox, take_by)
        try:
            delta = await inbox.get()  # empty: the replica says that it has the generation
            timer.cancel()
            offers.end()
            if generation.resumed_tokens == 0 and not delta.token_ids:
                first = loop.time() + self._limits.first_token_deadline_s
                timer = _fail_at(inbox, min(first, end))
                delta = await inbox.get()
                timer.cancel()
            timer = _fail_at(inbox, end)
            while delta.finish_reason is None:
                if delta.token_ids:
                    yield delta
                delta = await inbox.get()
            yield delta
        finally:
            timer.cancel()
            offers.end()
            if inbox.finished:
                # Its answer is on the way; a cancel would only cost the replica work.
                self._ending.add(call)
                call.add_done_callback(self._ending.discard)
            else:
                call.cancel()

    async def _watch(self, inbox: Inbox, generation: Generation, route: Route, lost: bool) -> None:
        """Tell the inbox how the dispatch call ended."""
        try:
            if lost and await self._handle.resume(generation, inbox, route):
                return
            decode_end(await self._handle.generate(encode(generation), route))
        except asyncio.CancelledError:
            # Not only by us: Serve cancels the calls to a replica that it ends.
            inbox.fail(ReplicaLostError("The engine replica gave the generation up."))
            raise
        except TeraError as error:
            inbox.fail(error)
            return
        except msgspec.MsgspecError:
            inbox.fail(EngineError("The engine replica gave no readable answer."))
            return
        if inbox.finished:
            return
        # The tokens travel beside the call, so its end can overtake the last frame.
        await asyncio.sleep(LAST_FRAME_GRACE_S)
        inbox.fail(ReplicaLostError("The engine replica's last tokens did not arrive."))


class _Offers:
    """Gives a replica up that does not take what it is sent."""

    def __init__(self, inbox: Inbox, patience_s: float, doubt: Callable[[str], None]) -> None:
        self._inbox = inbox
        self._patience_s = patience_s
        self._doubt = doubt
        self._timer: asyncio.TimerHandle | None = None

    def offered(self, replica_id: str) -> None:
        """Take note that the generation is on its way to a replica, after another perhaps."""
        self.end()
        self._inbox.offered_to = replica_id
        self._timer = asyncio.get_running_loop().call_later(
            self._patience_s, self._give_up, replica_id
        )

    def end(self) -> None:
        """Wait for nobody any more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _give_up(self, replica_id: str) -> None:
        self._doubt(replica_id)
        self._inbox.fail(ReplicaLostError("The engine replica may have been lost."))


class _Failures:
    """The replicas that failed on one generation, and whether it may go to another."""

    def __init__(self, request_id: str, retries: int, budget: RetryBudget) -> None:
        self._request_id = request_id
        self._retries = retries
        self._budget = budget
        self._failures = self._losses = self._early_losses = 0

    def add(self, error: EngineError, after_s: float) -> None:
        """Take note that a replica failed so long after it had taken the generation.

        Raises:
            BackendFailureError: the generation is given up.
        """
        lost = isinstance(error, ReplicaLostError)
        self._failures += 1
        self._losses += lost
        self._early_losses += lost and after_s <= POISON_WINDOW_S
        if self._early_losses >= POISON_LOSSES:
            log.error(
                "Request %s: %d replicas were lost soon after they took it; given up",
                self._request_id,
                self._early_losses,
            )
            raise BackendFailureError(
                "This request itself seems to make the model's engines fail."
            ) from error
        if self._failures > self._retries:
            raise BackendFailureError(
                "The model's engines failed repeatedly on this request."
            ) from error
        # One death takes along whatever runs on the replica, and that all of it may move is what
        # migration is for; the dead replica fails nothing more. So the first loss is free.
        first_loss = lost and self._losses == 1
        if not first_loss and not self._budget.spend():
            raise BackendFailureError(
                "The model's engines fail too often to try this request again."
            ) from error


def _resumed(
    generation_id: int,
    request_id: str,
    prompt: list[int],
    generated: list[int],
    sampling: Sampling,
    reply_to: tuple[str, int],
) -> Generation:
    """Return the generation that goes on after `generated`."""
    if generated:
        sampling = msgspec.structs.replace(
            sampling,
            max_tokens=sampling.max_tokens - len(generated),
            prompt_logprobs=None,
        )
    return Generation(
        generation_id=generation_id,
        request_id=request_id,
        token_ids=[*prompt, *generated],
        sampling=sampling,
        reply_to=reply_to,
        resumed_tokens=len(generated),
    )


def _fail_at(inbox: Inbox, when: float) -> asyncio.TimerHandle:
    """Fail the inbox at loop time `when`; one timer is cheaper than a time-out per token."""
    return asyncio.get_running_loop().call_at(when, inbox.fail, _too_late())


def _too_late() -> BackendFailureError:
    return BackendFailureError("The model did not answer before the request's deadline.")

"""Runs one generation to its end, over as many of a model's replicas as it takes.

A generation is its prompt, its sampling and the ids generated so far, and all three are kept here,
in the gateway. So it survives the death of the replica that generates its tokens. Step by step:

1. A `Run` takes a seat at a replica (`Fleet`) and sends it the generation over the replica's link.
   The replica confirms with an empty delta, and then sends a frame for each engine step; each delta
   goes straight into the run's sink and adds to `generated`.
2. The replica dies. Its connection breaks at once; or, where nothing closes it (a frozen process, a
   node that is gone), no heartbeat comes for `wire.SILENCE_S` and the link is closed here.
3. `ReplicaLink.connection_lost` first takes the replica off the switchboard, so that nothing is
   sent there again, and then fails each run that was in progress on that link.
4. The run wakes up and asks `after_loss`, a pure function, whether to retry, resume or give up.
   That depends on how long the replica had had the generation, and on how many losses it has seen.
5. To resume, the run takes another seat. It waits neither behind new generations nor for room:
   replicas accept what others have lost beyond their usual number.
6. The new replica gets prompt and generated ids as its prompt, with a new generation id, so that
   late frames of the old attempt match nothing. It continues after these ids: the sink gets the
   next id, and the client sees a gap of one prefill. No id is delivered twice.
7. If all `max_tokens` ids had arrived and only the final delta was lost, nothing is sent to another
   replica: the run finishes by itself.
8. Meanwhile the fleet asks the lost replica to reconnect until Serve has removed it and started
   another, which connects before it is given work.
"""

import asyncio
import logging
import time
from dataclasses import dataclass
from typing import Protocol

import msgspec

from tera.errors import (
    BackendFailureError,
    EngineError,
    InternalError,
    ReplicaLostError,
    TeraError,
)
from tera.generation import FinishReason, Generation, Sampling, TokenDelta, TokenLogprobs
from tera.routing.fleet import Fleet, Seat
from tera.routing.link import ReplicaLinks
from tera.routing.loss import GiveUp, Losses, Resume, after_loss
from tera.routing.queue import Place, Queue
from tera.routing.retry_budget import RetryBudget
from tera.routing.switchboard import Route, Share

log = logging.getLogger(__name__)


class Sink(Protocol):
    """Receives a generation's tokens, while the frame that brings them is being read."""

    def push(self, delta: TokenDelta) -> bool:
        """Take new tokens, without waiting; return whether the generation can stop."""
        ...


@dataclass(frozen=True, slots=True)
class DispatchLimits:
    """How long and how often one generation is tried."""

    deadline_s: float
    """Time for all of it, from the request's arrival at the gateway, including queueing."""
    first_token_deadline_s: float
    """Time to the first token, from when it is sent to a replica."""
    cold_start_deadline_s: float
    """Time until a replica has room, from its start or from the loss of its last replica."""
    retries: int
    """How many more replicas are tried after one that had accepted the generation failed."""
    most_queued: int = 256
    """Generations that may wait here until a replica accepts them."""


@dataclass(frozen=True, slots=True)
class Work:
    """One completion that a client wants."""

    request_id: str
    arrived: float
    """When the request arrived, in the event loop's time."""
    share: Share
    prompt_token_ids: list[int]
    sampling: Sampling
    cache_salt: str
    """Of the prompt; see `Generation`."""


class Dispatcher:
    """Sends generations of one model to its replicas."""

    def __init__(self, fleet: Fleet, links: ReplicaLinks, limits: DispatchLimits) -> None:
        self.fleet = fleet
        self.links = links
        self.limits = limits
        self.queue = Queue(limits.most_queued, time.monotonic)
        self.budget = RetryBudget()

    def run(self, work: Work, sink: Sink) -> "Run":
        """Return a generation that is ready to start; see `Run.to_end`."""
        return Run(self, work, sink)


class Run:
    """One generation, from its place in the queue to its last token; used once."""

    def __init__(self, model: Dispatcher, work: Work, sink: Sink) -> None:
        self._model = model
        self._work = work
        self._sink = sink
        self._loop = asyncio.get_running_loop()
        self._end_by = work.arrived + model.limits.deadline_s
        self._generated: list[int] = []
        self._prompt_logprobs: list[TokenLogprobs | None] = []
        self._losses = Losses()
        self._moved = self._refused = False
        self._taken_at: float | None = None
        self._outcome: asyncio.Future[None] = self._loop.create_future()
        self._timer: asyncio.TimerHandle | None = None
        self.taken = False
        """A replica has taken it, and works on its prompt at the least."""
        self.replica_switches = 0
        """How often another replica had to continue, for ledger and metrics."""

    async def to_end(self) -> None:
        """Push the generation's deltas into the sink, surviving the loss of replicas.

        Returns when the sink has had enough or the delta with the finish reason. Cancelling it
        stops the engine's work.

        Raises:
            EngineOverloadedError: the model's queue is full, or a tenant with fewer generations in
                it got this one's place.
            BackendFailureError: retries, their budget or a deadline are used up, or the request
                itself seems to make engines fail.
            InvalidRequestError: the engine refuses the parameters.
        """
        place = self._model.queue.enter(self._work.share.tenant)
        self._model.budget.earn()
        again = False
        try:
            while not self._is_complete():
                seat = await self._seat(place, again=again)
                place.leave(taken=True)
                again = True
                try:
                    await self._attempt(seat)
                    return
                except EngineError as error:
                    self._go_on_after(error)
                finally:
                    seat.leave(refused=self._refused)
        finally:
            place.leave()

    def receive(self, delta: TokenDelta) -> None:
        """Handle new tokens; see `Listener`."""
        if self._outcome.done():
            return
        if self._taken_at is None:
            self._taken_at = self._loop.time()
            self.taken = True
        if delta.prompt_logprobs is not None:
            # Those of a long prompt are spread over several frames before the first token.
            self._prompt_logprobs += delta.prompt_logprobs
            delta = msgspec.structs.replace(delta, prompt_logprobs=self._prompt_logprobs)
        if not delta.token_ids and delta.finish_reason is None:
            return
        if len(self._generated) + len(delta.token_ids) > self._work.sampling.max_tokens:
            # The tenant would pay for more than it asked for and was admitted with.
            self.fail(EngineError("The engine made more tokens than it was asked for."))
            return
        self._generated += delta.token_ids
        try:
            enough = self._sink.push(delta)
        except Exception:
            # Any error concerns only this request: the link must deliver others' tokens too.
            log.exception("Request %s: its tokens could not be passed on.", self._work.request_id)
            self.fail(InternalError("The server failed on this request."))
            return
        if enough or delta.finish_reason is not None:
            self._outcome.set_result(None)

    def fail(self, error: TeraError) -> None:
        """Handle the failure of the attempt; see `Listener`."""
        if not self._outcome.done():
            self._outcome.set_exception(error)

    def refuse(self) -> None:
        """Handle that the replica has no room or time left; see `Listener`."""
        if not self._outcome.done():
            self._refused = True
            self.fail(ReplicaLostError("The engine replica has no room."))

    def _is_complete(self) -> bool:
        """Return whether every token has arrived; finish if only the final delta was lost."""
        if len(self._generated) < self._work.sampling.max_tokens:
            return False
        self._sink.push(TokenDelta(0, [], FinishReason.LENGTH))
        return True

    async def _seat(self, place: Place, *, again: bool) -> Seat:
        """Return a seat at a replica; `again` means that it already had a turn, in vain.

        Raises:
            BackendFailureError: no replica had room before the deadline.
            EngineOverloadedError: the place in the queue was taken away.
        """
        work, fleet = self._work, self._model.fleet
        token_ids = [*work.prompt_token_ids, *self._generated]
        most_tokens = len(work.prompt_token_ids) + work.sampling.max_tokens
        route = Route(work.share, token_ids, work.cache_salt, most_tokens, self._moved)
        # The usual case: no task or timer is needed while there is room.
        seat = fleet.seat_now(route)
        if seat is not None:
            return seat
        take_by = min(self._loop.time() + self._model.limits.cold_start_deadline_s, self._end_by)
        try:
            with place.held():
                async with asyncio.timeout_at(take_by):
                    return await fleet.seat(route, again=again)
        except TimeoutError:
            raise _too_late() from None

    async def _attempt(self, seat: Seat) -> None:
        """Run what is missing on one replica; return at the end of the generation."""
        self._outcome = self._loop.create_future()
        self._taken_at, self._refused, self._prompt_logprobs = None, False, []
        began = self._loop.time()
        first_by = self._end_by
        if not self._generated:
            first_by = min(first_by, began + self._model.limits.first_token_deadline_s)
        self._timer = self._loop.call_at(first_by, self._check_time)
        seat.begin(self._generation(), self)
        try:
            await self._outcome
        finally:
            self._timer.cancel()

    def _generation(self) -> Generation:
        """Return what another replica needs to continue after the ids so far."""
        generated, sampling = self._generated, self._work.sampling
        if generated:
            # The prompt's log-probabilities were sent with the first delta: not again.
            sampling = msgspec.structs.replace(
                sampling, max_tokens=sampling.max_tokens - len(generated), prompt_logprobs=None
            )
        return Generation(
            generation_id=self._model.links.new_generation_id(),
            request_id=self._work.request_id,
            token_ids=[*self._work.prompt_token_ids, *generated],
            sampling=sampling,
            resumed_tokens=len(generated),
            cache_salt=self._work.cache_salt,
        )

    def _check_time(self) -> None:
        """Fail the attempt if its time is up; one timer is cheaper than a time-out per token."""
        if self._generated and self._loop.time() < self._end_by:
            self._timer = self._loop.call_at(self._end_by, self._check_time)
        else:
            self.fail(_too_late())

    def _go_on_after(self, error: EngineError) -> None:
        """Prepare the next attempt.

        Raises:
            BackendFailureError: there will be no further attempt.
        """
        if self._refused:
            # Not a failure: a draining replica gives back what it has no time for.
            self._moved |= self._taken_at is not None
            self.replica_switches += self._taken_at is not None
            return
        taken_for_s = None if self._taken_at is None else self._loop.time() - self._taken_at
        budget = self._model.budget
        match after_loss(
            error,
            taken_for_s,
            self._losses,
            retries=self._model.limits.retries,
            affordable=budget.affords_one,
        ):
            case GiveUp(reason, poisonous):
                if poisonous:
                    log.error(
                        "Request %s: replicas were lost soon after they took it; given up",
                        self._work.request_id,
                    )
                raise BackendFailureError(reason) from error
            case Resume(losses, paid):
                self._losses, self._moved = losses, True
                self.replica_switches += 1
                if paid:
                    budget.spend()


def _too_late() -> BackendFailureError:
    return BackendFailureError("The model did not answer before the request's deadline.")

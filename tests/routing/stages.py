"""The gateway's side of one model, on which a test begins generations."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from tera.generation import FinishReason, Sampling, TokenDelta, TokenLogprobs
from tera.routing.fleet import Fleet
from tera.routing.link import ReplicaLinks
from tera.routing.run import Dispatcher, DispatchLimits, Run, Work
from tera.routing.switchboard import Share

PROMPT = [10, 11, 12]
SALT = "salt"
PATIENT = DispatchLimits(
    deadline_s=60, first_token_deadline_s=60, cold_start_deadline_s=60, retries=2
)


def limits(**changes: float) -> DispatchLimits:
    """Return limits that no test meets by chance, but for the changed ones."""
    kept = {name: getattr(PATIENT, name) for name in DispatchLimits.__slots__}
    return DispatchLimits(**{**kept, **changes})


@dataclass
class Sink:
    """What a client would be sent; it has enough after so many tokens."""

    enough_after: float = float("inf")
    deltas: list[TokenDelta] = field(default_factory=list)

    def push(self, delta: TokenDelta) -> bool:
        self.deltas.append(delta)
        return len(self.token_ids) >= self.enough_after

    @property
    def token_ids(self) -> list[int]:
        return [token_id for delta in self.deltas for token_id in delta.token_ids]

    @property
    def finish_reasons(self) -> list[FinishReason]:
        return [delta.finish_reason for delta in self.deltas if delta.finish_reason is not None]

    @property
    def logprobs(self) -> list[TokenLogprobs]:
        return [entry for delta in self.deltas for entry in delta.logprobs or ()]


class Going:
    """A generation that is under way."""

    def __init__(self, run: Run, sink: Sink) -> None:
        self.run = run
        self.sink = sink
        self.task = asyncio.create_task(run.to_end())

    async def end(self) -> None:
        """Wait for its end; raises what it ends with."""
        async with asyncio.timeout(20):
            await self.task

    async def cancel(self) -> None:
        """Hang up, as a client does."""
        self.task.cancel()
        await asyncio.wait([self.task])
        assert self.task.cancelled()


class Stage:
    """One model's gateway side, which begins generations."""

    def __init__(self, fleet: Fleet, links: ReplicaLinks, limits: DispatchLimits = PATIENT) -> None:
        self.dispatcher = Dispatcher(fleet, links, limits)

    def go(
        self,
        sampling: Sampling | None = None,
        *,
        prompt: Sequence[int] = PROMPT,
        tenant: str = "tenant",
        age_s: float = 0.0,
        sink: Sink | None = None,
    ) -> Going:
        """Begin a generation, of a request that has arrived so long ago."""
        arrived = asyncio.get_running_loop().time() - age_s
        sink = sink or Sink()
        sampling = sampling or Sampling(max_tokens=9)
        work = Work("request", arrived, Share(tenant), list(prompt), sampling, SALT)
        return Going(self.dispatcher.run(work, sink), sink)

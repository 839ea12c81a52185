"""Replicas of real engines, in this process."""

from collections.abc import Awaitable, Callable, Sequence
from typing import Self

from tests.routing.conftest import HOST, MANY, SECRET, Address, CountedFleet, FakeServe

from tera.engine.base import TextEngine
from tera.engine.link import GatewayLinks, _is_open
from tera.engine.runs import Runs
from tera.errors import ReplicaLostError, TeraError
from tera.generation import Generation, ReplicaLoad, TokenDelta
from tera.routing.fleet import Changed
from tera.routing.link import ReplicaLinks
from tera.routing.switchboard import Switchboard


class EngineReplica:
    """An engine replica in this process, all of it but Serve, which can die."""

    def __init__(self, name: str, engine: TextEngine) -> None:
        self.name = name
        self.engine = engine
        self.runs = Runs(engine)
        self.links = GatewayLinks(name, SECRET, self.runs)
        self.dead = False

    async def connect(self, address: Address) -> None:
        if self.dead:
            raise ReplicaLostError("The engine replica was lost.")
        await self.links.connect(address)

    async def drain(self, timeout_s: float) -> None:
        """End as `EngineReplica` does in a replica that Serve takes away."""
        self.links.drain()
        await self.runs.drain(timeout_s)
        await self.links.close()

    def die(self) -> None:
        """Break the connections, as the death of the process does."""
        self.dead = True
        for task in self.links._links.values():
            if _is_open(task):
                transport = task.result()._transport
                assert transport is not None
                transport.abort()
            else:
                task.cancel()


class MortalEngine:
    """An engine whose replica dies at a generation's token after so many; None is never."""

    def __init__(self, engine: TextEngine, lives_for: int | None) -> None:
        self._engine = engine
        self._lives_for = lives_for
        self.die: Callable[[], None] = lambda: None
        self.started: list[Generation] = []

    def start(
        self,
        generation: Generation,
        emit: Callable[[TokenDelta], None],
        ended: Callable[[TeraError], None],
    ) -> Callable[[], None]:
        self.started.append(generation)
        tokens = 0

        def counted(delta: TokenDelta) -> None:
            nonlocal tokens
            if self._lives_for is not None and tokens >= self._lives_for:
                self.die()
                return
            tokens += len(delta.token_ids)
            emit(delta)

        return self._engine.start(generation, counted, ended)

    def load(self) -> ReplicaLoad:
        return self._engine.load()

    def metrics_text(self) -> str:
        return self._engine.metrics_text()

    async def check_health(self) -> None:
        await self._engine.check_health()

    async def close(self) -> None:
        await self._engine.close()


class EngineFleet:
    """A model's replicas over one engine in this process, with the real token channel between.

    The n-th generation begins on a replica of its own, which is lost after `deaths[n]` tokens;
    those after the last death share one that lives.
    """

    def __init__(self, engine: TextEngine, deaths: Sequence[int] | None = None) -> None:
        self.links = ReplicaLinks(HOST, SECRET)
        self.serve = OneAfterAnother()
        self.fleet = CountedFleet(self.links, Switchboard(), self.serve.attached)
        self._engines = [MortalEngine(engine, lives_for) for lives_for in [*(deaths or ()), None]]
        self._replicas: list[EngineReplica] = []
        for number, mortal in enumerate(self._engines):
            replica = EngineReplica(f"replica-{number}", mortal)
            mortal.die = replica.die
            self._replicas.append(replica)

    async def __aenter__(self) -> Self:
        await self.links.__aenter__()
        # All before the fleet knows the first, so that none has to be waited for.
        for replica in self._replicas:
            await replica.connect(self.links.address)
        self.serve.reveal({each.name: each.connect for each in self._replicas})
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.fleet.changed({})
        for replica in self._replicas:
            await replica.links.close()
        await self.links.__aexit__(None, None, None)

    @property
    def dispatched(self) -> list[Generation]:
        """What replicas were sent, in the order in which it was sent."""
        started = [generation for engine in self._engines for generation in engine.started]
        return sorted(started, key=lambda generation: generation.generation_id)


class OneAfterAnother(FakeServe):
    """Lets each generation begin on the next replica alone, and all others share the last."""

    def __init__(self) -> None:
        super().__init__()
        self._unused: list[str] = []
        self._changed: Changed = lambda _: None

    def attached(self, changed: Changed) -> Self:
        """Be the view of a fleet's deployment."""
        self._changed = changed
        return self

    def reveal(self, replicas: dict[str, Callable[[Address], Awaitable[None]]]) -> None:
        self.replicas = replicas
        self._unused = list(replicas)
        self._tell()

    def seated(self, replica: str) -> None:
        super().seated(replica)
        if replica == self._unused[0] and len(self._unused) > 1:
            del self._unused[0]
            self._tell()

    def left(self, replica: str) -> None:
        super().left(replica)
        self._tell()

    def _tell(self) -> None:
        """Show the replicas that are full, and the one that is next and so has room."""
        full = {replica: 1 for replica, count in self.running.items() if count}
        room = MANY if len(self._unused) == 1 else 1
        self._changed({**full, self._unused[0]: room})

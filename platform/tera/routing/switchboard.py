"""Gives the generations of one model to its replicas, at one gateway replica."""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tera.generation import ReplicaLoad
from tera.routing.choice import LoadBoard, choose
from tera.routing.fair_queue import FairQueue
from tera.routing.prefix_index import PrefixIndex, fingerprints

FULL_CACHE_RATIO = 0.95
"""KV use from which on the engine preempts what runs to make room."""
FULL_CACHE_LOAD = 8
"""Generations that a full KV cache counts as."""
ASLEEP_LOAD = 8
"""Generations that an engine counts as which waits for its turn on a shared GPU."""
ASK_AGAIN_S = 0.5
"""After so long a replica that was full, and from which nothing is heard, is tried once more."""


@dataclass(frozen=True, slots=True)
class Share:
    """Who waits, and how much of the replicas is theirs beside that of others who wait."""

    tenant: str
    weight: float = 1


@dataclass(frozen=True, slots=True)
class Route:
    """What the choice of a replica is made of."""

    share: Share
    token_ids: list[int]
    """The prompt, with what has been generated."""
    tokens: int
    """The most that it can cost."""
    offered: Callable[[str], None]
    """Told which replica the generation is sent to, each time one is chosen."""


@dataclass(slots=True)
class _Replica:
    capacity: int
    mine: int = 0
    """Generations of this gateway replica."""
    others: int = 0
    """Generations of others, as of its last report."""
    penalty: int = 0
    suspect: bool = False
    """It may be lost: nothing is given to it until it has answered."""

    @property
    def load(self) -> int:
        return self.mine + self.others + self.penalty


class _Waiting:
    def __init__(self, prints: list[int]) -> None:
        self.prints = prints
        self.granted: asyncio.Future[str] = asyncio.get_running_loop().create_future()


class Switchboard:
    """Chooses a replica for each generation, or holds it until one has room.

    What each replica has to do is counted here and corrected by what replicas report, those of
    other gateway replicas included. Whoever takes a replica releases it.
    """

    def __init__(self, *, prefix_affinity: bool = True) -> None:
        self.prefix_affinity = prefix_affinity
        """Prefer replicas that have the prompt's beginning cached; may be changed at any time."""
        self.on_suspect: Callable[[str], None] | None = None
        """Told of a replica that may be lost; whoever has heard from it calls `trust`."""
        self._replicas: dict[str, _Replica] = {}
        self._board = LoadBoard()
        self._index = PrefixIndex()
        self._waiting: FairQueue[_Waiting] = FairQueue(lambda each: not each.granted.done())
        self._again: asyncio.TimerHandle | None = None

    def set_replicas(self, capacities: Mapping[str, int]) -> None:
        """Take note of which replicas there are and how much each takes at a time."""
        for replica_id in self._replicas.keys() - capacities.keys():
            self.drop(replica_id)
        for replica_id, capacity in capacities.items():
            replica = self._replicas.setdefault(replica_id, _Replica(capacity))
            replica.capacity = capacity
            self._post(replica_id, replica)
        self._grant()

    async def take(self, route: Route, *, again: bool = False) -> str:
        """Return the replica that gets a generation, waiting for one with room if need be.

        Args:
            route: of the generation.
            again: it has had its turn, and the replica refused it.
        """
        prints = fingerprints(route.token_ids) if self.prefix_affinity else []
        waiting = _Waiting(prints)
        if again:
            self._waiting.push_front(waiting)
        else:
            share = route.share
            self._waiting.push(share.tenant, route.tokens / share.weight, waiting)
        self._grant()
        try:
            return await waiting.granted
        except asyncio.CancelledError:
            if waiting.granted.done() and not waiting.granted.cancelled():
                self.release(waiting.granted.result())
            raise

    def release(self, replica_id: str) -> None:
        """Take note that a replica is done with one generation, or never got it."""
        replica = self._replicas.get(replica_id)
        if replica is not None:
            replica.mine = max(0, replica.mine - 1)
            self._post(replica_id, replica)
            self._grant()

    def report(self, replica_id: str, load: ReplicaLoad) -> None:
        """Take note of what a replica's engine says that it has to do."""
        replica = self._replicas.get(replica_id)
        if replica is None:
            return
        before = replica.load
        replica.others = max(0, load.running + load.waiting - replica.mine)
        # What waits in an engine waits behind all that runs there: it counts twice.
        full = load.kv_usage_ratio >= FULL_CACHE_RATIO
        replica.penalty = (
            load.waiting + (FULL_CACHE_LOAD if full else 0) + (ASLEEP_LOAD if load.asleep else 0)
        )
        if replica.load != before:
            self._post(replica_id, replica)
            if replica.load < before:
                self._grant()

    def counted(self, replica_id: str, ongoing: int) -> None:
        """Take note of how many generations a replica has, which it says to each that it gets."""
        replica = self._replicas.get(replica_id)
        if replica is not None:
            # A full one has refused the generation, which is still counted as ours.
            refused = ongoing >= replica.capacity
            replica.others = max(0, ongoing - replica.mine + refused)
            self._post(replica_id, replica)

    def suspect(self, replica_id: str) -> None:
        """Give a replica nothing for now: its connection broke, or it cannot be reached."""
        replica = self._replicas.get(replica_id)
        if replica is not None and not replica.suspect:
            replica.suspect = True
            replica.others = replica.penalty = 0
            self._post(replica_id, replica)
            if self.on_suspect is not None:
                self.on_suspect(replica_id)

    def trust(self, replica_id: str) -> None:
        """Use a replica again: it has answered."""
        replica = self._replicas.get(replica_id)
        if replica is not None and replica.suspect:
            replica.suspect = False
            self._post(replica_id, replica)
            self._grant()

    def drop(self, replica_id: str) -> None:
        """Forget a replica: it is dead or draining."""
        self._replicas.pop(replica_id, None)
        self._board.remove(replica_id)

    def _post(self, replica_id: str, replica: _Replica) -> None:
        if replica.suspect:
            self._board.remove(replica_id)
        else:
            self._board.put(replica_id, replica.load, replica.capacity)

    def _grant(self) -> None:
        """Give replicas to those who wait, in their order, while there is room."""
        while (waiting := self._waiting.first()) is not None:
            replica_id = choose(self._board, self._index, waiting.prints)
            if replica_id is None:
                self._ask_again_later()
                return
            self._waiting.pop()
            replica = self._replicas[replica_id]
            replica.mine += 1
            self._post(replica_id, replica)
            self._index.add(waiting.prints, replica_id)
            waiting.granted.set_result(replica_id)

    def _ask_again_later(self) -> None:
        if self._again is None and self._board:
            self._again = asyncio.get_running_loop().call_later(ASK_AGAIN_S, self._ask_again)

    def _ask_again(self) -> None:
        """Let those be asked that no report comes from, since they have nothing of ours."""
        self._again = None
        for replica_id, replica in self._replicas.items():
            if replica.mine == 0 and replica.others:
                replica.others = 0
                self._post(replica_id, replica)
        self._grant()

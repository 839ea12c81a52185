"""Assigns the generations of one model to its replicas, in one gateway replica."""

import asyncio
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

from tera.generation import ReplicaLoad
from tera.routing.choice import LoadBoard, choose
from tera.routing.fair_queue import FairQueue
from tera.routing.prefix_index import PrefixIndex, fingerprints

FULL_CACHE_RATIO = 0.95
"""KV cache use from which the engine preempts running generations."""
FULL_CACHE_LOAD = 8
"""A full KV cache counts as this many generations."""
ASLEEP_LOAD = 8
"""Waiting for a turn on a shared GPU counts as this many generations."""
MOVED_ROOM = 2.0
"""A replica accepts what others have lost up to this multiple of its capacity: engines queue, and a
stream that has begun should not wait for others to end."""


@dataclass(frozen=True, slots=True)
class Share:
    """A waiting tenant, and its weight relative to other waiting tenants."""

    tenant: str
    weight: float = 1


@dataclass(frozen=True, slots=True)
class Route:
    """What a replica is chosen by."""

    share: Share
    token_ids: list[int]
    """The prompt and what has been generated so far."""
    cache_salt: str
    """Of the prompt; see `Generation`."""
    tokens: int
    """The largest number of tokens that it can cost."""
    moved: bool = False
    """Whether another replica has lost it: within bounds, it does not wait for room."""


@dataclass(slots=True)
class _Replica:
    capacity: int
    mine: int = 0
    """Generations of this gateway replica."""
    others: int = 0
    """Generations of other gateway replicas, as of the last report."""
    penalty: int = 0
    connected: bool = False
    """Whether it may be given work: it is connected and not suspected to be lost."""

    @property
    def load(self) -> int:
        return self.mine + self.others + self.penalty


class _Waiting:
    def __init__(self, prints: list[int]) -> None:
        self.prints = prints
        self.granted: asyncio.Future[str] = asyncio.get_running_loop().create_future()


class Switchboard:
    """Chooses a replica for each generation, or holds it until one has room.

    Each replica's load is counted here and corrected by its reports, which include the generations
    of other gateway replicas. Every `take` must be followed by a `release`.
    """

    def __init__(self, *, prefix_affinity: bool = True) -> None:
        self.prefix_affinity = prefix_affinity
        """Prefer replicas that have the prompt's beginning cached; may be changed at any time."""
        self._replicas: dict[str, _Replica] = {}
        self._board = LoadBoard()
        self._index = PrefixIndex()
        self._waiting: FairQueue[_Waiting] = FairQueue(lambda each: not each.granted.done())
        self._moved: deque[_Waiting] = deque()
        """Waiting generations that another replica has lost, in order."""

    def set_replicas(self, capacities: Mapping[str, int]) -> None:
        """Set which replicas exist and how many generations each runs at a time."""
        for replica_id in self._replicas.keys() - capacities.keys():
            self.drop(replica_id)
        for replica_id, capacity in capacities.items():
            replica = self._replicas.setdefault(replica_id, _Replica(capacity))
            replica.capacity = capacity
            self._post(replica_id, replica)
        self._grant()

    def capacity(self, replica_id: str) -> int:
        """Return how many generations a replica runs at a time; 0 if it does not exist."""
        replica = self._replicas.get(replica_id)
        return 0 if replica is None else replica.capacity

    def take_now(self, route: Route) -> str | None:
        """Return a replica that has room now, unless earlier generations are waiting."""
        # Whoever comes now must not overtake those that wait, though a place is free this moment.
        if not route.moved and self._waiting.first() is not None:
            return None
        return self._give(self._prints(route), moved=route.moved)

    async def take(self, route: Route, *, again: bool = False) -> str:
        """Return the replica that gets a generation, waiting for one with room.

        Args:
            route: of the generation.
            again: it has had its turn, and the replica refused it or was lost.
        """
        waiting = _Waiting(self._prints(route))
        if route.moved:
            self._moved.append(waiting)
        elif again:
            self._waiting.push_front(waiting)
        else:
            share = route.share
            self._waiting.push(share.tenant, route.tokens / share.weight, waiting)
        self._grant()
        try:
            return await waiting.granted
        except asyncio.CancelledError:
            # Granted in the same turn in which it was cancelled: give the replica back.
            if waiting.granted.done() and not waiting.granted.cancelled():
                self.release(waiting.granted.result())
            else:
                self._waiting.remove(route.share.tenant, waiting)
                if waiting in self._moved:
                    self._moved.remove(waiting)
            raise

    def _prints(self, route: Route) -> list[int]:
        if not self.prefix_affinity:
            return []
        return fingerprints(route.token_ids, route.cache_salt)

    def release(self, replica_id: str) -> None:
        """Record that a replica is done with one generation, or never got it."""
        replica = self._replicas.get(replica_id)
        if replica is not None:
            # Not below 0: one that drains is dropped, and Serve may list it once more.
            replica.mine = max(0, replica.mine - 1)
            self._post(replica_id, replica)
            self._grant()

    def report(self, replica_id: str, load: ReplicaLoad) -> None:
        """Record the load that a replica's engine reports."""
        replica = self._replicas.get(replica_id)
        if replica is None:
            return
        before = replica.load
        # The replica reports a total; what this gateway has not counted itself is others'.
        replica.others = max(0, load.running + load.waiting - replica.mine)
        # What waits in an engine waits behind everything that runs there: it counts twice.
        full = load.kv_usage_ratio >= FULL_CACHE_RATIO
        replica.penalty = (
            load.waiting + (FULL_CACHE_LOAD if full else 0) + (ASLEEP_LOAD if load.asleep else 0)
        )
        if replica.load != before:
            self._post(replica_id, replica)
            if replica.load < before:
                self._grant()

    def refused(self, replica_id: str, room: int) -> None:
        """Give a replica nothing until it reports: it runs `room` generations, more than known."""
        replica = self._replicas.get(replica_id)
        if replica is not None:
            replica.others = max(replica.others, room)
            self._post(replica_id, replica)

    def lost(self, replica_id: str) -> None:
        """Stop using a replica: it is no longer connected."""
        replica = self._replicas.get(replica_id)
        if replica is not None and replica.connected:
            replica.connected = False
            # Outdated by now: it reports again when it has reconnected.
            replica.others = replica.penalty = 0
            self._post(replica_id, replica)

    def connected(self, replica_id: str) -> None:
        """Start using a replica: it is connected."""
        replica = self._replicas.get(replica_id)
        if replica is not None and not replica.connected:
            replica.connected = True
            self._post(replica_id, replica)
            self._grant()

    def drop(self, replica_id: str) -> None:
        """Forget a replica: it is dead or draining."""
        self._replicas.pop(replica_id, None)
        self._board.remove(replica_id)

    def _post(self, replica_id: str, replica: _Replica) -> None:
        if replica.connected:
            self._board.put(replica_id, replica.load, replica.capacity)
        else:
            self._board.remove(replica_id)

    def _grant(self) -> None:
        """Assign replicas to waiting generations while there is room: moved ones first.

        Moved ones may exceed the room, so no other may be ahead of them.
        """
        while self._moved:
            if not self._granted(self._moved[0], moved=True):
                break
            self._moved.popleft()
        while (waiting := self._waiting.first()) is not None:
            if not self._granted(waiting, moved=False):
                break
            self._waiting.pop()

    def _granted(self, waiting: _Waiting, *, moved: bool) -> bool:
        """Return whether a waiting generation need wait no longer."""
        if not waiting.granted.done():
            replica_id = self._give(waiting.prints, moved=moved)
            if replica_id is None:
                return False
            waiting.granted.set_result(replica_id)
        return True

    def _give(self, prints: list[int], *, moved: bool) -> str | None:
        """Assign a prompt to a replica and count it there; return None if none has room."""
        replica_id = choose(self._board, self._index, prints)
        if replica_id is None and moved:
            replica_id = self._board.least(MOVED_ROOM)
        if replica_id is not None:
            replica = self._replicas[replica_id]
            replica.mine += 1
            self._post(replica_id, replica)
            # Already now: the next prompt with this beginning should follow it there.
            self._index.add(prints, replica_id)
        return replica_id

"""Which replica gets a generation: pure, so that it can be simulated by the million."""

import math
import random
from collections.abc import Callable, Sequence

from tera.routing.prefix_index import PrefixIndex

BOUND = 1.25
"""A replica is used for what it has cached while it has at most this times the mean load
(consistent hashing with bounded loads, Mirrokni, Thorup and Zadimoghaddam, 2017)."""
EASE = 0.25
"""Below this part of its capacity a replica is never too busy for what it has cached."""
SAMPLES = 4
"""Holders of a prefix that are compared: of many, some drawn at random are as good as all."""


class LoadBoard:
    """Replicas by load, a small whole number; the least loaded ones are found at once."""

    def __init__(self, draw: Callable[[], float] = random.random) -> None:
        """`draw` gives numbers in [0, 1)."""
        self._draw = draw
        self._capacity: dict[str, int] = {}
        self._load: dict[str, int] = {}
        self._place: dict[str, int] = {}
        self._by_load: dict[int, list[str]] = {}
        self._lowest = 0
        self._total = 0

    def __contains__(self, replica_id: str) -> bool:
        """Return whether there is such a replica."""
        return replica_id in self._load

    def __len__(self) -> int:
        """Return how many replicas there are."""
        return len(self._load)

    def load(self, replica_id: str) -> int:
        """Return a replica's load."""
        return self._load[replica_id]

    def put(self, replica_id: str, load: int, capacity: int) -> None:
        """Add a replica or change its figures; at a load of `capacity` it takes nothing."""
        self._capacity[replica_id] = capacity
        old = self._load.get(replica_id)
        if old == load:
            return
        if old is not None:
            self._take_out(replica_id, old)
        self._load[replica_id] = load
        self._total += load
        group = self._by_load.setdefault(load, [])
        self._place[replica_id] = len(group)
        group.append(replica_id)
        self._lowest = min(self._lowest, load) if len(self._load) > 1 else load

    def remove(self, replica_id: str) -> None:
        """Forget a replica, if it is there."""
        load = self._load.pop(replica_id, None)
        if load is not None:
            self._take_out(replica_id, load)
            del self._capacity[replica_id]

    def _take_out(self, replica_id: str, load: int) -> None:
        self._total -= load
        group = self._by_load[load]
        last = group.pop()
        place = self._place.pop(replica_id)
        if last != replica_id:
            group[place] = last
            self._place[last] = place
        if not group:
            del self._by_load[load]

    def bound(self) -> float:
        """Return the load up to which a replica is used for what it has cached."""
        return BOUND * (self._total + 1) / len(self._load)

    def fits(self, replica_id: str, bound: float) -> bool:
        """Return whether a replica that may have the prefix is not too busy for it."""
        load, capacity = self._load[replica_id], self._capacity[replica_id]
        return load < capacity and (load < math.ceil(bound) or load < EASE * capacity)

    def least(self) -> str | None:
        """Return one of the least loaded replicas, any; None if that one is full too."""
        if not self._load:
            return None
        while self._lowest not in self._by_load:
            self._lowest += 1
        replica_id = self.draw(self._by_load[self._lowest])
        return replica_id if self._lowest < self._capacity[replica_id] else None

    def draw(self, replica_ids: Sequence[str]) -> str:
        """Return one of them, any."""
        return replica_ids[int(self._draw() * len(replica_ids))]


def choose(board: LoadBoard, index: PrefixIndex, prints: Sequence[int]) -> str | None:
    """Return the replica that should have a prompt; None if all are full.

    That is the least loaded one among those that have most of the prompt cached and are not too
    busy, or have half of that, or its first block; else the least loaded of all, ties at random. So
    a new replica gets what is too much for the others, and with it their prefixes.

    Args:
        board: how busy the replicas are.
        index: what they have cached.
        prints: of the prompt, as `fingerprints` gives them; none for least loaded alone.
    """
    known = index.known(prints)
    if known and len(board):
        bound = board.bound()
        for depth in dict.fromkeys((known, (known + 1) // 2, 1)):
            holders = index.holders(prints[depth - 1])
            best, lowest = None, math.inf
            for _ in range(min(SAMPLES, len(holders))):
                replica_id = board.draw(holders) if len(holders) > SAMPLES else holders[_]
                if replica_id in board and board.fits(replica_id, bound):
                    load = board.load(replica_id)
                    if load < lowest:
                        best, lowest = replica_id, load
            if best is not None:
                return best
    return board.least()

"""Which replica gets a generation: pure, so that it can be simulated by the million."""

import bisect
import math
import random
import zlib
from collections.abc import Callable, Sequence

from tera.routing.prefix_index import PrefixIndex

BOUND = 1.25
"""A replica is used for what it has cached while it has at most this times the mean load
(consistent hashing with bounded loads, Mirrokni, Thorup and Zadimoghaddam, 2017)."""
EASE = 0.25
"""Below this part of its capacity a replica is never too busy for what it has cached."""
POINTS = 32
"""Places of each replica on the ring; with fewer, one would be responsible for much more than
another."""
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
        self._ring: list[tuple[int, str]] = []

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
        else:
            for point in _points(replica_id):
                bisect.insort(self._ring, point)
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
            self._ring = [point for point in self._ring if point[1] != replica_id]

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

    def home(self, block: int, bound: float) -> str | None:
        """Return the replica on which a prompt that nobody knows belongs; None if that is far.

        All gateway replicas find the same one, though they do not talk to each other, and it stays
        the same for most prompts when replicas come and go (consistent hashing).
        """
        start = bisect.bisect(self._ring, (block & 0xFFFFFFFF, ""))
        for step in range(min(POINTS, len(self._ring))):
            _, replica_id = self._ring[(start + step) % len(self._ring)]
            if self._load[replica_id] < min(math.ceil(bound), self._capacity[replica_id]):
                return replica_id
        return None

    def least(self, room: float = 1.0) -> str | None:
        """Return one of the least loaded replicas, any; None if that one is full too.

        `room` times its capacity is when it counts as full.
        """
        if not self._load:
            return None
        while self._lowest not in self._by_load:
            self._lowest += 1
        replica_id = self.draw(self._by_load[self._lowest])
        return replica_id if self._lowest < room * self._capacity[replica_id] else None

    def draw(self, replica_ids: Sequence[str]) -> str:
        """Return one of them, any."""
        return replica_ids[int(self._draw() * len(replica_ids))]


def choose(board: LoadBoard, index: PrefixIndex, prints: Sequence[int]) -> str | None:
    """Return the replica that should have a prompt; None if all are full.

    That is the least loaded one among those that have most of the prompt cached and are not too
    busy, or have half of that, or its first block. If there is none it is where the prompt belongs,
    unless that is busier than others; else the least loaded of all, ties at random. So a new
    replica gets what is too much for the others, and with it their prefixes.

    Args:
        board: how busy the replicas are.
        index: what they have cached.
        prints: of the prompt, as `fingerprints` gives them; none for least loaded alone.
    """
    if not prints or not len(board):
        return board.least()
    bound = board.bound()
    known = index.known(prints)
    for depth in dict.fromkeys((known, (known + 1) // 2, 1)) if known else ():
        holders = index.holders(prints[depth - 1])
        if len(holders) > SAMPLES:
            holders = [board.draw(holders) for _ in range(SAMPLES)]
        idle_enough = [each for each in holders if each in board and board.fits(each, bound)]
        if idle_enough:
            return min(idle_enough, key=board.load)
    return board.home(prints[0], bound) or board.least()


def _points(replica_id: str) -> list[tuple[int, str]]:
    return [(zlib.crc32(f"{replica_id}#{n}".encode()), replica_id) for n in range(POINTS)]

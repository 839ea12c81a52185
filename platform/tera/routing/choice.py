"""Chooses the replica for a generation: pure functions, so that millions can be simulated."""

import bisect
import math
import random
import zlib
from collections.abc import Callable, Sequence

from tera.routing.prefix_index import PrefixIndex

BOUND = 1.25
"""A replica is used for what it has cached while its load is at most this times the mean
(consistent hashing with bounded loads, Mirrokni, Thorup and Zadimoghaddam, 2017)."""
EASE = 0.25
"""Below this fraction of its capacity, a replica is never too busy for what it has cached."""
POINTS = 32
"""Points of each replica on the hash ring; with fewer, the load would be uneven."""
SAMPLES = 4
"""How many holders of a prefix are compared: of many, a random sample is as good as all."""


class LoadBoard:
    """Replicas by load, a small integer; finds the least loaded ones in constant time."""

    def __init__(self, draw: Callable[[], float] = random.random) -> None:
        """`draw` returns random numbers in [0, 1)."""
        self._draw = draw
        self._capacity: dict[str, int] = {}
        self._load: dict[str, int] = {}
        self._place: dict[str, int] = {}
        self._by_load: dict[int, list[str]] = {}
        self._lowest = 0
        self._total = 0
        self._ring: list[tuple[int, str]] = []

    def __contains__(self, replica_id: str) -> bool:
        """Return whether the replica is on the board."""
        return replica_id in self._load

    def __len__(self) -> int:
        """Return how many replicas there are."""
        return len(self._load)

    def load(self, replica_id: str) -> int:
        """Return a replica's load."""
        return self._load[replica_id]

    def put(self, replica_id: str, load: int, capacity: int) -> None:
        """Add a replica or change its figures; at a load of `capacity` it accepts nothing."""
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
        """Remove a replica, if it is on the board."""
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
            # The last one moves into the gap, so that removal takes constant time.
            group[place] = last
            self._place[last] = place
        if not group:
            del self._by_load[load]

    def bound(self) -> float:
        """Return the load up to which a replica is used for what it has cached."""
        return BOUND * (self._total + 1) / len(self._load)

    def fits(self, replica_id: str, bound: float) -> bool:
        """Return whether a replica that may have the prefix is idle enough to use it."""
        load, capacity = self._load[replica_id], self._capacity[replica_id]
        return load < capacity and (load < math.ceil(bound) or load < EASE * capacity)

    def home(self, block: int, bound: float) -> str | None:
        """Return the replica to which the ring assigns an unknown prompt; None if none near fits.

        All gateway replicas find the same one without talking to each other, and for most prompts
        it stays the same when replicas come and go (consistent hashing).
        """
        start = bisect.bisect(self._ring, (block & 0xFFFFFFFF, ""))
        for step in range(min(POINTS, len(self._ring))):
            _, replica_id = self._ring[(start + step) % len(self._ring)]
            if self._load[replica_id] < min(math.ceil(bound), self._capacity[replica_id]):
                return replica_id
        return None

    def least(self, room: float = 1.0) -> str | None:
        """Return any one of the least loaded replicas; None if even that one is full.

        A replica counts as full at `room` times its capacity.
        """
        if not self._load:
            return None
        # A load changes by one or a few, so this takes few steps.
        while self._lowest not in self._by_load:
            self._lowest += 1
        replica_id = self.draw(self._by_load[self._lowest])
        return replica_id if self._lowest < room * self._capacity[replica_id] else None

    def draw(self, replica_ids: Sequence[str]) -> str:
        """Return any one of them."""
        return replica_ids[int(self._draw() * len(replica_ids))]


def choose(board: LoadBoard, index: PrefixIndex, prints: Sequence[int]) -> str | None:
    """Return the replica that should get a prompt; None if all are full.

    That is the least loaded one among the replicas that have most of the prompt cached and are not
    too busy; failing that, among those with half of it, or its first block. If there is none, it is
    the replica to which the hash ring assigns the prompt, unless that is too busy; otherwise the
    least loaded of all, with ties broken at random. So a new replica gets what is too much for the
    others, and with it some of their prefixes.

    Args:
        board: how busy the replicas are.
        index: what they have cached.
        prints: the prompt's `fingerprints`; if empty, only the load counts.
    """
    if not prints or not len(board):
        return board.least()
    bound = board.bound()
    known = index.known(prints)
    # Holders of the whole known prefix first, then of half of it, then of its first block.
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

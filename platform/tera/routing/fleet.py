"""The replicas of one model as one gateway replica uses them: connected, chosen, counted."""

import asyncio
import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Protocol

from tera.errors import EngineError
from tera.generation import Generation, ReplicaLoad
from tera.routing.link import Listener, ReplicaLink, ReplicaLinks
from tera.routing.switchboard import MOVED_ROOM, Route, Switchboard

log = logging.getLogger(__name__)

CONTACT_INTERVAL_S, CONTACT_DEADLINE_S = 1.0, 1.0
"""How often a replica is asked to connect while it is not, and how long for an answer."""


Changed = Callable[[Mapping[str, int]], None]
"""Hears which replicas run, with how many generations each may run at a time."""


class Serve(Protocol):
    """What Ray Serve is asked and told of a model's replicas; see `ServedReplicas`."""

    async def connect(self, replica: str, host: str, port: int) -> None:
        """Have a replica connect to the token channel at an address.

        Raises:
            EngineError: it did not.
        """
        ...

    def queued(self) -> AbstractContextManager[None]:
        """Have one more generation counted as waiting while the block runs."""
        ...


class Seat:
    """Room for one generation at one replica; whoever has it leaves it, whatever happens."""

    def __init__(self, fleet: "Fleet", replica_id: str, link: ReplicaLink, room: int) -> None:
        self._fleet = fleet
        self._link = link
        self._room = room
        self._generation_id = 0
        self.replica_id = replica_id

    def begin(self, generation: Generation, listener: Listener) -> None:
        """Send the generation; `listener` hears what becomes of it until the seat is left."""
        self._generation_id = generation.generation_id
        self._link.begin(generation, self._room, listener)

    def leave(self, *, refused: bool = False) -> None:
        """Give the room back, stopping the generation if it still runs."""
        self._link.end(self._generation_id)
        self._fleet.left(self.replica_id, self._room if refused else None)


class Fleet:
    """The replicas of one model: Serve says which there are, and each is asked to connect.

    Only connected replicas are given work. One that is not, at first or after its connection broke,
    is asked through Serve until it connects or Serve takes it away.
    """

    def __init__(
        self,
        links: ReplicaLinks,
        switchboard: Switchboard,
        serve: Callable[[Changed], Serve],
    ) -> None:
        """`serve` makes the view of the model's deployment, which tells of its replicas."""
        self._links = links
        self._contacts: dict[str, asyncio.Task[None]] = {}
        self._replicas: set[str] = set()
        self.switchboard = switchboard
        self._serve = serve(self.changed)

    def changed(self, capacities: Mapping[str, int]) -> None:
        """Hear which replicas Serve runs, and how many generations each may run at a time."""
        gone = self._replicas - capacities.keys()
        new = capacities.keys() - self._replicas
        self._replicas = set(capacities)
        for replica_id in gone:
            # Its link stays open: Serve lets a draining replica finish what it runs.
            self._links.unwatch(replica_id)
        self.switchboard.set_replicas(capacities)
        for replica_id in new:
            self._links.watch(replica_id, self)
            if self._links.find(replica_id) is None:
                self._contact_soon(replica_id)
            else:
                self.switchboard.connected(replica_id)

    def seat_now(self, route: Route) -> Seat | None:
        """Return room for a generation at the best replica, if there is some for it now."""
        replica_id = self.switchboard.take_now(route)
        return None if replica_id is None else self._seat(replica_id, route)

    async def seat(self, route: Route, *, again: bool) -> Seat:
        """Return room for a generation at the best replica, waiting for some.

        Serve counts what waits here as queued, and replicas tell it what runs there: by these
        counts it scales, also from zero.

        Args:
            route: of the generation.
            again: it has waited its turn already.
        """
        with self._serve.queued():
            while True:
                replica_id = await self.switchboard.take(route, again=again)
                seat = self._seat(replica_id, route)
                if seat is not None:
                    return seat
                again = True

    def _seat(self, replica_id: str, route: Route) -> Seat | None:
        """Return a seat at a replica that was chosen; None if it was lost since."""
        link = self._links.find(replica_id)
        if link is None:
            # It was lost after the switchboard had chosen it.
            self.switchboard.release(replica_id)
            return None
        capacity = self.switchboard.capacity(replica_id)
        return Seat(self, replica_id, link, int(MOVED_ROOM * capacity) if route.moved else capacity)

    def left(self, replica_id: str, refused_at: int | None) -> None:
        """Take note that a seat was left; see `Seat.leave`.

        Args:
            replica_id: whose it was.
            refused_at: how many generations the replica runs, if it refused this one.
        """
        if refused_at is not None:
            self.switchboard.refused(replica_id, refused_at)
        self.switchboard.release(replica_id)

    def report(self, replica_id: str, load: ReplicaLoad) -> None:
        """Hear what a replica's engine has to do."""
        self.switchboard.report(replica_id, load)

    def connected(self, replica_id: str) -> None:
        """Hear that a replica can be given work."""
        self.switchboard.connected(replica_id)

    def lost(self, replica_id: str) -> None:
        """Hear that a replica's connection is gone: give it nothing, and ask it to connect anew."""
        self.switchboard.lost(replica_id)
        self._contact_soon(replica_id)

    def draining(self, replica_id: str) -> None:
        """Hear that a replica takes nothing new, which Serve will say too, a moment later."""
        self.switchboard.drop(replica_id)

    def _contact_soon(self, replica_id: str) -> None:
        if replica_id not in self._contacts:
            task = asyncio.get_running_loop().create_task(self._contact(replica_id))
            self._contacts[replica_id] = task

    async def _contact(self, replica_id: str) -> None:
        host, port = self._links.address
        try:
            while replica_id in self._replicas:
                try:
                    async with asyncio.timeout(CONTACT_DEADLINE_S):
                        await self._serve.connect(replica_id, host, port)
                except (TimeoutError, EngineError) as error:
                    log.debug("Engine replica %s did not connect: %r", replica_id, error)
                if self._links.find(replica_id) is not None:
                    return
                await asyncio.sleep(CONTACT_INTERVAL_S)
        finally:
            # In the same turn as the last look: a loss after that look has to ask anew.
            del self._contacts[replica_id]

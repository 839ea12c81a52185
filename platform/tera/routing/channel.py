"""The gateway's end of the token channel: frames become the deltas of waiting generations."""

import asyncio
import itertools
import logging
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Protocol, Self, cast

import msgspec

from tera import wire
from tera.errors import EngineError, ReplicaLostError, TeraError
from tera.generation import (
    ENGINE_STALL_S,
    Order,
    ReplicaLoad,
    StepFrame,
    TokenDelta,
    decode_frame,
    encode,
)
from tera.routing.pulse import Pulse

log = logging.getLogger(__name__)

HANDSHAKE_TIMEOUT_S = 5.0
CHECK_S = 0.25
"""Between two looks at whether the replicas live: what detection may take longer than its limit."""
REPLACEMENT_S = 30.0
"""Serve replaces a stalled replica within so long after `ENGINE_STALL_S`, if it can.

It has to come first: an engine whose generations were taken away looks idle to its health check,
so it would be kept, and would be the first to be given work.
"""


class Watcher(Protocol):
    """Who wants to know how a replica is doing."""

    def report(self, replica_id: str, load: ReplicaLoad) -> None:
        """Hear of a replica's load: when it has changed, and with each heartbeat."""
        ...

    def trust(self, replica_id: str) -> None:
        """Hear that a replica has connected."""
        ...

    def suspect(self, replica_id: str) -> None:
        """Hear that a replica's connection has broken, or was given up."""
        ...


class Inbox:
    """Where one attempt's deltas arrive, in order; read by one task.

    It ends with the delta that has a `finish_reason`, or with the error given to `fail`.
    """

    def __init__(self, generation_id: int, forget: Callable[[int], None]) -> None:
        self.generation_id = generation_id
        self.offered_to: str | None = None
        """The replica that the generation is sent to, as far as that is known."""
        self.replica_id: str | None = None
        """The replica that took the generation, once it has said so."""
        self.taken_at = 0.0
        """Loop time at which it did."""
        self.finished = False
        """The delta with the finish reason has arrived."""
        self.on_taken: Callable[[], None] | None = None
        """Called when a replica has taken the generation, before its first delta is read."""
        self._forget = forget
        self._loop = asyncio.get_running_loop()
        self._deltas: deque[TokenDelta] = deque()
        self._error: TeraError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._ended: asyncio.Future[None] | None = None

    async def get(self) -> TokenDelta:
        """Wait for the next delta.

        Raises:
            TeraError: the one given to `fail`, after the deltas that came before it.
        """
        while not self._deltas:
            if self._error is not None:
                raise self._error
            self._waiter = self._loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        return self._deltas.popleft()

    @property
    def next_is_here(self) -> bool:
        """Whether what follows is here already: a delta, an error, or nothing at all."""
        return bool(self._deltas) or self.finished or self._error is not None

    async def ended(self) -> None:
        """Wait until the last delta or an error has come, read or not, or nobody listens."""
        if not self.finished and self._error is None:
            self._ended = self._loop.create_future()
            await self._ended

    def put(self, delta: TokenDelta) -> None:
        """Deliver a delta."""
        self.finished = delta.finish_reason is not None
        self._deltas.append(delta)
        self._wake()
        if self.finished:
            self._end()

    def fail(self, error: TeraError) -> None:
        """End the inbox with an error; the first one given stays."""
        if self._error is None:
            self._error = error
            self._wake()
            self._end()

    def take(self, replica_id: str) -> None:
        """Take note of who has the generation, which each of its deltas says."""
        if self.replica_id is None:
            self.replica_id = replica_id
            self.taken_at = self._loop.time()
            if self.on_taken is not None:
                self.on_taken()

    def close(self) -> None:
        """Stop listening: later deltas of this attempt are dropped."""
        self._forget(self.generation_id)
        self._end()

    def _end(self) -> None:
        if self._ended is not None and not self._ended.done():
            self._ended.set_result(None)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class _ReplicaLink(asyncio.Protocol):
    """One connection from one engine replica."""

    def __init__(self, receiver: "TokenReceiver") -> None:
        self._receiver = receiver
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray()
        self._nonce_g = wire.new_nonce()
        self._loop = asyncio.get_running_loop()
        self._deadline: asyncio.TimerHandle | None = None
        self.replica_id: str | None = None
        self.pulse = Pulse(receiver.stall_s)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # A cast, since uvloop's transports are no subclass of asyncio's.
        self._transport = cast(asyncio.Transport, transport)
        self._receiver.links.add(self)
        self._transport.write(self._nonce_g)
        self._deadline = self._loop.call_later(HANDSHAKE_TIMEOUT_S, self._transport.abort)

    def data_received(self, data: bytes) -> None:
        assert self._transport is not None
        self._buffer += data
        now = self._loop.time()
        self.pulse.heard(now)
        try:
            if self.replica_id is None and not self._shake_hands():
                return
            for payload in wire.take_frames(self._buffer):
                frame = decode_frame(payload)
                self.pulse.read(frame, now)
                self._receiver.deliver(self.replica_id or "", frame)
        except (ValueError, msgspec.MsgspecError):
            # Not our protocol, or a peer that lost its place: nothing after it can be trusted.
            self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._receiver.links.discard(self)
        if self._deadline is not None:
            self._deadline.cancel()
        if self.replica_id is not None:
            self._receiver.lose(self.replica_id, self)

    def send(self, order: Order) -> None:
        assert self._transport is not None
        self._transport.write(wire.pack(encode(order)))

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def _shake_hands(self) -> bool:
        """Return whether the replica has proved itself, once enough bytes are there."""
        assert self._transport is not None
        opening = wire.NONCE_BYTES + wire.MAC_BYTES
        if len(self._buffer) < opening + wire.LENGTH_BYTES:
            return False
        nonce_r = bytes(self._buffer[: wire.NONCE_BYTES])
        proof = bytes(self._buffer[wire.NONCE_BYTES : opening])
        rest = self._buffer[opening:]
        names = list(wire.take_frames(rest))
        if not names:
            return False
        replica_id = names[0].decode(errors="replace")
        secret = self._receiver.secret
        expected = wire.replica_proof(secret, self._nonce_g, nonce_r, replica_id)
        if len(names) > 1 or not wire.proofs_match(proof, expected):
            raise ValueError("the peer does not hold the cluster secret")
        if self._deadline is not None:
            self._deadline.cancel()
        self._buffer = rest
        self.replica_id = replica_id
        self._transport.write(wire.gateway_proof(secret, nonce_r, self._nonce_g))
        self._receiver.trust(replica_id, self)
        return True


class TokenReceiver:
    """The server that engine replicas connect to; an async context manager.

    `loads` has the latest load figures of every connected replica, by replica id. A replica that
    falls silent, or whose engine stalls, is lost like one whose connection broke.
    """

    def __init__(
        self,
        host: str,
        secret: str,
        *,
        port: int = 0,
        stall_s: float = ENGINE_STALL_S + REPLACEMENT_S,
    ) -> None:
        if not secret:
            raise ValueError("a token channel needs a cluster secret")
        self._host = host
        self._port = port
        self._server: asyncio.Server | None = None
        self._inboxes: dict[int, Inbox] = {}
        self._generation_ids = itertools.count(1)
        self._watchers: dict[str, Watcher] = {}
        self._by_replica: dict[str, _ReplicaLink] = {}
        self._check: asyncio.TimerHandle | None = None
        self.secret = secret
        self.stall_s = stall_s
        self.links: set[_ReplicaLink] = set()
        self.loads: dict[str, ReplicaLoad] = {}
        self.on_lost: Callable[[], None] | None = None
        """Called after a replica's connection has broken."""

    async def __aenter__(self) -> Self:
        """Start listening."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _ReplicaLink(self), self._host, self._port)
        self._check_at(loop.time() + CHECK_S)
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop listening and close the connections."""
        assert self._server is not None
        assert self._check is not None
        self._check.cancel()
        self._server.close()
        for link in list(self.links):
            link.abort()
        await self._server.wait_closed()

    @property
    def address(self) -> tuple[str, int]:
        """Where replicas connect to."""
        assert self._server is not None
        host, port = self._server.sockets[0].getsockname()[:2]
        return host, port

    def open(self) -> Inbox:
        """Return the inbox of a new attempt; the caller closes it."""
        generation_id = next(self._generation_ids)
        inbox = self._inboxes[generation_id] = Inbox(generation_id, self._forget)
        return inbox

    def watch(self, replica_id: str, watcher: Watcher | None) -> None:
        """Tell a replica's watcher, its only one, what becomes of it; None is nobody."""
        if watcher is None:
            self._watchers.pop(replica_id, None)
        else:
            self._watchers[replica_id] = watcher

    def deliver(self, replica_id: str, frame: StepFrame) -> None:
        """Hand a frame's deltas to their inboxes; those of given-up attempts find none."""
        # A heartbeat repeats the load to who may have been told another one meanwhile: Serve tells
        # of a call that was taken once it has ended, as if it still ran.
        if self.loads.get(replica_id) != frame.load or not frame.deltas:
            self.loads[replica_id] = frame.load
            watcher = self._watchers.get(replica_id)
            if watcher is not None:
                watcher.report(replica_id, frame.load)
        for delta in frame.deltas:
            inbox = self._inboxes.get(delta.generation_id)
            if inbox is not None:
                inbox.take(replica_id)
                inbox.put(delta)
        for failure in frame.failures:
            inbox = self._inboxes.get(failure.generation_id)
            if inbox is not None:
                inbox.fail(EngineError(failure.message))

    def order(self, replica_id: str, order: Order) -> bool:
        """Send a replica an order; return whether it is connected."""
        link = self._by_replica.get(replica_id)
        if link is None:
            return False
        link.send(order)
        return True

    def lose(self, replica_id: str, link: _ReplicaLink) -> None:
        """Fail every generation of a replica whose connection broke."""
        if self._by_replica.get(replica_id) is link:
            del self._by_replica[replica_id]
        self.loads.pop(replica_id, None)
        self.doubt(replica_id)  # first, so that nothing that fails now is sent there again
        for inbox in list(self._inboxes.values()):
            if replica_id == (inbox.replica_id or inbox.offered_to):
                inbox.fail(ReplicaLostError("The engine replica was lost."))
        if self.on_lost is not None:
            self.on_lost()

    def trust(self, replica_id: str, link: _ReplicaLink) -> None:
        """Take note that a replica speaks, again perhaps."""
        self._by_replica[replica_id] = link
        watcher = self._watchers.get(replica_id)
        if watcher is not None:
            watcher.trust(replica_id)

    def doubt(self, replica_id: str) -> None:
        """Take note that a replica may be lost."""
        watcher = self._watchers.get(replica_id)
        if watcher is not None:
            watcher.suspect(replica_id)

    def _check_at(self, when: float) -> None:
        self._check = asyncio.get_running_loop().call_at(when, self._check_links, when)

    def _check_links(self, due: float) -> None:
        now = asyncio.get_running_loop().time()
        self._check_at(now + CHECK_S)
        late_s = now - due
        working = {inbox.replica_id for inbox in self._inboxes.values()}
        for link in list(self.links):
            if link.replica_id is None:
                continue
            if late_s > CHECK_S:
                # This loop was kept, so what the replicas said meanwhile was not read yet.
                link.pulse.excuse(late_s)
            if link.pulse.is_silent(now):
                log.warning("Engine replica %s fell silent; given up", link.replica_id)
                link.abort()
            elif link.replica_id in working and link.pulse.is_stalled(now):
                log.warning("Engine replica %s makes no step; given up", link.replica_id)
                link.abort()

    def _forget(self, generation_id: int) -> None:
        self._inboxes.pop(generation_id, None)

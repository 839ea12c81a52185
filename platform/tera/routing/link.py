"""The gateway's end of the token channel: passes what frames say on to running generations."""

import asyncio
import itertools
import logging
from collections.abc import Callable
from types import TracebackType
from typing import Protocol, Self, cast

import msgspec

from tera import wire
from tera.errors import (
    EngineError,
    InvalidRequestError,
    InvalidValueError,
    ReplicaLostError,
    TeraError,
)
from tera.generation import (
    ENGINE_STALL_S,
    Abort,
    Begin,
    Generation,
    GenerationFailure,
    ReplicaLoad,
    StepFrame,
    TokenDelta,
    decode_frame,
    encode,
)
from tera.routing.pulse import Pulse

log = logging.getLogger(__name__)

HANDSHAKE_TIMEOUT_S = 5.0
MOST_STRANGERS = 128
"""How many connections may be open before their handshake, which takes a replica milliseconds."""
CHECK_S = 0.25
"""How often replicas are checked: detecting a loss may take this much longer than its limit."""
REPLACEMENT_S = 30.0
"""Serve replaces a stalled replica within this time after `ENGINE_STALL_S`, if it can.

Serve must act first: an engine whose generations have been taken away looks idle to its health
check, so it would be kept and would be the first to get new work.
"""


class Watcher(Protocol):
    """Is told how a replica is doing."""

    def report(self, replica_id: str, load: ReplicaLoad) -> None:
        """Handle a replica's load, which is reported when it changes and with each heartbeat."""
        ...

    def connected(self, replica_id: str) -> None:
        """Handle that a replica has connected and can be given work."""
        ...

    def lost(self, replica_id: str) -> None:
        """Handle that a replica's connection has broken or was given up."""
        ...

    def draining(self, replica_id: str) -> None:
        """Handle that a replica accepts nothing new."""
        ...


class Listener(Protocol):
    """One attempt at a generation, told what happens to it; no method may block."""

    def receive(self, delta: TokenDelta) -> None:
        """Handle new tokens; an empty delta means that the replica has accepted the generation."""
        ...

    def fail(self, error: TeraError) -> None:
        """Handle that the replica was lost, has failed, or refuses the request itself."""
        ...

    def refuse(self) -> None:
        """Handle that the replica has no room, or is draining and out of time."""
        ...


class ReplicaLink(asyncio.Protocol):
    """One connection from one engine replica, with the generations that were sent over it.

    A generation belongs to its link, so no other replica can affect it, and a link that closes
    fails only its own generations.
    """

    def __init__(self, links: "ReplicaLinks") -> None:
        self._links = links
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray()
        self._nonce_g = wire.new_nonce()
        self._loop = asyncio.get_running_loop()
        self._deadline: asyncio.TimerHandle | None = None
        self._listeners: dict[int, Listener] = {}
        self._load: ReplicaLoad | None = None
        self._draining = False
        self.replica_id = ""
        """Empty until the replica has proved itself."""
        self.pulse = Pulse(links.stall_s)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin the handshake: the gateway speaks first."""
        # A cast, since uvloop's transports do not subclass asyncio's.
        self._transport = cast(asyncio.Transport, transport)
        self._links.meet(self)
        self._transport.write(self._nonce_g)
        self._deadline = self._loop.call_later(HANDSHAKE_TIMEOUT_S, self._transport.abort)

    def data_received(self, data: bytes) -> None:
        """Complete the handshake, then pass on what each frame says."""
        assert self._transport is not None
        self._buffer += data
        now = self._loop.time()
        self.pulse.heard(now)
        try:
            if not self.replica_id and not self._shake_hands():
                return
            for payload in wire.take_frames(self._buffer):
                frame = decode_frame(payload)
                self.pulse.read(frame, now)
                self._deliver(frame)
        except (ValueError, msgspec.MsgspecError):
            # Not our protocol, or a peer that is out of step: nothing after this can be trusted.
            self.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Fail every generation that was sent over this connection."""
        if self._deadline is not None:
            self._deadline.cancel()
        self._links.lose(self)  # first, so that what fails now is not sent here again
        listeners, self._listeners = self._listeners, {}
        for listener in listeners.values():
            listener.fail(ReplicaLostError("The engine replica was lost."))

    @property
    def working(self) -> bool:
        """Whether generations run over this link."""
        return bool(self._listeners)

    def begin(self, generation: Generation, most_ongoing: int, listener: Listener) -> None:
        """Send a generation to the replica; `listener` is told about it until `end`."""
        order = encode(Begin(generation, most_ongoing))
        if len(order) > wire.MAX_ORDER_BYTES:
            # The replica would close the connection, and other tenants' generations with it.
            listener.fail(InvalidValueError("The request is too large for the model's engines."))
            return
        self._listeners[generation.generation_id] = listener
        self._send(order)

    def end(self, generation_id: int) -> None:
        """Stop listening; if the generation still runs, the replica stops it."""
        if self._listeners.pop(generation_id, None) is not None:
            self._send(encode(Abort(generation_id)))

    def abort(self) -> None:
        """Close the connection now."""
        if self._transport is not None:
            self._transport.abort()

    def _send(self, order: bytes) -> None:
        assert self._transport is not None
        self._transport.write(wire.pack(order))

    def _deliver(self, frame: StepFrame) -> None:
        # A heartbeat repeats the load, since the counts here may have drifted from it.
        if frame.load != self._load or not frame.deltas:
            self._load = frame.load
            self._links.report(self.replica_id, frame.load)
        if frame.draining and not self._draining:
            self._draining = True
            self._links.drain(self.replica_id)
        listeners = self._listeners
        for delta in frame.deltas:
            listener = listeners.get(delta.generation_id)
            if listener is not None:
                if delta.finish_reason is not None:
                    del listeners[delta.generation_id]
                listener.receive(delta)
        for failure in frame.failures:
            listener = listeners.pop(failure.generation_id, None)
            if listener is not None:
                listener.fail(_error(failure))
        for generation_id in frame.refused:
            listener = listeners.pop(generation_id, None)
            if listener is not None:
                listener.refuse()

    def _shake_hands(self) -> bool:
        """Return whether the replica has proved itself, once enough bytes are there."""
        assert self._transport is not None
        opening = wire.NONCE_BYTES + wire.MAC_BYTES
        if len(self._buffer) < opening + wire.LENGTH_BYTES:
            return False
        # Until a peer has proved itself, this process buffers no more than a name from it.
        if wire.frame_bytes(self._buffer, opening) > wire.MAX_NAME_BYTES:
            raise ValueError("a name that no replica has")
        nonce_r = bytes(self._buffer[: wire.NONCE_BYTES])
        proof = bytes(self._buffer[wire.NONCE_BYTES : opening])
        rest = self._buffer[opening:]
        name = next(wire.take_frames(rest), None)
        if name is None:
            return False
        replica_id = name.decode(errors="replace")
        secret = self._links.secret
        expected = wire.replica_proof(secret, self._nonce_g, nonce_r, replica_id)
        if rest or not replica_id or not wire.proofs_match(proof, expected):
            raise ValueError("the peer does not hold the cluster secret")
        if self._deadline is not None:
            self._deadline.cancel()
        self._buffer = rest
        self.replica_id = replica_id
        self._transport.write(wire.gateway_proof(secret, nonce_r, self._nonce_g))
        self._links.connect(self)
        return True


class ReplicaLinks:
    """The server that engine replicas connect to; an async context manager.

    A replica that falls silent, or whose engine stalls, is treated like one whose connection broke,
    even if it has no work, since idle replicas send heartbeats too.
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
        self._generation_ids = itertools.count(1)
        self._watchers: dict[str, Watcher] = {}
        self._by_replica: dict[str, ReplicaLink] = {}
        self._check: asyncio.TimerHandle | None = None
        self.secret = secret
        self.stall_s = stall_s
        self._strangers: dict[ReplicaLink, None] = {}
        """Connections of peers that have not proved themselves yet, oldest first."""
        self.all: set[ReplicaLink] = set()
        """Every open connection, including those of strangers."""
        self.on_lost: Callable[[], None] | None = None
        """Called after a replica's connection has broken."""

    async def __aenter__(self) -> Self:
        """Start listening."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: ReplicaLink(self), self._host, self._port)
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
        # A watcher told of a loss now would ask the replica to connect to a server that is gone.
        self._watchers.clear()
        self._server.close()
        for link in list(self.all):
            link.abort()
        await self._server.wait_closed()

    @property
    def address(self) -> tuple[str, int]:
        """The address that replicas connect to."""
        assert self._server is not None
        host, port = self._server.sockets[0].getsockname()[:2]
        return host, port

    def new_generation_id(self) -> int:
        """Return an id for one attempt at a generation, unique in this process."""
        return next(self._generation_ids)

    def find(self, replica_id: str) -> ReplicaLink | None:
        """Return a replica's link, if it is connected."""
        return self._by_replica.get(replica_id)

    def watch(self, replica_id: str, watcher: Watcher) -> None:
        """Set the only watcher of a replica, which is told how it is doing."""
        self._watchers[replica_id] = watcher

    def unwatch(self, replica_id: str) -> None:
        """Remove a replica's watcher; generations on its link continue."""
        self._watchers.pop(replica_id, None)

    def meet(self, link: ReplicaLink) -> None:
        """Record a new connection; if there are too many strangers, the oldest is closed."""
        self.all.add(link)
        self._strangers[link] = None
        if len(self._strangers) > MOST_STRANGERS:
            oldest = next(iter(self._strangers))
            del self._strangers[oldest]  # now: `connection_lost` is called later
            oldest.abort()

    def connect(self, link: ReplicaLink) -> None:
        """Record that a replica has connected or reconnected."""
        self._strangers.pop(link, None)
        self._by_replica[link.replica_id] = link
        watcher = self._watchers.get(link.replica_id)
        if watcher is not None:
            watcher.connected(link.replica_id)

    def lose(self, link: ReplicaLink) -> None:
        """Record that a connection is gone; its replica is lost unless it has a newer one."""
        self.all.discard(link)
        self._strangers.pop(link, None)
        if self._by_replica.get(link.replica_id) is not link:
            return
        del self._by_replica[link.replica_id]
        watcher = self._watchers.get(link.replica_id)
        if watcher is not None:
            watcher.lost(link.replica_id)
        if self.on_lost is not None:
            self.on_lost()

    def report(self, replica_id: str, load: ReplicaLoad) -> None:
        """Pass a replica's load on to its watcher."""
        watcher = self._watchers.get(replica_id)
        if watcher is not None:
            watcher.report(replica_id, load)

    def drain(self, replica_id: str) -> None:
        """Tell the watcher that a replica accepts nothing new."""
        watcher = self._watchers.get(replica_id)
        if watcher is not None:
            watcher.draining(replica_id)

    def _check_at(self, when: float) -> None:
        self._check = asyncio.get_running_loop().call_at(when, self._check_links, when)

    def _check_links(self, due: float) -> None:
        now = asyncio.get_running_loop().time()
        self._check_at(now + CHECK_S)
        late_s = now - due
        for link in list(self.all):
            if not link.replica_id:
                continue
            if late_s > CHECK_S:
                # This event loop was blocked, so what replicas sent meanwhile has not been read
                # yet.
                link.pulse.excuse(late_s)
            if link.pulse.is_silent(now):
                log.warning("Engine replica %s fell silent; given up", link.replica_id)
                link.abort()
            elif link.working and link.pulse.is_stalled(now):
                log.warning("Engine replica %s makes no step; given up", link.replica_id)
                link.abort()


_REQUEST_FAULTS = {kind.code: kind for kind in InvalidRequestError.__subclasses__()}


def _error(failure: GenerationFailure) -> TeraError:
    if failure.request_fault is None:
        return EngineError(failure.message)
    kind = _REQUEST_FAULTS.get(failure.request_fault, InvalidRequestError)
    return kind(failure.message, param=failure.param)

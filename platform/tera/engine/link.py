"""The replica's end of the token channel: sends each gateway replica one frame per engine step."""

import asyncio
from functools import partial
from typing import Protocol, cast

import msgspec

from tera import wire
from tera.engine.pending import Pending
from tera.errors import ReplicaLostError
from tera.generation import (
    Abort,
    GenerationFailure,
    Order,
    ReplicaLoad,
    StepFrame,
    TokenDelta,
    decode_order,
    encode,
)

HANDSHAKE_TIMEOUT_S = 5.0

Address = tuple[str, int]


class Worker(Protocol):
    """Carries out the orders of gateway replicas."""

    def load(self) -> ReplicaLoad:
        """Return the figures of the engine's latest step."""
        ...

    def obey(self, link: "GatewayLink", order: Order) -> None:
        """Begin or stop a generation for the gateway replica at the other end of a link."""
        ...

    def lost(self, link: "GatewayLink") -> None:
        """Handle the loss of a link: nobody waits any more for the generations ordered over it."""
        ...


class GatewayLink(asyncio.Protocol):
    """One connection to one gateway replica.

    All deltas sent within one turn of the event loop, which is one engine step, go into one
    frame; what would make it long goes into further ones, one a turn. While the gateway does not
    read, deltas of a generation are merged instead of queued, so what is held is bounded by the
    tokens of the running generations.

    While there is nothing to send, heartbeats show that this event loop still runs.
    """

    def __init__(self, replica_id: str, secret: str, worker: Worker) -> None:
        self._replica_id = replica_id
        self._secret = secret
        self._worker = worker
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray()
        self._nonce_g = b""
        self._nonce_r = wire.new_nonce()
        self._pending = Pending(self._stop)
        self._draining = False
        self._flush_scheduled = False
        self._paused = False
        self._sent_at = float("-inf")
        self._heartbeat: asyncio.TimerHandle | None = None
        self.ready: asyncio.Future[None] = self._loop.create_future()
        self.closed = False

    def send(self, delta: TokenDelta) -> None:
        """Queue a delta for the frame of this step; do nothing if the gateway is gone."""
        if self.closed:
            return
        self._pending.add(delta)
        if not self._flush_scheduled:
            self._flush_soon()

    def fail(self, failure: GenerationFailure) -> None:
        """Report why a generation has ended, after its deltas."""
        self._pending.fail(failure)
        self._flush_soon()

    def refuse(self, *generation_ids: int) -> None:
        """Report that generations must go elsewhere, after their deltas."""
        self._pending.refuse(generation_ids)
        self._flush_soon()

    def drain(self) -> None:
        """Report that this replica accepts nothing new."""
        self._draining = True
        self._flush_soon()

    def _flush_soon(self) -> None:
        if not self._flush_scheduled and not self._paused and not self.closed:
            self._flush_scheduled = True
            self._loop.call_soon(self._flush)

    def close(self) -> None:
        """Send what is pending and close the connection."""
        if self._can_write:
            self._write()
            while self._pending:
                self._write()
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport; the gateway speaks first."""
        # A cast, since uvloop's transports do not subclass asyncio's.
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        """Complete the handshake, then pass on the gateway's orders."""
        assert self._transport is not None
        self._buffer += data
        if self.ready.done():
            self._read_orders()
            return
        if not self._nonce_g and len(self._buffer) >= wire.NONCE_BYTES:
            self._nonce_g = bytes(self._buffer[: wire.NONCE_BYTES])
            del self._buffer[: wire.NONCE_BYTES]
            proof = wire.replica_proof(self._secret, self._nonce_g, self._nonce_r, self._replica_id)
            self._transport.write(self._nonce_r + proof + wire.pack(self._replica_id.encode()))
        if self._nonce_g and len(self._buffer) >= wire.MAC_BYTES:
            expected = wire.gateway_proof(self._secret, self._nonce_r, self._nonce_g)
            if wire.proofs_match(bytes(self._buffer[: wire.MAC_BYTES]), expected):
                del self._buffer[: wire.MAC_BYTES]
                self.ready.set_result(None)
                self._beat()
                self._read_orders()
            else:
                self._transport.abort()

    def _read_orders(self) -> None:
        assert self._transport is not None
        try:
            for payload in wire.take_frames(self._buffer, wire.MAX_ORDER_BYTES):
                self._worker.obey(self, decode_order(payload))
        except (ValueError, msgspec.MsgspecError):
            # Not our protocol, or a peer that is out of step: nothing after this can be trusted.
            self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Let the worker stop generations that nobody reads any more."""
        self.closed = True
        self._pending.clear()
        if self._heartbeat is not None:
            self._heartbeat.cancel()
        self._worker.lost(self)
        if not self.ready.done():
            self.ready.set_exception(ReplicaLostError("The gateway refused the token channel."))
            # A waiter gets the error; if there is none, asyncio must not log it as never retrieved.
            self.ready.exception()

    def pause_writing(self) -> None:
        """Hold deltas back: the gateway reads more slowly than the engine generates."""
        self._paused = True

    def resume_writing(self) -> None:
        """Send what has been merged meanwhile."""
        self._paused = False
        self._flush()

    def _flush(self) -> None:
        self._flush_scheduled = False
        if not self._paused and self._can_write:
            self._write()

    @property
    def _can_write(self) -> bool:
        return (
            self._transport is not None
            and self.ready.done()
            and not self.closed
            and not self._transport.is_closing()
        )

    def _write(self) -> None:
        """Send one frame; what does not fit is sent in later turns of the event loop."""
        assert self._transport is not None
        deltas, failures, refused = self._pending.take()
        frame = StepFrame(self._worker.load(), deltas, failures, refused, self._draining)
        self._transport.write(wire.pack(encode(frame)))
        self._sent_at = self._loop.time()
        if self._pending:
            self._flush_soon()

    def _stop(self, generation_id: int) -> None:
        """Stop a generation whose deltas fit into no frame."""
        self._worker.obey(self, Abort(generation_id))

    def _beat(self) -> None:
        """Send a heartbeat if nothing else was sent lately, and schedule the next check."""
        if self.closed or self._transport is None or self._transport.is_closing():
            return
        # While paused, the bytes already written serve as a heartbeat once the gateway reads them.
        if not self._paused and self._loop.time() - self._sent_at >= wire.HEARTBEAT_S:
            self._write()
        # If nothing was sent, the gateway is not reading: count from now.
        since = self._loop.time() if self._paused else self._sent_at
        self._heartbeat = self._loop.call_at(since + wire.HEARTBEAT_S, self._beat)


class GatewayLinks:
    """The replica's links, one per gateway replica that has asked it to connect."""

    def __init__(self, replica_id: str, secret: str, worker: Worker) -> None:
        self._new_link = partial(GatewayLink, replica_id, secret, worker)
        self._links: dict[Address, asyncio.Task[GatewayLink]] = {}
        self._draining = False

    async def connect(self, address: Address) -> None:
        """Return once there is a connection to the gateway replica at `address`.

        Raises:
            ReplicaLostError: the gateway cannot be reached or does not hold the secret.
        """
        task = self._links.get(address)
        if task is None or (task.done() and not _is_open(task)):
            # Shared by all who ask while it is being opened, and not cancelled with any one of
            # them.
            task = self._links[address] = asyncio.create_task(self._connect(address))
        await asyncio.shield(task)

    def drain(self) -> None:
        """Tell all gateway replicas, even ones yet to connect, that this one is draining."""
        self._draining = True
        for task in self._links.values():
            if _is_open(task):
                task.result().drain()

    async def close(self) -> None:
        """Send what is pending and close all links."""
        for task in self._links.values():
            if _is_open(task):
                task.result().close()
            else:
                task.cancel()
        self._links.clear()

    async def _connect(self, address: Address) -> GatewayLink:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(HANDSHAKE_TIMEOUT_S):
                transport, link = await loop.create_connection(self._new_link, *address)
                try:
                    await link.ready
                except BaseException:
                    # Otherwise a gateway that has not proved itself yet could still give orders.
                    transport.abort()
                    raise
        except OSError as error:  # includes TimeoutError
            raise ReplicaLostError("The gateway's token channel cannot be reached.") from error
        if self._draining:
            link.drain()
        return link


def _is_open(task: asyncio.Task[GatewayLink]) -> bool:
    if not task.done() or task.cancelled() or task.exception() is not None:
        return False
    return not task.result().closed

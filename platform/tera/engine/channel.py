"""The replica's end of the token channel: one frame per engine step to each gateway replica."""

import asyncio
from collections.abc import Callable
from functools import partial
from typing import cast

import msgspec

from tera import wire
from tera.errors import ReplicaLostError
from tera.generation import (
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
Obey = Callable[["GatewayLink", Order], None]
"""What is called with each order that comes over a link."""


def _ignore(link: "GatewayLink", order: Order) -> None:
    del link, order


class GatewayLink(asyncio.Protocol):
    """One connection to one gateway replica.

    All deltas sent within one turn of the event loop, which is one engine step, leave in one
    frame. While the gateway does not read, deltas of a generation are merged instead of queued,
    so what is held is bounded by the tokens of the running generations.

    While there is nothing to send, a heartbeat says that this event loop still runs.
    """

    def __init__(
        self,
        replica_id: str,
        secret: str,
        load: Callable[[], ReplicaLoad],
        obey: Obey = _ignore,
    ) -> None:
        self._replica_id = replica_id
        self._secret = secret
        self._load = load
        self._obey = obey
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray()
        self._nonce_g = b""
        self._nonce_r = wire.new_nonce()
        self._pending: dict[int, TokenDelta] = {}
        self._failures: list[GenerationFailure] = []
        self._flush_scheduled = False
        self._paused = False
        self._sent_at = float("-inf")
        self._heartbeat: asyncio.TimerHandle | None = None
        self.ready: asyncio.Future[None] = self._loop.create_future()
        self.closed = False

    def send(self, delta: TokenDelta) -> None:
        """Queue a delta for the frame of this step.

        Raises:
            ReplicaLostError: the gateway is gone, so nobody waits for the generation.
        """
        if self.closed:
            raise ReplicaLostError("The connection to the gateway was lost.")
        held = self._pending.get(delta.generation_id)
        self._pending[delta.generation_id] = delta if held is None else _merge(held, delta)
        self._flush_soon()

    def fail(self, generation_id: int, message: str) -> None:
        """Say that a resumed generation has failed, after the deltas that it was sent."""
        if not self.closed:
            self._failures.append(GenerationFailure(generation_id, message))
            self._flush_soon()

    def _flush_soon(self) -> None:
        if not self._flush_scheduled and not self._paused:
            self._flush_scheduled = True
            self._loop.call_soon(self._flush)

    def close(self) -> None:
        """Send what is pending and close the connection."""
        self._flush()
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport; the gateway speaks first."""
        # A cast, since uvloop's transports are no subclass of asyncio's.
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        """Make the handshake; after it the gateway sends orders."""
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
            for payload in wire.take_frames(self._buffer):
                self._obey(self, decode_order(payload))
        except (ValueError, msgspec.MsgspecError):
            # Not our protocol, or a peer that lost its place: nothing after it can be trusted.
            self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Fail every later `send`: nobody reads any more."""
        self.closed = True
        self._pending.clear()
        if self._heartbeat is not None:
            self._heartbeat.cancel()
        if not self.ready.done():
            self.ready.set_exception(ReplicaLostError("The gateway refused the token channel."))
            # Whoever waits has it; if nobody does, asyncio must not log it as forgotten.
            self.ready.exception()

    def pause_writing(self) -> None:
        """Hold deltas back: the gateway reads slower than the engine makes tokens."""
        self._paused = True

    def resume_writing(self) -> None:
        """Send what was merged meanwhile."""
        self._paused = False
        self._flush()

    def _flush(self) -> None:
        self._flush_scheduled = False
        nothing = not self._pending and not self._failures
        if nothing or self._paused or self.closed or self._transport is None:
            return
        self._write(list(self._pending.values()), self._failures)
        self._pending.clear()
        self._failures = []

    def _write(self, deltas: list[TokenDelta], failures: list[GenerationFailure]) -> None:
        assert self._transport is not None
        self._transport.write(wire.pack(encode(StepFrame(self._load(), deltas, failures))))
        self._sent_at = self._loop.time()

    def _beat(self) -> None:
        """Send a heartbeat if nothing else was sent lately, and come back when the next is due."""
        if self.closed or self._transport is None or self._transport.is_closing():
            return
        # While paused, what is already written tells as much, once the gateway reads it.
        if not self._paused and self._loop.time() - self._sent_at >= wire.HEARTBEAT_S:
            self._write([], [])
        # From now where nothing was sent, since then the gateway does not read.
        since = self._loop.time() if self._paused else self._sent_at
        self._heartbeat = self._loop.call_at(since + wire.HEARTBEAT_S, self._beat)


def _merge(held: TokenDelta, delta: TokenDelta) -> TokenDelta:
    """Return both deltas as one; extends the lists of `held`, which nobody else has."""
    held.token_ids.extend(delta.token_ids)
    logprobs = held.logprobs
    if delta.logprobs is not None:
        logprobs = [*(logprobs or []), *delta.logprobs]
    return msgspec.structs.replace(
        held,
        finish_reason=delta.finish_reason,
        cached_tokens=max(held.cached_tokens, delta.cached_tokens),
        logprobs=logprobs,
        prompt_logprobs=held.prompt_logprobs or delta.prompt_logprobs,
    )


class TokenSender:
    """The replica's links, one per gateway replica that has sent it work."""

    def __init__(
        self,
        replica_id: str,
        secret: str,
        load: Callable[[], ReplicaLoad],
        obey: Obey = _ignore,
    ) -> None:
        self._new_link = partial(GatewayLink, replica_id, secret, load, obey)
        self._links: dict[Address, asyncio.Task[GatewayLink]] = {}

    async def link(self, address: Address) -> GatewayLink:
        """Return the connection to the gateway at `address`, made if there is none.

        Raises:
            ReplicaLostError: the gateway cannot be reached or does not hold the secret.
        """
        task = self._links.get(address)
        if task is not None and task.done() and (task.exception() or task.result().closed):
            task = None
        if task is None:
            # Shared by all who ask while it is being made, and not cancelled with one of them.
            task = self._links[address] = asyncio.create_task(self._connect(address))
        return await asyncio.shield(task)

    async def _connect(self, address: Address) -> GatewayLink:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(HANDSHAKE_TIMEOUT_S):
                _, link = await loop.create_connection(self._new_link, *address)
                await link.ready
        except OSError as error:  # includes TimeoutError
            raise ReplicaLostError("The gateway's token channel cannot be reached.") from error
        return link

    async def close(self) -> None:
        """Close all links."""
        for task in self._links.values():
            if task.done() and not task.cancelled() and task.exception() is None:
                task.result().close()
            else:
                task.cancel()
        self._links.clear()

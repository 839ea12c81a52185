"""The token channel on the wire: frames, and the handshake before them.

A replica connects to the address of each gateway replica that asks it to. Each side then proves
that it knows the cluster secret, bound to both nonces, so that being able to connect to the port
is not enough to send a tenant tokens or to collect them:

    gateway → replica   nonce_g (32 bytes)
    replica → gateway   nonce_r (32 bytes) + HMAC(secret, "replica" nonce_g nonce_r id) + frame(id)
    gateway → replica   HMAC(secret, "gateway" nonce_r nonce_g)

Then each side sends frames: a 4-byte little-endian length and a payload. The replica's are
`StepFrame`s, cut so that none is long; the first is a heartbeat, without deltas, and another
follows whenever nothing else was sent for `HEARTBEAT_S`, since a frozen process or a vanished node
closes no connection. The gateway's are `Order`s: to begin a generation, or to stop one.
"""

import hashlib
import hmac
import secrets
import struct
from collections.abc import Iterator

NONCE_BYTES = 32
MAC_BYTES = 32
FRAME_BYTES = 256 * 1024
"""About how much a replica puts into one frame; the rest goes into the next ones.

Both ends do other work between two frames, and a full one takes each of them some milliseconds.
"""
MAX_FRAME_BYTES = 4 * 1024 * 1024
MAX_ORDER_BYTES = 32 * 1024 * 1024
"""A longer frame or order means that the peer is broken: the connection is closed.

An order holds a prompt's ids, a schema and biases, all of which come from one request's body.
"""

MAX_NAME_BYTES = 256
"""Longest replica id; it is read before the peer has proved anything."""

HEARTBEAT_S = 0.5
SILENCE_S = 2.0
"""The gateway counts a replica that it has not heard for this long as lost.

That is four heartbeats, since the engine's front end shares the replica's event loop: converting
the log-probabilities of a long prompt, or a machine with no free core, can delay it by tenths of a
second. A wrong verdict costs one prefill on another replica, never an answer.
"""

_LENGTH = struct.Struct("<I")
LENGTH_BYTES = _LENGTH.size


def new_nonce() -> bytes:
    """Return fresh randomness for one handshake."""
    return secrets.token_bytes(NONCE_BYTES)


def replica_proof(secret: str, nonce_g: bytes, nonce_r: bytes, replica_id: str) -> bytes:
    """Return what the replica sends to prove itself."""
    return _mac(secret, b"replica" + nonce_g + nonce_r + replica_id.encode())


def gateway_proof(secret: str, nonce_r: bytes, nonce_g: bytes) -> bytes:
    """Return what the gateway sends to prove itself."""
    return _mac(secret, b"gateway" + nonce_r + nonce_g)


def _mac(secret: str, message: bytes) -> bytes:
    return hmac.digest(secret.encode(), message, hashlib.sha256)


def proofs_match(received: bytes, expected: bytes) -> bool:
    """Compare two proofs in constant time."""
    return hmac.compare_digest(received, expected)


def pack(payload: bytes) -> bytes:
    """Return the payload as a frame."""
    return _LENGTH.pack(len(payload)) + payload


def frame_bytes(buffer: bytearray, start: int) -> int:
    """Return the payload's length that the frame at `start` declares."""
    length: int = _LENGTH.unpack_from(buffer, start)[0]
    return length


def take_frames(buffer: bytearray, most_bytes: int = MAX_FRAME_BYTES) -> Iterator[bytes]:
    """Remove the whole frames at the start of `buffer`, yielding the payload of each.

    Raises:
        ValueError: a length is over `most_bytes`; the frames before it were yielded.
    """
    start, end = 0, len(buffer)
    try:
        while end - start >= LENGTH_BYTES:
            (length,) = _LENGTH.unpack_from(buffer, start)
            if length > most_bytes:
                raise ValueError(f"a frame of {length} bytes")
            if end - start - LENGTH_BYTES < length:
                break
            start += LENGTH_BYTES + length
            yield bytes(memoryview(buffer)[start - length : start])
    finally:
        del buffer[:start]

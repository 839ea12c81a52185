import pytest
from hypothesis import given
from hypothesis import strategies as st

from tera import wire

PAYLOADS = st.lists(st.binary(max_size=300), max_size=6)


@given(PAYLOADS, st.data())
def test_frames_are_whole_however_the_bytes_are_cut(
    payloads: list[bytes], data: st.DataObject
) -> None:
    stream = b"".join(map(wire.pack, payloads))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    buffer, taken = bytearray(), []
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        buffer += stream[start:end]
        taken += list(wire.take_frames(buffer))
    assert taken == payloads
    assert not buffer


def test_frames_are_whole_at_every_single_byte_boundary() -> None:
    payloads = [b"", b"a", b"token" * 60, b"\x00\x00\x00\x00"]
    stream = b"".join(map(wire.pack, payloads))
    for cut in range(len(stream) + 1):
        buffer = bytearray(stream[:cut])
        taken = list(wire.take_frames(buffer))
        buffer += stream[cut:]
        assert taken + list(wire.take_frames(buffer)) == payloads


def test_incomplete_frame_stays_in_the_buffer() -> None:
    buffer = bytearray(wire.pack(b"whole") + wire.pack(b"incomplete")[:-1])
    assert list(wire.take_frames(buffer)) == [b"whole"]
    assert bytes(buffer) == wire.pack(b"incomplete")[:-1]


def test_length_over_the_limit_is_refused_before_its_payload_comes() -> None:
    with pytest.raises(ValueError, match=str(wire.MAX_FRAME_BYTES + 1)):
        list(wire.take_frames(bytearray((wire.MAX_FRAME_BYTES + 1).to_bytes(4, "little"))))


def test_longest_frame_is_waited_for() -> None:
    buffer = bytearray(wire.MAX_FRAME_BYTES.to_bytes(4, "little") + b"begin")
    assert list(wire.take_frames(buffer)) == []


def test_proof_holds_for_one_secret_one_replica_and_both_nonces() -> None:
    nonce_g, nonce_r = wire.new_nonce(), wire.new_nonce()
    proof = wire.replica_proof("secret", nonce_g, nonce_r, "replica")
    assert wire.proofs_match(proof, wire.replica_proof("secret", nonce_g, nonce_r, "replica"))
    others = [
        wire.replica_proof("other", nonce_g, nonce_r, "replica"),
        wire.replica_proof("secret", wire.new_nonce(), nonce_r, "replica"),
        wire.replica_proof("secret", nonce_g, wire.new_nonce(), "replica"),
        wire.replica_proof("secret", nonce_g, nonce_r, "other"),
        wire.gateway_proof("secret", nonce_g, nonce_r),
        wire.gateway_proof("secret", nonce_r, nonce_g),
    ]
    assert not any(wire.proofs_match(proof, other) for other in others)
    assert all(len(each) == wire.MAC_BYTES for each in others)


def test_each_handshake_has_its_own_nonce() -> None:
    nonces = {wire.new_nonce() for _ in range(100)}
    assert len(nonces) == 100
    assert {len(nonce) for nonce in nonces} == {wire.NONCE_BYTES}

import contextlib
import math

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tera.generation import (
    Abort,
    Begin,
    FinishReason,
    Generation,
    GenerationFailure,
    Order,
    ReplicaLoad,
    Sampling,
    StepFrame,
    TokenDelta,
    TokenLogprobs,
    decode_frame,
    decode_order,
    encode,
    merge,
)

SMALL = st.integers(0, 2**32)
REAL = st.floats(allow_nan=False)
SAMPLINGS = st.builds(
    Sampling,
    max_tokens=SMALL,
    temperature=REAL,
    top_p=REAL,
    top_k=SMALL,
    seed=st.none() | st.integers(-(2**63), 2**63 - 1),
    logit_bias=st.none() | st.dictionaries(SMALL, REAL, max_size=3),
    logprobs=st.none() | st.integers(0, 20),
    structured=st.none() | st.just({"json": {"type": "object"}}),
)
GENERATIONS = st.builds(
    Generation,
    generation_id=SMALL,
    request_id=st.text(max_size=8),
    token_ids=st.lists(SMALL, max_size=8),
    sampling=SAMPLINGS,
    resumed_tokens=SMALL,
    cache_salt=st.text(max_size=8),
)
ORDERS = st.builds(Begin, GENERATIONS, SMALL) | st.builds(Abort, SMALL)
LOGPROBS = st.builds(
    TokenLogprobs,
    token_id=SMALL,
    logprob=REAL,
    top=st.lists(st.tuples(SMALL, REAL), max_size=3),
)
DELTAS = st.builds(
    TokenDelta,
    generation_id=SMALL,
    token_ids=st.lists(SMALL, max_size=4),
    finish_reason=st.none() | st.sampled_from(FinishReason),
    cached_tokens=SMALL,
    logprobs=st.none() | st.lists(LOGPROBS, max_size=2),
    prompt_logprobs=st.none() | st.lists(st.none() | LOGPROBS, max_size=2),
)
FRAMES = st.builds(
    StepFrame,
    load=st.builds(
        ReplicaLoad, running=SMALL, waiting=SMALL, kv_usage_ratio=REAL, asleep=st.booleans()
    ),
    deltas=st.lists(DELTAS, max_size=3),
    failures=st.lists(
        st.builds(
            GenerationFailure,
            generation_id=SMALL,
            message=st.text(max_size=8),
            request_fault=st.none() | st.text(max_size=8),
            param=st.none() | st.text(max_size=8),
        ),
        max_size=2,
    ),
    refused=st.lists(SMALL, max_size=2),
    draining=st.booleans(),
)


@given(ORDERS)
def test_order_arrives_as_it_was_sent(order: Order) -> None:
    assert decode_order(encode(order)) == order


@given(FRAMES)
def test_frame_arrives_as_it_was_sent(frame: StepFrame) -> None:
    assert decode_frame(encode(frame)) == frame


def test_infinite_logprob_crosses() -> None:
    delta = TokenDelta(1, [7], logprobs=[TokenLogprobs(7, -math.inf, [])])
    assert decode_frame(encode(StepFrame(ReplicaLoad(), [delta]))).deltas == [delta]


def test_order_of_an_older_version_is_read_with_defaults() -> None:
    older = msgspec.msgpack.encode(["begin", [7, "req_1", [1, 2], [16]], 8])
    assert decode_order(older) == Begin(Generation(7, "req_1", [1, 2], Sampling(16)), 8)


def test_frame_of_an_older_version_is_read_with_defaults() -> None:
    older = msgspec.msgpack.encode([[1], [[7, [3]]]])
    assert decode_frame(older) == StepFrame(ReplicaLoad(running=1), [TokenDelta(7, [3])])


def test_record_of_a_newer_version_is_read_without_what_it_appends() -> None:
    newer = msgspec.msgpack.encode(["abort", 3, "appended later"])
    assert decode_order(newer) == Abort(3)
    newer = msgspec.msgpack.encode([[1, 0, 0.5, True, "new"], [], [], [7], True, "appended later"])
    load = ReplicaLoad(running=1, kv_usage_ratio=0.5, asleep=True)
    assert decode_frame(newer) == StepFrame(load, refused=[7], draining=True)


@given(st.binary(max_size=64))
@example(b"\x92\xa1\x80\x01")  # a tag that is no UTF-8
@example(b"\x92\x90\x91\x93\x01\x90\xa1\x80")  # a finish reason that is no UTF-8
def test_garbage_is_a_decode_error_and_nothing_else(data: bytes) -> None:
    for decode in (decode_frame, decode_order):
        with contextlib.suppress(msgspec.MsgspecError):
            decode(data)


@given(ORDERS, FRAMES)
def test_no_order_is_taken_for_a_frame(order: Order, frame: StepFrame) -> None:
    with pytest.raises(msgspec.MsgspecError):
        decode_frame(encode(order))
    with pytest.raises(msgspec.MsgspecError):
        decode_order(encode(frame))


def logprobs_of(token_ids: list[int]) -> list[TokenLogprobs]:
    return [TokenLogprobs(token_id, -1.0, []) for token_id in token_ids]


@given(st.lists(DELTAS, min_size=1, max_size=4))
def test_merged_deltas_lose_nothing(parts: list[TokenDelta]) -> None:
    # As an engine sends them: a delta has logprobs for each token if any has.
    deltas = [
        msgspec.structs.replace(part, generation_id=1, logprobs=logprobs_of(part.token_ids))
        for part in parts
    ]
    token_ids = [token_id for delta in deltas for token_id in delta.token_ids]
    merged = deltas[0]
    for delta in deltas[1:]:
        merged = merge(merged, delta)
    assert merged.token_ids == token_ids
    assert merged.logprobs == logprobs_of(token_ids)
    assert merged.finish_reason == deltas[-1].finish_reason
    assert merged.cached_tokens == max(delta.cached_tokens for delta in parts)
    told = [delta.prompt_logprobs for delta in parts if delta.prompt_logprobs]
    assert (merged.prompt_logprobs or None) == (told[0] if told else None)


def test_record_is_immutable() -> None:
    with pytest.raises(AttributeError):
        Sampling(max_tokens=1).max_tokens = 2  # type: ignore[misc]


def test_merging_copies_nothing_of_what_is_held() -> None:
    logprobs = [TokenLogprobs(1, -0.5, [])]
    prompt: list[TokenLogprobs | None] = [None]
    held = TokenDelta(1, [1], logprobs=list(logprobs), prompt_logprobs=list(prompt))
    merged = merge(held, TokenDelta(1, [1], logprobs=logprobs, prompt_logprobs=prompt))
    # Else the cost of a gateway that does not read would grow with the square of what is held.
    assert merged.logprobs is held.logprobs
    assert merged.prompt_logprobs is held.prompt_logprobs
    assert (merged.logprobs, merged.prompt_logprobs) == (logprobs * 2, prompt * 2)

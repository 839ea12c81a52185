import contextlib
import math

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tera.generation import (
    FinishReason,
    Generation,
    GenerationEnd,
    ReplicaLoad,
    Sampling,
    StepFrame,
    TokenDelta,
    TokenLogprobs,
    decode_end,
    decode_frame,
    decode_generation,
    decode_order,
    encode,
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
    reply_to=st.tuples(st.text(max_size=8), st.integers(0, 65535)),
    resumed_tokens=SMALL,
)
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
    load=st.builds(ReplicaLoad, running=SMALL, waiting=SMALL, kv_usage_ratio=REAL),
    deltas=st.lists(DELTAS, max_size=3),
)


@given(GENERATIONS)
def test_generation_arrives_as_it_was_sent(generation: Generation) -> None:
    assert decode_generation(encode(generation)) == generation


@given(FRAMES)
def test_frame_arrives_as_it_was_sent(frame: StepFrame) -> None:
    assert decode_frame(encode(frame)) == frame


@given(st.sampled_from(FinishReason), SMALL)
def test_end_arrives_as_it_was_sent(reason: FinishReason, completion_tokens: int) -> None:
    end = GenerationEnd(reason, completion_tokens)
    assert decode_end(encode(end)) == end


def test_infinite_logprob_crosses() -> None:
    delta = TokenDelta(1, [7], logprobs=[TokenLogprobs(7, -math.inf, [])])
    assert decode_frame(encode(StepFrame(ReplicaLoad(), [delta]))).deltas == [delta]


def test_record_of_an_older_version_is_read_with_defaults() -> None:
    older = msgspec.msgpack.encode([7, "req_1", [1, 2], [16], ["127.0.0.1", 9]])
    assert decode_generation(older) == Generation(
        7, "req_1", [1, 2], Sampling(16), ("127.0.0.1", 9)
    )


def test_record_of_a_newer_version_is_read_without_what_it_appends() -> None:
    newer = msgspec.msgpack.encode(["stop", 3, "appended later"])
    assert decode_end(newer) == GenerationEnd(FinishReason.STOP, 3)


@given(st.binary(max_size=64))
@example(b"\x92\xa1\x80\x01")  # a finish reason that is no UTF-8
def test_garbage_is_a_decode_error_and_nothing_else(data: bytes) -> None:
    for decode in (decode_generation, decode_frame, decode_order, decode_end):
        with contextlib.suppress(msgspec.MsgspecError):
            decode(data)


def test_record_is_immutable() -> None:
    with pytest.raises(AttributeError):
        Sampling(max_tokens=1).max_tokens = 2  # type: ignore[misc]

"""What leaves over a link, frame by frame."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tera import wire
from tera.engine.pending import MAX_MESSAGE_CHARACTERS, MOST_FAILURES, Pending
from tera.generation import (
    FinishReason,
    GenerationFailure,
    ReplicaLoad,
    StepFrame,
    TokenDelta,
    TokenLogprobs,
    encode,
)

ROOM = 1000
"""Of a frame in these tests."""


@pytest.fixture(autouse=True)
def _short_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "FRAME_BYTES", ROOM)


def nobody(generation_id: int) -> None:
    raise AssertionError(generation_id)


def entry(token_id: int, top: int = 2) -> TokenLogprobs:
    return TokenLogprobs(token_id, -1.5, [(2**32 - 1, -0.5)] * top)


def frames(pending: Pending) -> list[StepFrame]:
    """Take everything; no frame may be longer than the bound."""
    found: list[StepFrame] = []
    while pending:
        deltas, failures, refused = pending.take()
        found.append(StepFrame(ReplicaLoad(), deltas, failures, refused))
        assert len(encode(StepFrame(ReplicaLoad(), deltas))) <= ROOM + 100
    return found


def of(generation_id: int, found: list[StepFrame]) -> list[TokenDelta]:
    return [it for frame in found for it in frame.deltas if it.generation_id == generation_id]


ENTRIES = st.builds(entry, st.integers(0, 9), st.integers(0, 20))


@st.composite
def deltas(draw: st.DrawFn) -> TokenDelta:
    """Draw what one of two generations gains, of which the second has log-probabilities."""
    generation_id = draw(st.integers(1, 2))
    token_ids = draw(st.lists(st.integers(0, 2**32 - 1), max_size=300))
    if generation_id == 1:
        return TokenDelta(1, token_ids)
    top = draw(st.integers(0, 20))
    logprobs = [entry(it, top) for it in token_ids]
    prompt = draw(st.none() | st.lists(st.none() | ENTRIES, max_size=60))
    return TokenDelta(2, token_ids, logprobs=logprobs, prompt_logprobs=prompt)


@settings(deadline=None)
@given(st.lists(deltas(), max_size=6))
def test_all_that_was_added_leaves_in_order_and_in_short_frames(added: list[TokenDelta]) -> None:
    pending = Pending(nobody)
    expected: dict[int, tuple[list[int], list[TokenLogprobs], list[TokenLogprobs | None]]] = {}
    for delta in added:
        ids, logprobs, prompt = expected.setdefault(delta.generation_id, ([], [], []))
        ids += delta.token_ids
        logprobs += delta.logprobs or []
        prompt += delta.prompt_logprobs or []
        pending.add(delta)
    found = frames(pending)
    for generation_id, (ids, logprobs, prompt) in expected.items():
        parts = of(generation_id, found)
        assert [it for part in parts for it in part.token_ids] == ids
        assert [it for part in parts for it in part.logprobs or ()] == logprobs
        assert [it for part in parts for it in part.prompt_logprobs or ()] == prompt


def test_a_prompt_goes_before_the_first_token_and_the_finish_reason_with_the_last() -> None:
    pending = Pending(nobody)
    prompt = [None, *(entry(it) for it in range(99))]
    tokens = list(range(100))
    logprobs = [entry(it) for it in tokens]
    pending.add(TokenDelta(1, tokens, FinishReason.STOP, 7, logprobs, prompt))
    parts = of(1, frames(pending))
    first = next(number for number, part in enumerate(parts) if part.token_ids)
    assert sum(len(part.prompt_logprobs or ()) for part in parts[: first + 1]) == 100
    assert first > 1
    assert [part.finish_reason for part in parts[:-1]] == [None] * (len(parts) - 1)
    assert parts[-1].finish_reason is FinishReason.STOP
    assert {part.cached_tokens for part in parts} == {7}


def test_who_has_had_a_part_waits_for_the_others() -> None:
    pending = Pending(nobody)
    pending.add(TokenDelta(1, list(range(10_000))))
    pending.add(TokenDelta(2, [5]))
    for step in range(10):
        pending.add(TokenDelta(3, [step]))
        seen = [pending.take()[0] for _ in range(2)]
        assert [step] in [it.token_ids for part in seen for it in part if it.generation_id == 3]
    assert pending


def test_what_fits_no_frame_ends_its_own_generation_alone() -> None:
    ended: list[int] = []
    pending = Pending(ended.append)
    pending.add(TokenDelta(1, [1]))
    pending.add(TokenDelta(2, [1, 2], logprobs=[entry(1), entry(2, top=ROOM)]))
    pending.add(TokenDelta(3, [1]))
    found = frames(pending)
    assert [len(of(generation_id, found)) for generation_id in (1, 2, 3)] == [1, 1, 1]
    (failure,) = [it for frame in found for it in frame.failures]
    assert (failure.generation_id, failure.request_fault, failure.param) == (
        2,
        "invalid_value",
        "logprobs",
    )
    assert ended == [2]


def test_a_failure_or_refusal_waits_for_its_own_generations_deltas_alone() -> None:
    pending = Pending(nobody)
    for generation_id in (1, 2):
        pending.add(TokenDelta(generation_id, list(range(500))))
    pending.fail(GenerationFailure(1, "The engine failed."))
    pending.refuse([2, 3])
    pending.fail(GenerationFailure(4, "The engine failed."))
    found = frames(pending)
    assert [it.generation_id for it in found[0].failures] == [4]
    assert found[0].refused == [3]
    for generation_id, ends in ((1, "failures"), (2, "refused")):
        ended = next(
            number
            for number, frame in enumerate(found)
            if generation_id in [getattr(it, "generation_id", it) for it in getattr(frame, ends)]
        )
        assert not of(generation_id, found[ended + 1 :])


def test_failures_fit_a_frame_however_many_they_are_and_whatever_they_say() -> None:
    pending = Pending(nobody)
    for generation_id in range(3 * MOST_FAILURES):
        pending.fail(GenerationFailure(generation_id, "\N{SNOWMAN}" * 1_000_000))
    found = frames(pending)
    assert [it.generation_id for frame in found for it in frame.failures] == list(
        range(3 * MOST_FAILURES)
    )
    longest = max(len(encode(frame)) for frame in found)
    assert longest + ROOM < wire.MAX_FRAME_BYTES - 256 * 1024
    assert len(found[0].failures[0].message) == MAX_MESSAGE_CHARACTERS + 1

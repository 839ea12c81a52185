"""Slices of a clock that the test moves, on a machine whose load it sets."""

from __future__ import annotations

from typing import Any

import pytest

from tera.tenancy.silence import Patience, Silence

PATIENCE = Patience(slice_s=1.0, slices=3)


class Slices:
    """A silence that has begun, and what happens in each of its slices."""

    def __init__(self) -> None:
        self._now_s = self._starved_s = 0.0
        self._answered = 7
        self._silence = Silence(PATIENCE, lambda: self._now_s, lambda: self._starved_s)
        self._silence.begin(self._answered)

    def end(self, *, late_s: float = 0.0, starved_s: float = 0.0, answered: int = 0) -> bool:
        self._now_s += PATIENCE.slice_s + late_s
        self._starved_s += starved_s
        self._answered += answered
        return self._silence.lasts(self._answered)


def test_redis_is_silent_for_too_long_after_three_slices_without_an_answer() -> None:
    slices = Slices()
    assert [slices.end() for _ in range(3)] == [False, False, True]


@pytest.mark.parametrize(
    "excuse",
    [
        pytest.param({"late_s": 1.1 * PATIENCE.late_s}, id="this-process-was-busy"),
        pytest.param({"starved_s": 1.1 * PATIENCE.starved_s}, id="this-thread-waited-for-a-cpu"),
    ],
)
def test_a_slice_in_which_this_process_could_not_hear_does_not_count(
    excuse: dict[str, Any],
) -> None:
    slices = Slices()
    assert not slices.end()
    assert not any(slices.end(**excuse) for _ in range(100))
    assert [slices.end() for _ in range(2)] == [False, True]


def test_an_answer_begins_the_count_anew_in_a_late_slice_too() -> None:
    slices = Slices()
    for late_s in (0.0, 10.0):
        assert not slices.end()
        assert not slices.end()
        assert not slices.end(answered=1, late_s=late_s)
    assert [slices.end() for _ in range(3)] == [False, False, True]


def test_a_little_delay_is_no_excuse() -> None:
    slices = Slices()
    late_s, starved_s = 0.9 * PATIENCE.late_s, 0.9 * PATIENCE.starved_s
    assert [slices.end(late_s=late_s, starved_s=starved_s) for _ in range(3)][-1]


def test_silence_that_begins_again_is_counted_from_there() -> None:
    slices = Slices()
    slices.end()
    slices.end()
    slices._silence.begin(slices._answered)
    assert [slices.end() for _ in range(3)] == [False, False, True]

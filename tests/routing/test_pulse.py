import pytest

from tera import wire
from tera.generation import FinishReason, ReplicaLoad, StepFrame, TokenDelta
from tera.routing.pulse import Pulse

STALL_S = 30.0
BUSY = ReplicaLoad(running=2, waiting=0, kv_usage_ratio=0.5)
HEARTBEAT = StepFrame(BUSY, [])


def beating(now: float = 0.0, frame: StepFrame = HEARTBEAT) -> Pulse:
    pulse = Pulse(STALL_S)
    pulse.heard(now)
    pulse.read(frame, now)
    return pulse


def test_silence_counts_from_what_was_heard_last() -> None:
    pulse = beating(10.0)
    pulse.heard(11.0)
    assert not pulse.is_silent(11.0 + wire.SILENCE_S)
    assert pulse.is_silent(11.1 + wire.SILENCE_S)


def test_who_sends_no_heartbeats_is_not_judged_by_them() -> None:
    pulse = beating(0.0, StepFrame(BUSY, [TokenDelta(1, [7])]))
    assert not pulse.is_silent(1000.0)
    assert not pulse.is_stalled(1000.0)


def test_an_engine_has_the_whole_limit_from_when_the_connection_is_made() -> None:
    pulse = beating(100.0, StepFrame(ReplicaLoad(running=1), []))
    assert not pulse.is_stalled(100.0 + STALL_S)


def test_an_engine_that_waits_for_its_turn_is_not_stalled() -> None:
    pulse = beating(0.0)
    for second in range(1, 100):
        pulse.heard(second)
        pulse.read(StepFrame(ReplicaLoad(2, 0, 0.5, asleep=True), []), second)
        assert not pulse.is_stalled(second)
    assert pulse.is_stalled(99.1 + STALL_S)


def test_time_in_which_the_gateway_could_not_listen_is_excused() -> None:
    pulse = beating(0.0)
    pulse.excuse(100.0)
    assert not pulse.is_silent(100.0 + wire.SILENCE_S)
    assert not pulse.is_stalled(100.0 + STALL_S)
    assert pulse.is_silent(100.1 + wire.SILENCE_S)
    assert pulse.is_stalled(100.1 + STALL_S)


@pytest.mark.parametrize(
    "frame",
    [
        pytest.param(HEARTBEAT, id="heartbeat"),
        pytest.param(StepFrame(BUSY, [TokenDelta(1, [])]), id="a generation was taken"),
        pytest.param(StepFrame(ReplicaLoad(2, 5, 0.5), []), id="more wait"),
        pytest.param(StepFrame(ReplicaLoad(0, 1, 0.5), []), id="what waits does not begin"),
    ],
)
def test_an_engine_that_has_work_and_shows_no_step_is_stalled(frame: StepFrame) -> None:
    pulse = beating(0.0)
    for second in range(1, 40):
        pulse.heard(second)
        pulse.read(frame, second)
        assert pulse.is_stalled(second) == (second > STALL_S)
        assert not pulse.is_silent(second)


@pytest.mark.parametrize(
    "frame",
    [
        pytest.param(StepFrame(BUSY, [TokenDelta(1, [7])]), id="token"),
        pytest.param(StepFrame(BUSY, [TokenDelta(1, [], FinishReason.STOP)]), id="end"),
        pytest.param(StepFrame(ReplicaLoad(), []), id="idle"),
        pytest.param(StepFrame(ReplicaLoad(2, 0, 0.6), []), id="tokens of other gateways"),
    ],
)
def test_a_step_or_idleness_starts_the_limit_anew(frame: StepFrame) -> None:
    pulse = beating(0.0)
    pulse.read(frame, 20.0)
    assert not pulse.is_stalled(20.0 + STALL_S)
    assert pulse.is_stalled(20.1 + STALL_S)

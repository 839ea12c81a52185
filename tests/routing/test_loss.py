"""What becomes of a generation whose replica was lost or failed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tera.errors import EngineError, EngineStalledError, ReplicaLostError
from tera.routing.loss import (
    POISON_LOSSES,
    POISON_WINDOW_S,
    GiveUp,
    Losses,
    Resume,
    Retry,
    after_loss,
)

LOST = ReplicaLostError("The engine replica was lost.")
FAILED = EngineError("The engine failed.")
SOON, LATE = POISON_WINDOW_S, POISON_WINDOW_S + 0.001

UNHURT = Losses()
REPEATEDLY = GiveUp("The model's engines failed repeatedly on this request.")
POISON = GiveUp(
    "This request itself seems to make the model's engines fail.",
    poisonous=True,
)
TOO_OFTEN = GiveUp("The model's engines fail too often to try this request again.")


@pytest.mark.parametrize(
    ("error", "taken_for_s", "before", "expected"),
    [
        pytest.param(LOST, None, UNHURT, Retry(), id="lost before it had it"),
        pytest.param(FAILED, None, UNHURT, Retry(), id="failed before it had it"),
        pytest.param(LOST, None, Losses(2, 2, 1), Retry(), id="before it had it, after others"),
        pytest.param(
            LOST, SOON, UNHURT, Resume(Losses(1, 1, 1), paid=False), id="first loss, soon"
        ),
        pytest.param(
            LOST, LATE, UNHURT, Resume(Losses(1, 1, 0), paid=False), id="first loss, late"
        ),
        pytest.param(FAILED, SOON, UNHURT, Resume(Losses(1, 0, 0), paid=True), id="first failure"),
        pytest.param(
            EngineStalledError("The engine makes no progress."),
            SOON,
            UNHURT,
            Resume(Losses(1, 0, 0), paid=True),
            id="a stall is a failure, not a loss",
        ),
        pytest.param(
            LOST, LATE, Losses(1, 1, 1), Resume(Losses(2, 2, 1), paid=True), id="second loss, late"
        ),
        pytest.param(
            LOST, SOON, Losses(1, 1, 0), Resume(Losses(2, 2, 1), paid=True), id="one of two soon"
        ),
        pytest.param(
            LOST, SOON, Losses(1, 0, 0), Resume(Losses(2, 1, 1), paid=False), id="loss after fault"
        ),
        pytest.param(
            FAILED, SOON, Losses(1, 1, 1), Resume(Losses(2, 1, 1), paid=True), id="fault after loss"
        ),
        pytest.param(LOST, SOON, Losses(1, 1, 1), POISON, id="second loss, both soon"),
        pytest.param(LOST, 0.0, Losses(2, 1, 1), POISON, id="a fault between changes nothing"),
        pytest.param(LOST, LATE, Losses(2, 2, 1), REPEATEDLY, id="third loss"),
        pytest.param(FAILED, SOON, Losses(2, 0, 0), REPEATEDLY, id="third failure"),
    ],
)
def test_b1_after_a_loss_with_two_retries(
    error: EngineError,
    taken_for_s: float | None,
    before: Losses,
    expected: Retry | Resume | GiveUp,
) -> None:
    assert after_loss(error, taken_for_s, before, retries=2, affordable=True) == expected


@pytest.mark.parametrize(
    ("error", "taken_for_s", "before", "expected"),
    [
        pytest.param(LOST, None, UNHURT, Retry(), id="what nobody had costs nothing"),
        pytest.param(
            LOST, SOON, UNHURT, Resume(Losses(1, 1, 1), paid=False), id="first loss is free"
        ),
        pytest.param(
            LOST, SOON, Losses(1), Resume(Losses(2, 1, 1), paid=False), id="free after a fault"
        ),
        pytest.param(LOST, LATE, Losses(1, 1, 1), TOO_OFTEN, id="second loss"),
        pytest.param(FAILED, SOON, UNHURT, TOO_OFTEN, id="failure"),
    ],
)
def test_b1_after_a_loss_with_an_empty_budget(
    error: EngineError,
    taken_for_s: float | None,
    before: Losses,
    expected: Retry | Resume | GiveUp,
) -> None:
    assert after_loss(error, taken_for_s, before, retries=9, affordable=False) == expected


@given(
    course=st.lists(st.tuples(st.booleans(), st.none() | st.floats(0, 60)), max_size=40),
    retries=st.integers(0, 5),
)
def test_b1_no_course_of_losses_is_resumed_more_often_than_allowed(
    course: list[tuple[bool, float | None]], retries: int
) -> None:
    losses, resumed, soon = UNHURT, 0, 0
    for lost, taken_for_s in course:
        decision = after_loss(
            LOST if lost else FAILED, taken_for_s, losses, retries=retries, affordable=True
        )
        soon += lost and taken_for_s is not None and taken_for_s <= POISON_WINDOW_S
        match decision:
            case Retry():
                assert taken_for_s is None
            case Resume(losses):
                resumed += 1
                assert resumed <= retries
                assert soon < POISON_LOSSES
            case GiveUp(poisonous=poisonous):
                assert poisonous == (soon >= POISON_LOSSES)
                assert poisonous or resumed == retries
                return

from __future__ import annotations

import pytest

from tera.tenancy.keys import ApiKey
from tera.tenancy.limits import Admission, Allowance, Kind, Refusal, Scope
from tera.tenancy.refusals import BLOCKED_S, Refusals

KEY = ApiKey("key_1", "acme", "", "", None, 0.0)
SCOPES: list[Scope] = []


def refused(kind: Kind, limit: int, wait_us: int | None) -> Admission:
    return Admission(
        Allowance(limit, 0, 9_000_000),
        Allowance(100, 50, 1_000_000),
        Refusal(kind, "tenant", limit, wait_us, 10),
    )


def test_a_refusal_by_requests_a_minute_is_repeated_with_what_is_left_of_its_waits() -> None:
    refusals = Refusals()
    refusals.remember(KEY, "m", SCOPES, refused("requests", 5, 3_000_000), 100.0)
    again = refusals.again(KEY, "m", SCOPES, 102.0)
    assert again == Admission(
        Allowance(5, 0, 7_000_000),
        Allowance(100, 50, 0),
        Refusal("requests", "tenant", 5, 1_000_000, 10),
    )
    assert refusals.again(KEY, "m", SCOPES, 103.0) is None


def test_a_wait_that_is_nearly_over_is_never_told_as_none() -> None:
    refusals = Refusals()
    refusals.remember(KEY, "m", SCOPES, refused("requests", 5, 3), 0.0)
    again = refusals.again(KEY, "m", SCOPES, 0.000_002_9)
    assert again is not None
    assert again.refusal is not None
    assert again.refusal.wait_us == 1


@pytest.mark.parametrize("kind", ["requests", "tokens", "concurrency", "budget"])
def test_a_refusal_by_a_limit_of_0_is_repeated_for_a_second(kind: Kind) -> None:
    refusals = Refusals()
    admission = refused(kind, 0, None)
    refusals.remember(KEY, "m", SCOPES, admission, 0.0)
    again = refusals.again(KEY, "m", SCOPES, BLOCKED_S / 2)
    assert again is not None
    assert again.refusal == admission.refusal
    assert refusals.again(KEY, "m", SCOPES, BLOCKED_S) is None


@pytest.mark.parametrize("kind", ["tokens", "concurrency", "budget"])
def test_what_comes_back_when_a_request_ends_is_asked_each_time(kind: Kind) -> None:
    refusals = Refusals()
    refusals.remember(KEY, "m", SCOPES, refused(kind, 5, 3_000_000), 0.0)
    assert refusals.again(KEY, "m", SCOPES, 0.0) is None


def test_a_refusal_is_of_one_key_one_model_and_one_set_of_limits() -> None:
    refusals = Refusals()
    refusals.remember(KEY, "m", SCOPES, refused("requests", 5, 3_000_000), 0.0)
    assert refusals.again(KEY, "other", SCOPES, 1.0) is None
    assert refusals.again(KEY, "m", [], 1.0) is None  # its limits were edited


def test_no_more_are_kept_than_told() -> None:
    refusals = Refusals(most_known=2)
    for model in "abc":
        refusals.remember(KEY, model, SCOPES, refused("requests", 5, 3_000_000), 0.0)
    known = [refusals.again(KEY, model, SCOPES, 1.0) is not None for model in "abc"]
    assert known == [False, False, True]

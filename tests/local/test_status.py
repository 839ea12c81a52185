"""What `tera status` says of a model that has failed."""

from typing import Any

import pytest

from tera.local.status import with_failure

MODEL = {"name": "m", "id": "org/m", "status": "ready"}


@pytest.mark.parametrize(
    ("told", "status", "failure"),
    [
        pytest.param({}, "ready", "", id="the gateway is silent"),
        pytest.param({"models": {"org/m": "ready"}}, "ready", "", id="all is well"),
        pytest.param(
            {"models": {"org/m": "failed"}, "failures": {"m": "It is gated."}},
            "failed",
            "It is gated.",
            id="not loaded, whatever its replicas do",
        ),
        pytest.param(
            {"models": {"org/m": "ready"}, "failures": {"m": "No such template."}},
            "ready",
            "No such template.",
            id="a wrong edit of one that is served",
        ),
        pytest.param(
            {"models": {}, "failures": {"m": "source must begin with hf://"}},
            "failed",
            "source must begin with hf://",
            id="refused settings",
        ),
    ],
)
def test_a_failure_is_told_with_its_reason(told: dict[str, Any], status: str, failure: str) -> None:
    assert with_failure(MODEL, told) == {**MODEL, "status": status, "failure": failure}

from collections.abc import Mapping

import pytest

from tera.contract.common import ModelStatus
from tera.gateway.model_status import model_status


@pytest.mark.parametrize(
    ("application", "states", "least_replicas", "status"),
    [
        pytest.param("RUNNING", {"RUNNING": 1}, 1, "ready", id="one runs"),
        pytest.param("DEPLOYING", {"RUNNING": 1, "STARTING": 2}, 1, "ready", id="others start"),
        pytest.param("DEPLOY_FAILED", {"RUNNING": 1}, 1, "ready", id="a failed edit"),
        pytest.param("DEPLOY_FAILED", {}, 0, "failed", id="no replica came up"),
        pytest.param("DEPLOY_FAILED", None, 1, "failed", id="the application could not be built"),
        pytest.param("RUNNING", {}, 0, "scaled_to_zero", id="idle"),
        pytest.param("RUNNING", {"RUNNING": 0}, 0, "scaled_to_zero", id="counted as none"),
        pytest.param("RUNNING", {"STARTING": 1}, 0, "starting", id="woken"),
        pytest.param("RUNNING", {"STOPPING": 1}, 0, "starting", id="the last one drains"),
        pytest.param("DEPLOYING", {}, 1, "starting", id="none yet"),
        pytest.param("DEPLOYING", None, 0, "starting", id="no deployment yet"),
        pytest.param(None, None, 0, "starting", id="no application yet"),
    ],
)
def test_status(
    application: str | None,
    states: Mapping[str, int] | None,
    least_replicas: int,
    status: ModelStatus,
) -> None:
    assert model_status(application, states, least_replicas=least_replicas) == status

"""What Tera uses of Ray Serve's controller that is private there, in the installed Ray.

Red after an upgrade of Ray: see docs/upgrading-ray-and-vllm.md. What is made of it is tested in
`tests/autoscaling`.
"""

import inspect

import pytest
from ray.serve._private import autoscaling_state
from ray.serve._private.autoscaling_state import DeploymentAutoscalingState
from ray.serve._private.common import (
    RUNNING_REQUESTS_KEY,
    DeploymentID,
    HandleMetricReport,
    ReplicaID,
)
from ray.serve._private.constants import SERVE_LOGGER_NAME
from ray.serve._private.deployment_scheduler import DeploymentScheduler
from ray.serve.config import AutoscalingContext

ENGINES = DeploymentID("Engine", "model-demo")


def test_the_scheduler_chooses_who_goes_by_deployment_and_number() -> None:
    names = list(inspect.signature(DeploymentScheduler._get_replicas_to_stop).parameters)
    assert names[:3] == ["self", "deployment_id", "max_num_to_stop"]


def test_the_context_of_a_policy_leads_to_the_state_that_has_the_reports() -> None:
    names = set(inspect.signature(AutoscalingContext).parameters)
    assert {"deployment_id", "total_num_requests"} <= names
    source = inspect.getsource(DeploymentAutoscalingState)
    assert "total_num_requests=self." in source  # a method of it, which the context keeps
    assert "_total_num_requests_value" in inspect.getsource(AutoscalingContext)


@pytest.mark.parametrize("store", ["columnar", "objects"])
def test_the_state_keeps_what_handles_report(store: str) -> None:
    state = DeploymentAutoscalingState(ENGINES)
    assert len(getattr(state._handle_store, store)) == 0


@pytest.mark.parametrize(
    "method", ["record_columnar_metrics_for_handle", "record_request_metrics_for_handle"]
)
def test_handles_report_in_two_ways(method: str) -> None:
    assert inspect.isfunction(getattr(DeploymentAutoscalingState, method))


def test_a_report_counts_what_runs_by_replica() -> None:
    assert "metrics" in HandleMetricReport.__dataclass_fields__
    assert vars(autoscaling_state)["RUNNING_REQUESTS_KEY"] == RUNNING_REQUESTS_KEY


def test_a_replica_goes_by_one_text_in_reports() -> None:
    replica = ReplicaID("a", ENGINES)
    assert ReplicaID.from_full_id_str(replica.to_full_id_str()) == replica


def test_serve_logs_by_a_name() -> None:
    assert SERVE_LOGGER_NAME == "ray.serve"

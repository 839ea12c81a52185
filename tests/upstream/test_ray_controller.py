"""What Tera uses of Ray Serve's controller that is private there, in the installed Ray.

Red after an upgrade of Ray: see docs/upgrading-ray-and-vllm.md. What is made of it is tested in
`tests/autoscaling`.
"""

import inspect

from ray.serve._private import autoscaling_state
from ray.serve._private.common import RUNNING_REQUESTS_KEY
from ray.serve._private.constants import SERVE_LOGGER_NAME
from ray.serve._private.deployment_scheduler import DeploymentScheduler
from ray.serve.config import AutoscalingContext


def test_the_scheduler_chooses_who_goes_by_deployment_and_number() -> None:
    names = list(inspect.signature(DeploymentScheduler._get_replicas_to_stop).parameters)
    assert names[:3] == ["self", "deployment_id", "max_num_to_stop"]


def test_the_context_of_a_policy_has_the_deployment_and_what_replicas_reported() -> None:
    names = set(inspect.signature(AutoscalingContext).parameters)
    assert {"deployment_id", "raw_metrics"} <= names


def test_a_replicas_count_of_what_runs_goes_by_one_name() -> None:
    assert vars(autoscaling_state)["RUNNING_REQUESTS_KEY"] == RUNNING_REQUESTS_KEY


def test_serve_logs_by_a_name() -> None:
    assert SERVE_LOGGER_NAME == "ray.serve"

"""Which group's workers Ray's own autoscaler asks for, by what the chart says of the groups."""

from typing import Any

import pytest
from ray.autoscaler._private.kuberay.autoscaling_config import (
    _derive_autoscaling_config_from_ray_cr,
)
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil
from tests.chart.charts import platform_of, ray_cluster
from tests.chart.refusals import cluster

from tera.manifest import applications

Object = dict[str, Any]


def pools(**spot: Any) -> Object:
    """Return values where three spot workers hold what the four of `l4` hold."""
    return cluster(
        gpuPools={
            "l4": {"order": 1, "maxWorkers": 4},
            "spot": {"order": 2, "maxWorkers": 3, "joins": "l4", "priority": 10, **spot},
        }
    )


def replica(values: Object) -> Object:
    """Return what a replica of the model asks of Ray."""
    (deployment,) = applications(platform_of(values), on_cluster=True)["model-one"]["deployments"]
    options = deployment["ray_actor_options"]
    return {"CPU": options["num_cpus"], "GPU": options["num_gpus"], **options["resources"]}


def asked(values: Object, replicas: int, **availability: Any) -> Object:
    """Return how many workers of each group are asked for."""
    resource = {"metadata": {"name": "prod", "namespace": "llm"}, "spec": ray_cluster(values)}
    config = AutoscalingConfig(
        _derive_autoscaling_config_from_ray_cr(resource), skip_content_hash=True
    )
    wanted = [ResourceRequestUtil.make(replica(values))] * replicas
    reply = ResourceDemandScheduler().schedule(
        SchedulingRequest(
            disable_launch_config_check=True,
            node_type_configs=config.get_node_type_configs(),
            max_num_nodes=config.get_max_num_nodes(),
            resource_requests=ResourceRequestUtil.group_by_count(wanted),
            **availability,
        )
    )
    assert not reply.infeasible_resource_requests
    return {each.instance_type: each.count for each in reply.to_launch}


@pytest.mark.parametrize(
    ("replicas", "workers"),
    [
        pytest.param(2, {"spot": 2}, id="the higher priority first"),
        pytest.param(5, {"spot": 3, "l4": 2}, id="and the other when there are no more"),
    ],
)
def test_workers_are_asked_for_by_priority(replicas: int, workers: Object) -> None:
    assert asked(pools(), replicas) == workers


def test_workers_that_did_not_come_lately_are_asked_for_last() -> None:
    lately = {"recoverable_resource_availabilities": {"spot": 0.5}}
    assert asked(pools(), 2, **lately) == {"l4": 2}


def test_priority_may_be_negative() -> None:
    assert asked(pools(priority=-1), 5) == {"l4": 4, "spot": 1}


def test_smaller_workers_go_before_priority() -> None:
    assert asked(pools(resources={"cpu": "8"}), 2) == {"l4": 2}

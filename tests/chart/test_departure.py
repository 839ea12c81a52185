"""How pods leave: a whole cluster after a takeover, a head that is replaced, and drained nodes."""

import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray._private import ray_constants
from tests.chart.charts import (
    VALUES_FILES,
    one,
    pods,
    ray_cluster,
    ray_templates,
    render,
    serve_config_of,
    values_file,
)
from tests.chart.refusals import cluster, model, spot
from tests.chart.test_objects import EVERYTHING, matches

Object = dict[str, Any]


def variables(template: Object) -> dict[str, str]:
    container = template["spec"]["containers"][0]
    return {each["name"]: each.get("value", "") for each in container["env"]}


@pytest.mark.parametrize(("deadline_s", "delay_s"), [(600, 660), (90.5, 151), (7200, 7260)])
def test_old_cluster_stays_for_as_long_as_a_request_may_take(
    deadline_s: float, delay_s: int
) -> None:
    values = cluster(gateway={"requests": {"deadlineSeconds": deadline_s}})
    spec = one(render(values), "RayService")["spec"]
    assert spec["rayClusterDeletionDelaySeconds"] == delay_s


def test_deadline_is_no_part_of_a_cluster() -> None:
    longer = cluster(gateway={"requests": {"deadlineSeconds": 7200}})
    assert ray_cluster(longer) == ray_cluster(cluster())


def test_ray_ends_its_processes_before_the_kubelet_does() -> None:
    name = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
    assert hasattr(ray_constants, name)
    for pod, template in ray_templates(render(EVERYTHING)).items():
        grace_s = template["spec"]["terminationGracePeriodSeconds"]
        assert int(variables(template)[name]) == grace_s - 10
        assert grace_s == (35 if pod == "head" else 120)


def test_replicas_come_before_no_other_process_of_their_node() -> None:
    for template in ray_templates(render(EVERYTHING)).values():
        assert variables(template)[ray_constants.RAY_WORKER_NICENESS] == "0"


@pytest.fixture
def autoscaler_script() -> str:
    (script,) = ray_cluster({})["autoscalerOptions"]["args"]
    return str(script)


def test_autoscaler_ends_at_sigterm(autoscaler_script: str, tmp_path: Path) -> None:
    ready, stand_in = tmp_path / "ready", tmp_path / "autoscaler"
    os.mkfifo(ready)
    stand_in.write_text(f"echo $$ > {ready}; exec sleep 600")
    environment = {"KUBERAY_GEN_AUTOSCALER_START_CMD": f"bash {stand_in}", "PATH": "/usr/bin:/bin"}
    with subprocess.Popen(["bash", "-c", autoscaler_script], env=environment) as shell:  # noqa: S603, S607
        autoscaler = psutil.Process(int(ready.read_text()))
        shell.send_signal(signal.SIGTERM)
        assert shell.wait(timeout=30) == 128 + signal.SIGTERM
        autoscaler.wait(timeout=30)


def test_autoscaler_that_fails_ends_its_container(autoscaler_script: str) -> None:
    environment = {"KUBERAY_GEN_AUTOSCALER_START_CMD": "false", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(["bash", "-c", autoscaler_script], env=environment, check=False)  # noqa: S603, S607
    assert done.returncode == 1  # and Kubernetes starts it again


def gateway_deployment(values: Object) -> Object:
    for application in serve_config_of(values)["applications"]:
        if application["name"] == "gateway":
            (deployment,) = application["deployments"]
            return dict(deployment)
    raise AssertionError


@pytest.mark.parametrize("name", VALUES_FILES)
def test_each_gateway_has_a_pod_of_its_own(name: str) -> None:
    assert gateway_deployment(values_file(name))["max_replicas_per_node"] == 1


def test_gateways_are_spread_over_nodes_and_zones() -> None:
    template = ray_templates(render(cluster()))["cpu"]
    spread = template["spec"]["topologySpreadConstraints"]
    assert [each["topologyKey"] for each in spread] == [
        "kubernetes.io/hostname",
        "topology.kubernetes.io/zone",
    ]
    for each in spread:
        # A cluster of one node or zone runs them all the same.
        assert each["whenUnsatisfiable"] == "ScheduleAnyway"
        assert matches(each["labelSelector"], template["metadata"]["labels"])


def budgets(values: Object) -> dict[str, set[str]]:
    """Return which pods each budget counts."""
    objects = render(values)
    labels = {name: pod["metadata"]["labels"] for name, pod in pods(objects).items()}
    return {
        each["metadata"]["name"]: {
            name for name, pod in labels.items() if matches(each["spec"]["selector"], pod)
        }
        for each in objects
        if each["kind"] == "PodDisruptionBudget"
    }


def replicas(least: int, **values: Any) -> Object:
    return {"one": model(replicas={"min": least, "max": 4}, **values)}


@pytest.mark.parametrize(
    ("values", "counted"),
    [
        pytest.param(cluster(gateway={"replicas": {"min": 1}}), {}, id="one of each"),
        pytest.param(cluster(), {"prod-gateway": {"cpu"}}, id="two gateways"),
        pytest.param(
            cluster(models=replicas(2)), {"prod-gateway": {"cpu"}}, id="two replicas on one worker"
        ),
        pytest.param(
            cluster(models=replicas(3)),
            {"prod-gateway": {"cpu"}, "prod-pool-l4": {"l4"}},
            id="three replicas on two workers",
        ),
        pytest.param(
            cluster(models=replicas(2, parallelism={"tensor": 2})),
            {"prod-gateway": {"cpu"}, "prod-pool-l4": {"l4"}},
            id="two replicas of two GPUs",
        ),
        pytest.param(
            cluster(models=replicas(4, gpuSharing={"replicasPerGpu": 2})),
            {"prod-gateway": {"cpu"}},
            id="replicas that share GPUs",
        ),
        pytest.param(
            spot(models=replicas(3)),
            {"prod-gateway": {"cpu"}, "prod-pool-l4": {"l4", "spot"}},
            id="a pool and one that joins it",
        ),
        pytest.param(cluster(models=replicas(3), pdb={"minAvailable": 2}), {}, id="two are kept"),
        pytest.param(cluster(models=replicas(3), pdb={"enabled": False}), {}, id="none wanted"),
    ],
)
def test_budgets_are_where_more_pods_run_than_they_keep(
    values: Object, counted: dict[str, set[str]]
) -> None:
    # A budget over a single pod lets nobody drain its node, ever.
    assert budgets(values) == counted

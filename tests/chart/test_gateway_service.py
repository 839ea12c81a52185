"""The Service that clients come in by: the chart's own, and not the one that KubeRay makes.

KubeRay makes `<release>-serve-svc` once every model runs, points it from one cluster to the next
with a gap, and counts each ready worker among its endpoints, those of GPU pools too.
"""

from typing import Any

import pytest
from tests.chart.charts import notes, one, pods, ray_templates, render
from tests.chart.refusals import cluster
from tests.chart.test_objects import CASES, EVERYTHING, reachable, selectors

Object = dict[str, Any]


def endpoints(objects: list[Object]) -> set[str]:
    """Return the pods that the Service sends clients to, once they are ready."""
    selector = one(objects, "Service", "prod-gateway")["spec"]["selector"]
    return {
        name
        for name, pod in pods(objects).items()
        if selector.items() <= pod["metadata"]["labels"].items()
    }


def ray_container(objects: list[Object], name: str) -> Object:
    found: Object = ray_templates(objects)[name]["spec"]["containers"][0]
    return found


@pytest.mark.parametrize("values", CASES)
def test_clients_come_in_by_gateway_pods_alone(values: Object) -> None:
    objects = render(values)
    assert endpoints(objects) == {"cpu"}
    [port] = one(objects, "Service", "prod-gateway")["spec"]["ports"]
    assert port["port"] == 8000
    assert {"name": port["targetPort"], "containerPort": 8000} in ray_container(objects, "cpu")[
        "ports"
    ]


def test_gateways_of_both_clusters_serve_during_a_takeover() -> None:
    # KubeRay labels pods with the cluster that they are of, and it alone knows the names.
    [selector] = selectors(one(render(cluster()), "Service", "prod-gateway"))
    assert not [key for key in selector["matchLabels"] if key.startswith("ray.io/")]


@pytest.mark.parametrize("values", CASES)
def test_gateway_gets_clients_from_when_it_can_answer(values: Object) -> None:
    probe = ray_container(render(values), "cpu")["readinessProbe"]
    assert probe["httpGet"] == {"path": "/readyz", "port": "http"}
    # One that leaves is out of the endpoints before its proxy ends, 30 s later.
    assert probe["periodSeconds"] == 1


def test_gpu_worker_needs_no_proxy_to_be_ready() -> None:
    # A later stage of a pipeline has none, and a budget counts ready pods alone.
    objects = render(EVERYTHING)
    for name in ("t4", "l4", "a100"):
        probe = ray_container(objects, name)["readinessProbe"]
        assert probe["httpGet"] == {"path": "/api/local_raylet_healthz", "port": 52365}


@pytest.mark.parametrize("source", ["ingress-nginx", "test", "monitoring"])
def test_gpu_worker_takes_no_client(source: str) -> None:
    assert 8000 not in reachable(cluster(), "pool", source)


@pytest.mark.parametrize("values", CASES)
def test_nothing_names_the_service_of_kuberay(values: Object) -> None:
    assert "serve-svc" not in str(render(values))
    assert "serve-svc" not in notes(values)

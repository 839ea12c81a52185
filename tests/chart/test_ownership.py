"""Who owns what of the RayService once KubeRay has written to it.

Helm 4 applies on the server. KubeRay adds its finalizer to a RayService by an Update of the whole
object, as its Go types marshal it, and `workerGroupSpecs` is one list that has one owner. Whatever
Go writes in another way than the chart hands that list to KubeRay, and every later `helm upgrade`
ends with `conflict with "kuberay-operator"`.
"""

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.chart.charts import notes, one, platform_of, pods, ray_cluster, render
from tests.chart.refusals import cluster, models
from tests.chart.test_objects import CASES
from tests.config.test_quantity import QUANTITIES

from tera.config.quantity import amount, canonical
from tera.plan import plan

Object = dict[str, Any]

WRITTEN_OTHERWISE: Object = cluster(
    head={"resources": {"cpu": "2000m", "memory": "8192Mi"}},
    gateway={"resources": {"cpu": "1.5", "memory": "4096Mi"}},
    modelCache={"enabled": True, "size": "1024Gi"},
    redis={"storage": "0.5Ti"},
    gpuPools={
        "l4": {
            "order": 1,
            "maxWorkers": 4,
            "resources": {"cpu": "6000m", "memory": "24576Mi"},
            "shmSize": "1.5Gi",
            "tolerations": [
                {"key": "", "operator": "Exists", "value": "", "effect": ""},
                {"key": "a", "effect": "NoExecute", "tolerationSeconds": 0},
                {"key": "b", "operator": "Exists", "tolerationSeconds": None},
            ],
        }
    },
)
EVERY_CASE = [*CASES, pytest.param(WRITTEN_OTHERWISE, id="written otherwise")]

KEPT_EMPTY = {"rayStartParams", "scaleStrategy", "emptyDir"}
"""Go leaves out what is empty, but for what has no `omitempty` or is behind a pointer."""


def below(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every value in an object, with the key that it or its list is under."""
    yield key, value
    if isinstance(value, dict):
        for name, each in value.items():
            yield from below(each, name)
    if isinstance(value, list):
        for each in value:
            yield from below(each, key)


def quantities(value: Any) -> Iterator[str]:
    """Yield the quantities of an object."""
    for key, each in below(value):
        if key == "sizeLimit":
            yield each
        # A worker group's own `resources` are Ray's, and texts.
        if key in ("requests", "limits"):
            yield from each.values()


@pytest.mark.parametrize("values", EVERY_CASE)
def test_every_worker_group_has_the_scale_strategy_that_kuberay_writes(values: Object) -> None:
    groups = ray_cluster(values)["workerGroupSpecs"]
    assert [group.get("scaleStrategy") for group in groups] == [{}] * len(groups)


@pytest.mark.parametrize("values", EVERY_CASE)
def test_quantities_are_as_kubernetes_writes_them(values: Object) -> None:
    objects = render(values)
    found = list(quantities([objects, *pods(objects).values()]))
    assert found
    assert found == [canonical(quantity) for quantity in found]


@pytest.mark.parametrize("values", EVERY_CASE)
def test_nothing_is_empty_that_kuberay_leaves_out(values: Object) -> None:
    rendered = below(ray_cluster(values))
    empty = {key for key, value in rendered if value is None or value in ("", [], {})}
    assert empty <= KEPT_EMPTY


def test_amounts_and_tolerations_mean_what_they_did() -> None:
    spec = ray_cluster(WRITTEN_OTHERWISE)["workerGroupSpecs"][1]["template"]["spec"]
    (container,) = spec["containers"]
    limits = {"cpu": "6", "memory": "24Gi", "nvidia.com/gpu": "1"}
    assert container["resources"] == {"limits": limits, "requests": limits}
    assert {"medium": "Memory", "sizeLimit": "1536Mi"} in [
        volume.get("emptyDir") for volume in spec["volumes"]
    ]
    assert spec["tolerations"] == [
        {"operator": "Exists"},
        {"key": "a", "effect": "NoExecute", "tolerationSeconds": 0},
        {"key": "b", "operator": "Exists"},
    ]


def test_the_same_amount_written_otherwise_is_no_edit() -> None:
    before, after = ({"head": {"resources": {"cpu": cpu}}} for cpu in ("2", "2000m"))
    assert ray_cluster(before) == ray_cluster(after)
    assert plan(platform_of(before), platform_of(after)).changes == ()


def test_notes_say_what_to_do_about_a_release_that_kuberay_owns_a_part_of() -> None:
    assert "helm upgrade --force-conflicts" in notes(cluster())


@given(st.lists(QUANTITIES, min_size=8, max_size=8))
@settings(max_examples=25, deadline=None)
def test_chart_writes_any_quantity_as_python_does(drawn: list[str]) -> None:
    claim, storage, shm, *resources = drawn
    gateway, (cpu, memory) = resources[:2], resources[2:4]
    shm, memory = sorted((shm, memory), key=amount)  # the one is a part of the other
    worker = [cpu if amount(cpu) >= 2 else "2", memory]  # a core for each GPU
    values = models()
    values["gateway"] = {"resources": dict(zip(("cpu", "memory"), gateway, strict=True))}
    values["modelCache"] = {"enabled": True, "size": claim}
    values["redis"] = {"storage": storage}
    values["gpuPools"]["l4"] |= {
        "resources": dict(zip(("cpu", "memory"), worker, strict=True)),
        "shmSize": shm,
    }
    objects = render(values)
    assert one(objects, "PersistentVolumeClaim")["spec"]["resources"]["requests"] == {
        "storage": canonical(claim)
    }
    (template,) = one(objects, "StatefulSet", "prod-redis")["spec"]["volumeClaimTemplates"]
    assert template["spec"]["resources"]["requests"] == {"storage": canonical(storage)}
    found = pods(objects)
    for name, (cpu, memory) in {"cpu": gateway, "l4": worker}.items():
        (container,) = found[name]["spec"]["containers"]
        limits = container["resources"]["limits"]
        assert (limits["cpu"], limits["memory"]) == (canonical(cpu), canonical(memory))
    assert canonical(shm) in list(quantities(found["l4"]["spec"]["volumes"]))


@pytest.mark.parametrize(
    ("number", "written"), [(6, "6"), (1.5, "1500m"), (0.25, "250m"), (8589934592, "8589934592")]
)
def test_number_is_a_quantity_as_it_is_to_kubernetes(number: float, written: str) -> None:
    values = {"gateway": {"resources": {"cpu": number}}}
    (container,) = pods(render(values))["cpu"]["spec"]["containers"]
    assert container["resources"]["limits"]["cpu"] == written
    assert platform_of(values).gateway.resources.cpu == written

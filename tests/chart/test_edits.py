"""What an edit of the values changes among the rendered objects, and that `tera plan` says so."""

import copy
from collections.abc import Collection
from typing import Any

import pytest
from hypothesis import given, settings
from tests.chart.charts import VALUES_FILES, platform_of, render, values_file
from tests.plans import VALUES
from tests.test_plan import CLUSTER, EDITS, IN_PLACE, JOINING, RELOADING

from tera.config.merge import deep_merge
from tera.plan import plan

Object = dict[str, Any]
Objects = dict[tuple[str, str], Object]

# KubeRay compares clusters without these (kuberay#4568).
MUTED_OF_A_GROUP = ("replicas", "minReplicas", "maxReplicas", "workersToDelete")
MUTED_OF_A_POD = ("tolerations", "schedulingGates")

IMMUTABLE = {
    "PersistentVolumeClaim": ("accessModes", "storageClassName"),
    "StatefulSet": ("volumeClaimTemplates",),
}


def objects(values: Object) -> Objects:
    """Return a release's objects by kind and name, without what is random in them.

    And without what `helm test` starts: it is no part of what runs.
    """
    found = {
        (each["kind"], each["metadata"]["name"]): each
        for each in render(values)
        if each["metadata"].get("annotations", {}).get("helm.sh/hook") != "test"
    }
    for each in found.values():
        if each["kind"] == "Secret":
            del each["data"]
    return found


def compared(cluster: Object) -> Object:
    """Return a cluster as KubeRay compares it."""
    cluster = copy.deepcopy(cluster)
    for group in cluster["workerGroupSpecs"]:
        for key in MUTED_OF_A_GROUP:
            group.pop(key, None)
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        for key in MUTED_OF_A_POD:
            group["template"]["spec"].pop(key, None)
    return cluster


def what_kuberay_does(old: Object, new: Object) -> str:
    """Return what becomes of a running cluster, as KubeRay decides it.

    In the order of `generateRayClusterAction` of its RayService controller.
    """
    if compared(old) == compared(new):
        return "not_taken" if old != new else "nothing"
    before, after = compared(old), compared(new)
    groups = before["workerGroupSpecs"]
    after["workerGroupSpecs"] = after["workerGroupSpecs"][: len(groups)]
    return "group_appended" if after == before else "cluster_replaced"


def what_the_plan_says(effects: Collection[str]) -> str:
    for effect in ("cluster_replaced", "group_appended", "not_taken"):
        if effect in effects:
            return effect
    return "nothing"


def refused(old: Objects, new: Objects) -> bool:
    """Return whether Kubernetes refuses to change an object that there is."""
    return any(
        old[key]["spec"].get(name) != new[key]["spec"].get(name)
        for key in old.keys() & new.keys()
        for name in IMMUTABLE.get(key[0], ())
    )


def check(before: Object, after: Object) -> None:
    """Hold the plan against the rendered objects."""
    found = plan(platform_of(before), platform_of(after))
    old, new = objects(before), objects(after)
    clusters = [
        next(each for each in side.values() if each["kind"] == "RayService")["spec"]
        for side in (old, new)
    ]
    cluster_effects = {
        change.effect
        for change in found.changes
        if "Kubernetes refuses" not in change.note and "strategy is None" not in change.note
    }
    if after.get("upgrade", {}).get("strategy") != "None":
        done = what_kuberay_does(*(spec["rayClusterConfig"] for spec in clusters))
        if not refused(old, new):
            assert what_the_plan_says(cluster_effects) == done
    else:
        assert "cluster_replaced" not in cluster_effects
    assert any("Kubernetes refuses" in change.note for change in found.changes) is refused(old, new)
    if {change.effect for change in found.changes} <= {"nothing"}:
        assert old == new


CONNECTIONS = {"gateway": {"connections": {"max": 1000}}}
TABLE = [*IN_PLACE, *RELOADING, *CLUSTER, pytest.param(CONNECTIONS, id="connections")]


@pytest.mark.parametrize("edit", [pytest.param(case.values[0], id=case.id) for case in TABLE])
def test_plan_says_what_the_rendered_objects_do(edit: Object) -> None:
    check(VALUES, deep_merge(VALUES, edit))
    check(deep_merge(VALUES, edit), VALUES)


@pytest.mark.parametrize("edit", [{"joins": "h100"}, {"joins": ""}, {"priority": 10}])
def test_plan_says_what_becomes_of_a_pool_that_joins_another(edit: Object) -> None:
    joining = deep_merge(VALUES, JOINING)
    check(joining, deep_merge(joining, {"gpuPools": {"spot": edit}}))


def merged(edits: list[Object]) -> Object:
    values = VALUES
    for edit in edits:
        values = deep_merge(values, edit)
    return values


@given(EDITS, EDITS)
@settings(max_examples=40, deadline=None)
def test_plan_says_what_the_rendered_objects_do_of_any_edits(
    before: list[Object], after: list[Object]
) -> None:
    check(merged(before), merged(after))


def lines(values: Object) -> list[str]:
    """Return a release as lines of its values and their paths."""

    def walk(value: Any, at: str) -> list[str]:
        if isinstance(value, dict):
            return [line for key, below in value.items() for line in walk(below, f"{at}.{key}")]
        if isinstance(value, list):
            return [line for n, below in enumerate(value) for line in walk(below, f"{at}.{n}")]
        return [f"{at}: {line}" for line in str(value).splitlines() or [""]]

    return [line for key, each in objects(values).items() for line in walk(each, ".".join(key))]


@pytest.mark.parametrize(("name", "model"), [("cpu", "simulated"), ("production", "qwen-7b")])
def test_edit_of_replicas_max_renders_the_same_but_for_that_number(name: str, model: str) -> None:
    values = values_file(name)
    highest = values["models"][model]["replicas"]["max"]
    before = lines(values)
    after = lines(deep_merge(values, {"models": {model: {"replicas": {"max": highest - 1}}}}))
    assert len(before) == len(after)
    changed = [pair for pair in zip(before, after, strict=True) if pair[0] != pair[1]]
    # In Serve's bounds of the model, and in the gateways' catalog.
    assert len(changed) == 2
    for old, new in changed:
        assert "max" in old
        assert old.replace(str(highest), str(highest - 1)) == new


@pytest.mark.parametrize("name", VALUES_FILES)
def test_second_model_changes_the_serve_config_and_its_alerts_alone(name: str) -> None:
    values = values_file(name)
    more = deep_merge(
        values, {"models": {"another": {"id": "x/another", "engine": {"kind": "simulated"}}}}
    )
    before, after = objects(values), objects(more)
    for side in (before, after):
        del side["RayService", "prod"]["spec"]["serveConfigV2"]
        side.pop(("PrometheusRule", "prod"), None)
    assert after == before

"""Where the state of Ray's head is kept, so that a new head goes on with the workers that run."""

import base64
from typing import Any

import pytest
from tests.chart.charts import one, platform_of, pods, ray_cluster, render
from tests.chart.refusals import cluster
from tests.chart.test_objects import RAYSERVICE, matches, reachable

from tera.plan import plan

Object = dict[str, Any]

ELSEWHERE: Object = {"address": "durable:6379", "existingSecret": "theirs"}


def names(values: Object, kind: str) -> set[str]:
    return {each["metadata"]["name"] for each in render(values) if each["kind"] == kind}


def test_head_keeps_its_state_in_a_valkey_of_its_own() -> None:
    objects = render(cluster())
    options = ray_cluster(cluster())["gcsFaultToleranceOptions"]
    assert options == {
        "redisAddress": "prod-gcs:6379",
        "redisPassword": {"valueFrom": {"secretKeyRef": {"name": "prod-gcs", "key": "password"}}},
    }
    RAYSERVICE.validate(one(objects, "RayService")["spec"])
    assert one(objects, "StatefulSet", "prod-gcs")["spec"]["replicas"] == 1
    service = one(objects, "Service", "prod-gcs")["spec"]
    assert service["ports"] == [{"name": "redis", "port": 6379, "targetPort": "redis"}]
    assert [
        name
        for name, pod in pods(objects).items()
        if matches({"matchLabels": service["selector"]}, pod["metadata"]["labels"])
    ] == ["prod-gcs"]


def test_state_outlives_a_restart_and_nothing_of_it_is_evicted() -> None:
    objects = render(cluster())
    data = one(objects, "Secret", "prod-gcs")["data"]
    settings = base64.b64decode(data["valkey.conf"]).decode().splitlines()
    assert {"appendonly yes", "maxmemory-policy noeviction"} <= set(settings)
    (claim,) = one(objects, "StatefulSet", "prod-gcs")["spec"]["volumeClaimTemplates"]
    assert claim["spec"]["resources"]["requests"] == {"storage": "1Gi"}


def test_full_ledger_leaves_the_state_of_ray_alone() -> None:
    # The two share no process, no volume and no password.
    objects = render(cluster())
    assert names(cluster(), "StatefulSet") == {"prod-redis", "prod-gcs"}
    first, second = (one(objects, "Secret", f"prod-{each}")["data"] for each in ("redis", "gcs"))
    assert first["password"] != second["password"]


@pytest.mark.parametrize(
    ("values", "options"),
    [
        pytest.param(cluster(gcsFaultTolerance={"enabled": False}), None, id="off"),
        pytest.param(
            cluster(gcsFaultTolerance=ELSEWHERE),
            {
                "redisAddress": "durable:6379",
                "redisPassword": {
                    "valueFrom": {"secretKeyRef": {"name": "theirs", "key": "password"}}
                },
            },
            id="elsewhere",
        ),
        pytest.param(
            cluster(gcsFaultTolerance={"address": "durable:6379"}),
            {"redisAddress": "durable:6379"},
            id="elsewhere, without a password",
        ),
    ],
)
def test_none_is_made_where_none_is_wanted(values: Object, options: Object | None) -> None:
    assert ray_cluster(values).get("gcsFaultToleranceOptions") == options
    for kind in ("StatefulSet", "Service", "Secret", "NetworkPolicy"):
        assert "prod-gcs" not in names(values, kind)


@pytest.mark.parametrize(
    ("source", "ports"), [("head", {6379}), ("gateway", set()), ("pool", set()), ("test", set())]
)
def test_head_alone_reaches_the_state(source: str, ports: set[int]) -> None:
    assert reachable(cluster(), "gcs", source) == ports


@pytest.mark.parametrize(
    ("before", "after", "effect"),
    [
        pytest.param({}, {"enabled": False}, "cluster_replaced", id="off"),
        pytest.param({}, ELSEWHERE, "cluster_replaced", id="elsewhere"),
        pytest.param({}, {"storage": "2Gi"}, "not_taken", id="storage"),
        pytest.param(
            ELSEWHERE, {**ELSEWHERE, "storage": "2Gi"}, "nothing", id="storage of none"
        ),
    ],
)  # fmt: skip
def test_plan_says_what_an_edit_does(before: Object, after: Object, effect: str) -> None:
    sides = (platform_of(cluster(gcsFaultTolerance=each)) for each in (before, after))
    assert {change.effect for change in plan(*sides).changes} == {effect}

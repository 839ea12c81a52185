# ruff: noqa: E501  a table reads best with a case a line
import base64
import json
import re
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
from helm_python.chart import lint
from jsonschema import Draft202012Validator
from tests.chart.charts import (
    CHART,
    VALUES_FILES,
    notes,
    one,
    pods,
    ray_cluster,
    ray_templates,
    render,
    values_file,
)
from tests.chart.refusals import cluster, model, spot

from tera.config.merge import deep_merge
from tera.tenancy.keys import is_well_formed

RAYSERVICE = Draft202012Validator(
    json.loads(Path(__file__).with_name("rayservice.schema.json").read_text())
)
KUBERNETES = ("1.35", "1.36", "1.37")
"""The three newest."""
FOREIGN = {"RayService", "PodMonitor", "PrometheusRule", "HTTPRoute"}
"""Kinds of others' CRDs, which Kubernetes' own schemas do not have."""

Object = dict[str, Any]

EVERYTHING: Object = {
    **cluster(),
    "imagePullSecrets": [{"name": "registry"}],
    "image": {"digest": "sha256:" + "0" * 64},
    "modelCache": {"enabled": True, "prefetch": True, "storageClassName": "shared"},
    "huggingface": {"existingSecret": "hub"},
    "objectStore": {"existingSecret": "store"},
    "gcsFaultTolerance": {"enabled": True, "address": "durable:6379", "existingSecret": "durable"},
    "upgrade": {"strategy": "None"},
    "ingress": {"enabled": True, "host": "llm.example.com", "annotations": {"a": "1"}},
    "httpRoute": {"enabled": True, "parentRefs": [{"name": "public"}], "hostnames": ["a.example"]},
    "observability": {"podMonitor": True, "rules": True, "labels": {"release": "prometheus"}},
    "head": {"nodeSelector": {"zone": "a"}},
    "gpuPools": {
        "l4": {"order": 2, "runtimeClassName": "nvidia", "gpusPerWorker": 2},
        "a100": {"order": 10, "gpuResource": "nvidia.com/mig-1g.10gb", "nodeSelector": {"x": "y"}},
        "t4": {"order": 1, "tolerations": []},
    },
}

SPOT: Object = deep_merge(
    spot(),
    {
        "gpuPools": {
            "spot": {
                "priority": 10,
                "nodeSelector": {"karpenter.sh/capacity-type": "spot"},
                "tolerations": [{"key": "spot", "operator": "Exists"}],
            }
        },
        "modelCache": {"enabled": True},
        "huggingface": {"offline": True},
    },
)

CASES = [
    *(pytest.param(values_file(name), id=name) for name in VALUES_FILES),
    pytest.param({}, id="defaults"),
    pytest.param(EVERYTHING, id="everything"),
    pytest.param(SPOT, id="spot and offline"),
]


@pytest.mark.parametrize("values", CASES)
def test_kubernetes_knows_every_object_and_pod(values: Object) -> None:
    objects = render(values)
    own = [each for each in objects if each["kind"] not in FOREIGN]
    for each in [*own, *pods(objects).values()]:
        for version in KUBERNETES:
            kubernetes_validate.validate(each, version, strict=True)


@pytest.mark.parametrize("values", CASES)
def test_kuberay_knows_the_rayservice(values: Object) -> None:
    RAYSERVICE.validate(one(render(values), "RayService")["spec"])


@pytest.mark.parametrize("values", CASES)
def test_rayservice_keeps_the_rules_that_only_kuberay_checks(values: Object) -> None:
    spec = one(render(values, name="a" * 40), "RayService")["spec"]
    cluster = spec["rayClusterConfig"]
    assert "headService" not in cluster["headGroupSpec"]
    groups = cluster["workerGroupSpecs"]
    assert len({group["groupName"] for group in groups}) == len(groups)
    for group in groups:
        assert "resources" not in group["rayStartParams"]
        assert not group["rayStartParams"].keys() & {"num-cpus", "num-gpus", "memory"}
        assert group["minReplicas"] == 0
        # A number there would fight with the autoscaler at every upgrade of the release.
        assert "replicas" not in group
    for template in ray_templates(render(values)).values():
        assert "restartPolicy" not in template["spec"]
        (container,) = template["spec"]["containers"]
        names = [variable["name"] for variable in container["env"]]
        assert len(set(names)) == len(names)
        assert not [name for name in names if name.startswith(("RAY_REDIS", "REDIS_"))]
    assert spec["upgradeStrategy"]["type"] in ("NewCluster", "None")


def test_what_loads_models_can_read_the_object_store() -> None:
    def variables(values: Object) -> dict[str, dict[str, str]]:
        return {
            name: {
                each["name"]: each["valueFrom"]["secretKeyRef"]["key"]
                for container in template["spec"]["containers"]
                for each in container["env"]
                if each.get("valueFrom", {}).get("secretKeyRef", {}).get("name") == "store"
            }
            for name, template in ray_templates(render(values)).items()
        }

    given = variables(cluster(objectStore={"existingSecret": "store"}))
    assert given.pop("head") == {}
    assert {"cpu", "l4"} <= given.keys()
    for found in given.values():
        assert {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION"} <= found.keys()
        assert all(name == key for name, key in found.items())
    assert not any(variables(cluster()).values())


def test_head_schedules_and_computes_nothing() -> None:
    cluster = ray_cluster({})
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    # KubeRay makes the account that its autoscaler needs, unless one is named.
    spec = cluster["headGroupSpec"]["template"]["spec"]
    assert "serviceAccountName" not in spec
    assert "automountServiceAccountToken" not in spec


def test_kuberay_finds_the_pods_for_its_services() -> None:
    head = ray_cluster({})["headGroupSpec"]["template"]
    (container,) = head["spec"]["containers"]
    # BuildServeService makes no service without a port of this name, and BuildServiceForHeadPod
    # selects by KubeRay's own name of the application.
    assert {"name": "serve", "containerPort": 8000} in container["ports"]
    for template in ray_templates(render(EVERYTHING)).values():
        assert "app.kubernetes.io/name" not in template["metadata"]["labels"]
        assert not [key for key in template["metadata"]["labels"] if key.startswith("ray.io/")]


def test_pools_are_in_order_after_the_group_without_gpus() -> None:
    names = [group["groupName"] for group in ray_cluster(EVERYTHING)["workerGroupSpecs"]]
    assert names == ["cpu", "t4", "l4", "a100"]


def test_new_pool_is_appended() -> None:
    pools = {"l4": {"order": 1}}
    before = ray_cluster(cluster(gpuPools=pools))
    after = ray_cluster(cluster(gpuPools={**pools, "a100": {"order": 2}}))
    assert after["workerGroupSpecs"][:-1] == before["workerGroupSpecs"]
    del after["workerGroupSpecs"], before["workerGroupSpecs"]
    assert after == before


@pytest.mark.parametrize(
    "edit",
    [
        pytest.param({"models": {"one": model(replicas={"max": 3})}}, id="replicas"),
        pytest.param({"models": {"one": model(engine={"args": {"seed": 1}})}}, id="engine"),
        pytest.param({"models": {}}, id="model removed"),
        pytest.param({"gateway": {"replicas": {"max": 9}}}, id="gateways"),
        pytest.param({"gateway": {"limits": {"onRedisError": "closed"}}}, id="limits"),
        pytest.param({"ingress": {"enabled": True, "host": "x.example"}}, id="ingress"),
        pytest.param({"pdb": {"enabled": False}}, id="disruption budget"),
        pytest.param({"networkPolicy": {"enabled": False}}, id="network policy"),
    ],
)
def test_edit_leaves_the_cluster_as_it_is(edit: Object) -> None:
    assert ray_cluster({**cluster(), **edit}) == ray_cluster(cluster())


def test_workers_have_what_their_pool_says() -> None:
    group = ray_cluster(EVERYTHING)["workerGroupSpecs"][-1]
    (container,) = group["template"]["spec"]["containers"]
    assert group["resources"] == {"GPU": "1", "pool_a100": "1"}
    assert container["resources"]["limits"]["nvidia.com/mig-1g.10gb"] == "1"
    assert group["template"]["spec"]["nodeSelector"] == {"x": "y"}


def test_pool_that_joins_offers_the_resource_of_the_other_alone() -> None:
    groups = ray_cluster(SPOT)["workerGroupSpecs"]
    # One more resource would count as less use of the worker, and go before its priority.
    assert [group["resources"] for group in groups[1:]] == [{"GPU": "2", "pool_l4": "1"}] * 2
    assert groups[2]["priority"] == 10
    assert groups[2]["template"]["spec"]["tolerations"] == [{"key": "spot", "operator": "Exists"}]
    assert groups[2]["template"]["metadata"]["labels"]["tera/pool"] == "spot"


def test_pool_without_a_priority_says_nothing_of_one() -> None:
    for pool in ({}, {"joins": "", "priority": 0}):
        groups = ray_cluster(cluster(gpuPools={"l4": {"order": 1, **pool}}))["workerGroupSpecs"]
        assert groups == ray_cluster(cluster(gpuPools={"l4": {"order": 1}}))["workerGroupSpecs"]
        assert "priority" not in groups[1]


def test_gateways_and_workers_are_offline_and_the_prefetch_job_is_not() -> None:
    def offline(wanted: bool) -> set[str]:
        cache = {"enabled": True, "prefetch": True}
        objects = render(cluster(huggingface={"offline": wanted}, modelCache=cache))
        return {
            name
            for name, pod in pods(objects).items()
            for container in pod["spec"]["containers"]
            if {"name": "HF_HUB_OFFLINE", "value": "1"} in container.get("env", [])
        }

    assert offline(True) == {"cpu", "l4"}
    assert offline(False) == set()


@pytest.mark.parametrize("values", CASES)
def test_pods_have_no_more_rights_than_they_need(values: Object) -> None:
    for name, pod in pods(render(values)).items():
        spec = pod["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        if name != "head":
            assert spec["automountServiceAccountToken"] is False, name
        for container in spec["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }


@pytest.mark.parametrize("values", CASES)
def test_no_secret_is_plain_outside_of_secrets(values: Object) -> None:
    objects = render(values)
    secrets = [
        base64.b64decode(value).decode()
        for each in objects
        if each["kind"] == "Secret"
        for key, value in each["data"].items()
        if key != "keys.yaml"
    ]
    text = json.dumps([each for each in objects if each["kind"] != "Secret"])
    assert not [secret for secret in secrets if secret.strip() in text]
    for pod in pods(objects).values():
        for container in pod["spec"]["containers"]:
            for variable in container.get("env", []):
                if re.search("PASSWORD|TOKEN|PEPPER|SECRET", variable["name"]):
                    assert "secretKeyRef" in variable["valueFrom"], variable["name"]


@pytest.mark.parametrize("values", CASES)
def test_only_gateways_get_the_pepper(values: Object) -> None:
    knowing: set[str] = set()
    for name, pod in pods(render(values)).items():
        for container in pod["spec"]["containers"]:
            assert "envFrom" not in container  # so that each pod gets what it is seen to get
            sources = [it["valueFrom"] for it in container.get("env", []) if "valueFrom" in it]
            if "key-pepper" in [it["secretKeyRef"]["key"] for it in sources]:
                knowing.add(name)
        for volume in pod["spec"].get("volumes", []):
            if "secret" in volume:
                assert "key-pepper" not in [it["key"] for it in volume["secret"]["items"]]
    assert knowing == {"cpu"}


def test_what_cannot_be_made_again_outlives_the_release() -> None:
    kept = {
        (each["kind"], each["metadata"]["name"])
        for each in render({"modelCache": {"enabled": True}})
        if each["metadata"].get("annotations", {}).get("helm.sh/resource-policy") == "keep"
    }
    assert kept == {("Secret", "prod-keys"), ("PersistentVolumeClaim", "prod-models")}


def test_first_key_is_one_that_the_gateway_takes() -> None:
    for _ in range(5):
        data = one(render({}), "Secret", "prod-keys")["data"]
        key = base64.b64decode(data["bootstrap-key"]).decode()
        assert is_well_formed(key)
        assert key in base64.b64decode(data["keys.yaml"]).decode()


def test_first_key_can_be_left_out() -> None:
    data = one(render({"gateway": {"auth": {"bootstrapKeys": False}}}), "Secret", "prod-keys")[
        "data"
    ]
    assert base64.b64decode(data["keys.yaml"]) == b"[]\n"
    assert "bootstrap-key" not in data


def test_secrets_of_others_are_used_and_not_made() -> None:
    objects = render(values_file("production"))
    assert not [each for each in objects if each["kind"] == "Secret"]
    text = json.dumps(objects)
    for name in ("tera-keys", "tera-redis", "tera-ray-redis", "tera-huggingface"):
        assert name in text
    assert "rediss://:$(TERA_REDIS_PASSWORD)@redis.data.svc:6379/0" in text


def test_two_releases_in_a_namespace_share_nothing() -> None:
    first, second = render(EVERYTHING, "one"), render(EVERYTHING, "two")
    names = [
        {(each["kind"], each["metadata"]["name"]) for each in made} for made in (first, second)
    ]
    assert not names[0] & names[1]
    labels = [pod["metadata"]["labels"] for pod in pods(second).values()]
    for each in first:
        for selector in selectors(each):
            assert not [pod for pod in labels if matches(selector, pod)], each["metadata"]


def selectors(each: Object) -> list[Object]:
    """Return the pod selectors of an object; an empty one means its namespace."""
    spec = each.get("spec", {})
    if each["kind"] == "Service":
        return [{"matchLabels": spec["selector"]}]
    if each["kind"] == "NetworkPolicy":
        peers = [peer for rule in spec.get("ingress", []) for peer in rule.get("from", [])]
        found = [peer["podSelector"] for peer in peers if peer.get("podSelector")]
        return [spec["podSelector"], *found]
    return [spec["selector"]] if "selector" in spec else []


def matches(selector: Object, labels: Object) -> bool:
    wanted = selector.get("matchLabels", {})
    return all(labels.get(key) == value for key, value in wanted.items()) and all(
        labels.get(each["key"]) in each["values"] for each in selector.get("matchExpressions", [])
    )


@pytest.mark.parametrize(
    ("policy", "meant"),
    [
        pytest.param("deny", {"head", "cpu", "t4", "l4", "a100", "prod-redis", "prod-prefetch", "prod-test"}, id="deny"),
        pytest.param("ray", {"head", "cpu", "t4", "l4", "a100"}, id="ray"),
        pytest.param("operator", {"head"}, id="operator"),
        pytest.param("api", {"cpu"}, id="api"),
        pytest.param("metrics", {"head", "cpu", "t4", "l4", "a100"}, id="metrics"),
        pytest.param("redis", {"prod-redis"}, id="redis"),
    ],
)  # fmt: skip
def test_policy_is_of_the_pods_that_are_meant(policy: str, meant: set[str]) -> None:
    objects = render(EVERYTHING)
    selector = one(objects, "NetworkPolicy", f"prod-{policy}")["spec"]["podSelector"]
    labels = {name: pod["metadata"]["labels"] for name, pod in pods(objects).items()}
    found = {name for name, each in labels.items() if matches(selector, each)}
    assert {re.sub("-[0-9a-f]{8}$", "", name) for name in found} == meant


NAMESPACES = {"ingress-nginx", "kuberay-system", "monitoring"}


def reachable(values: Object, component: str, source: str) -> set[int | None]:
    """Return the ports of a component that a namespace or component reaches; None is every one."""
    ports: set[int | None] = set()
    labels = {"app.kubernetes.io/part-of": "tera", "app.kubernetes.io/instance": "prod"}
    for policy in render(values):
        if policy["kind"] != "NetworkPolicy" or not matches(
            policy["spec"]["podSelector"], {**labels, "app.kubernetes.io/component": component}
        ):
            continue
        for rule in policy["spec"].get("ingress", []):
            if "from" not in rule or any(
                source not in NAMESPACES
                and matches(peer["podSelector"], {**labels, "app.kubernetes.io/component": source})
                if "podSelector" in peer
                else matches(peer["namespaceSelector"], {"kubernetes.io/metadata.name": source})
                for peer in rule["from"]
            ):
                ports |= {port["port"] for port in rule.get("ports", [{"port": None}])}
    return ports


@pytest.mark.parametrize(
    ("component", "source", "ports"),
    [
        pytest.param("gateway", "ingress-nginx", {8000}, id="clients reach the API"),
        pytest.param("head", "ingress-nginx", set(), id="clients reach no head"),
        pytest.param("redis", "ingress-nginx", set(), id="clients reach no Redis"),
        pytest.param("head", "kuberay-system", {8265}, id="the operator submits applications"),
        pytest.param("gateway", "kuberay-system", set(), id="the operator needs no more"),
        pytest.param("redis", "gateway", {6379}, id="gateways reach Redis"),
        pytest.param("redis", "pool", set(), id="engines reach no Redis"),
        pytest.param("pool", "head", {None}, id="Ray reaches its workers"),
        pytest.param("head", "test", set(), id="the test is a client"),
        pytest.param("gateway", "test", {8000}, id="and reaches the API"),
        pytest.param("head", "monitoring", set(), id="metrics only when they are asked for"),
    ],
)
def test_who_reaches_what(component: str, source: str, ports: set[int]) -> None:
    found = reachable(cluster(), component, source)
    # Ray's processes reach each other on every port, the gateway's among them.
    assert (found if None not in found else {None}) == ports


def test_pod_templates_say_nothing_of_the_chart() -> None:
    for template in ray_templates(render(EVERYTHING)).values():
        text = json.dumps(template["metadata"])
        assert "helm.sh" not in text
        assert "version" not in text
        assert "checksum" not in text


def test_notes_say_where_the_first_key_is() -> None:
    said = notes(cluster())
    assert "get secret prod-keys" in said
    assert "one: org/one on l4, 1 to 1 replica(s)" in said
    assert "bootstrap-key" not in notes(values_file("production"))


@pytest.mark.parametrize("values", CASES)
def test_helm_has_nothing_to_say_of_the_chart(values: Object) -> None:
    report = lint(str(CHART), values, strict=True)
    # Helm would like an icon.
    assert [each for each in report["messages"] if each["severity"] > 1] == []
    assert report["errors"] == []

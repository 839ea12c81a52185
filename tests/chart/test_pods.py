# ruff: noqa: E501  a table reads best with a case a line
"""What an operator adds to the pods of each place, by the same names everywhere."""

from typing import Any

import kubernetes_validate
import pytest
from tests.chart.charts import one, platform_of, pods, ray_templates, render
from tests.chart.refusals import cluster, model
from tests.chart.test_edits import check
from tests.chart.test_objects import FOREIGN, KUBERNETES, RAYSERVICE, reachable
from tests.chart.test_ownership import KEPT_EMPTY, below, quantities

from tera.config.merge import deep_merge
from tera.config.quantity import canonical

Object = dict[str, Any]

SIDECAR: Object = {
    "name": "logs",
    "image": "fluent-bit:4",
    "resources": {"requests": {"cpu": "1000m", "memory": "1024Mi"}, "limits": {"memory": 2**30}},
}
POD: Object = {
    "env": {
        "NCCL_IB_HCA": "mlx5",
        "TOKEN": {"secretName": "hub", "secretKey": "token"},
        "RAY_USAGE_STATS_ENABLED": "1",
    },
    "envFrom": [{"configMapRef": {"name": "site"}}],
    "labels": {"team": "ml"},
    "annotations": {"cluster-autoscaler.kubernetes.io/safe-to-evict": "true"},
    "priorityClassName": "serving",
    "nodeSelector": {"zone": "a"},
    "tolerations": [{"key": "spot", "operator": "Exists"}],
    "affinity": {"nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": []}},
    "topologySpreadConstraints": [
        {"maxSkew": 1, "topologyKey": "rack", "whenUnsatisfiable": "DoNotSchedule"}
    ],
    "volumes": [{"name": "scratch", "emptyDir": {"sizeLimit": "1024Mi"}}],
    "volumeMounts": [{"name": "scratch", "mountPath": "/scratch", "readOnly": False}],
    "initContainers": [{"name": "wait", "image": "busybox:1", "command": ["true"]}],
    "sidecars": [SIDECAR],
    "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
}
PLACES = ("head", "gateway", "poolDefaults", "redis", "modelCache")
EVERYWHERE: Object = deep_merge(
    cluster(modelCache={"enabled": True, "prefetch": True}, gpuPools={"l4": {"order": 1}}),
    {place: {"pod": POD} for place in PLACES},
)
MADE = ("head", "cpu", "l4", "prod-redis", "prod-gcs")


def made(values: Object) -> dict[str, Object]:
    """Return the pods that run for long, and that of the prefetch Job."""
    found = pods(render(values))
    return {name: pod for name, pod in found.items() if name != "prod-test"}


@pytest.fixture(scope="module")
def found() -> dict[str, Object]:
    return made(EVERYWHERE)


def test_kubernetes_and_kuberay_know_every_pod(found: dict[str, Object]) -> None:
    objects = render(EVERYWHERE)
    for each in [*(it for it in objects if it["kind"] not in FOREIGN), *found.values()]:
        kubernetes_validate.validate(each, KUBERNETES[-1], strict=True)
    RAYSERVICE.validate(one(objects, "RayService")["spec"])
    assert len(found) == len(MADE) + 1


def test_every_place_has_all_of_it(found: dict[str, Object]) -> None:
    for pod in found.values():
        metadata, spec = pod["metadata"], pod["spec"]
        main = spec["containers"][0]
        assert metadata["labels"]["team"] == "ml"
        assert metadata["labels"]["app.kubernetes.io/part-of"] == "tera"
        assert POD["annotations"].items() <= metadata["annotations"].items()
        assert spec["priorityClassName"] == "serving"
        assert spec["nodeSelector"] == {"zone": "a"}
        assert POD["tolerations"][0] in spec["tolerations"]
        assert spec["topologySpreadConstraints"] == POD["topologySpreadConstraints"]
        assert spec["securityContext"] == POD["securityContext"]
        assert POD["envFrom"] == main["envFrom"]
        assert {"name": "scratch", "mountPath": "/scratch"} in main["volumeMounts"]
        assert {"name": "scratch", "emptyDir": {"sizeLimit": "1Gi"}} in spec["volumes"]
        assert [each["name"] for each in spec["initContainers"]] == ["wait"]
        assert [each["name"] for each in spec["containers"][1:]] == ["logs"]


def test_variable_is_text_or_of_a_secret_and_there_once(found: dict[str, Object]) -> None:
    for pod in found.values():
        variables = pod["spec"]["containers"][0]["env"]
        names = [each["name"] for each in variables]
        assert len(set(names)) == len(names)
        for each in (
            {"name": "NCCL_IB_HCA", "value": "mlx5"},
            {"name": "RAY_USAGE_STATS_ENABLED", "value": "1"},
            {"name": "TOKEN", "valueFrom": {"secretKeyRef": {"name": "hub", "key": "token"}}},
        ):
            assert each in variables


def test_what_is_added_runs_with_no_more_rights(found: dict[str, Object]) -> None:
    for pod in found.values():
        for each in (*pod["spec"]["containers"], *pod["spec"]["initContainers"]):
            assert each["securityContext"]["allowPrivilegeEscalation"] is False


def test_kuberay_writes_it_back_as_it_is(found: dict[str, Object]) -> None:
    # Or it would own the worker groups, and every later `helm upgrade` would fail.
    templates = ray_templates(render(EVERYWHERE))
    amounts = list(quantities(templates))
    assert amounts == [canonical(each) for each in amounts]
    empty = {key for key, value in below(templates) if value is None or value in ("", [], {})}
    assert empty <= KEPT_EMPTY
    assert ("readOnly", False) not in list(below(templates))


@pytest.mark.parametrize("place", PLACES)
def test_nothing_added_changes_nothing(place: str) -> None:
    assert made(deep_merge(cluster(), {place: {"pod": {}}})) == made(cluster())


def test_pool_has_its_own_over_the_defaults() -> None:
    values = cluster(
        poolDefaults={"pod": {"env": {"A": "1", "B": "1"}, "sidecars": [SIDECAR]}},
        gpuPools={
            "l4": {"order": 1, "pod": {"env": {"B": "2"}, "sidecars": []}},
            "t4": {"order": 2},
        },
    )
    l4, t4 = (ray_templates(render(values))[name]["spec"]["containers"] for name in ("l4", "t4"))
    assert {"name": "A", "value": "1"} in l4[0]["env"]
    assert {"name": "B", "value": "2"} in l4[0]["env"]
    assert (len(l4), len(t4)) == (1, 2)


def accounts(values: Object) -> dict[str, Object]:
    return {
        each["metadata"]["name"]: each["metadata"].get("annotations", {})
        for each in render(values)
        if each["kind"] == "ServiceAccount"
    }


ROLE = {"eks.amazonaws.com/role-arn": "arn:aws:iam::1:role/weights"}


def test_each_place_has_a_service_account_to_give_rights_to() -> None:
    values = deep_merge(
        cluster(), {"gpuPools": {"l4": {"pod": {"serviceAccount": {"annotations": ROLE}}}}}
    )
    assert accounts(values) == {"prod-gateway": {}, "prod-pool-l4": ROLE}
    templates = ray_templates(render(values))
    assert templates["cpu"]["spec"]["serviceAccountName"] == "prod-gateway"
    assert templates["l4"]["spec"]["serviceAccountName"] == "prod-pool-l4"


def test_service_account_of_others_is_used_and_not_made() -> None:
    named = {"pod": {"serviceAccount": {"name": "theirs"}}}
    values = deep_merge(cluster(), {"head": named, "gateway": named, "poolDefaults": named})
    assert accounts(values) == {}
    for template in ray_templates(render(values)).values():
        assert template["spec"]["serviceAccountName"] == "theirs"


@pytest.mark.parametrize(
    ("image", "mirrored"),
    [
        pytest.param("ghcr.io/tera/tera", "mirror.example/a/tera/tera", id="of a registry"),
        pytest.param("tera/tera", "mirror.example/a/tera/tera", id="of none"),
        pytest.param("localhost/tera", "mirror.example/a/tera", id="of this machine"),
        pytest.param("host:5000/tera", "mirror.example/a/tera", id="of a port"),
    ],
)
def test_images_come_from_one_registry(image: str, mirrored: str) -> None:
    mirror = {"imageRegistry": "mirror.example/a/", "imagePullSecrets": [{"name": "mirror"}]}
    values = cluster(image={"repository": image, "tag": "1"}, **{"global": mirror})
    for name, pod in pods(render(values)).items():
        (container,) = pod["spec"]["containers"]
        valkey = name in ("prod-redis", "prod-gcs")
        expected = "mirror.example/a/valkey/valkey:8.1.4-alpine" if valkey else f"{mirrored}:1"
        assert container["image"] == expected
        assert pod["spec"]["imagePullSecrets"] == [{"name": "mirror"}]


def test_what_downloads_trusts_the_bundle_and_takes_the_proxy() -> None:
    trust = {
        "caBundle": {"configMap": "authorities", "key": "bundle.pem"},
        "proxy": {"https": "http://proxy.example:3128"},
    }
    values = cluster(modelCache={"enabled": True, "prefetch": True}, trust=trust)
    reaching = set()
    for name, pod in made(values).items():
        (container,) = pod["spec"]["containers"]
        variables = {each["name"]: each.get("value") for each in container.get("env", [])}
        if "SSL_CERT_FILE" not in variables:
            continue
        reaching.add(name.partition("-prefetch-")[1] or name)
        assert variables["SSL_CERT_FILE"] == variables["REQUESTS_CA_BUNDLE"] == "/trust/ca.crt"
        assert variables["HTTPS_PROXY"] == variables["https_proxy"] == "http://proxy.example:3128"
        assert "HTTP_PROXY" not in variables
        assert ".svc" in variables["NO_PROXY"]
        assert {"name": "trust", "mountPath": "/trust", "readOnly": True} in container[
            "volumeMounts"
        ]
        items = [{"key": "bundle.pem", "path": "ca.crt"}]
        assert {"name": "trust", "configMap": {"name": "authorities", "items": items}} in pod[
            "spec"
        ]["volumes"]
    assert reaching == {"cpu", "l4", "-prefetch-"}


def test_address_ranges_may_connect_to_gateways() -> None:
    values = cluster(networkPolicy={"ingressCidrs": ["10.0.0.0/8"]})
    policy = one(render(values), "NetworkPolicy", "prod-api")
    [rule] = policy["spec"]["ingress"]
    assert {"ipBlock": {"cidr": "10.0.0.0/8"}} in rule["from"]
    kubernetes_validate.validate(policy, KUBERNETES[-1], strict=True)


def test_pods_reach_each_other_names_and_what_is_named() -> None:
    values = cluster(networkPolicy={"egress": {"enabled": True, "cidrs": ["10.0.0.1/32"]}})
    policy = one(render(values), "NetworkPolicy", "prod-egress")
    kubernetes_validate.validate(policy, KUBERNETES[-1], strict=True)
    inside, names, named = policy["spec"]["egress"]
    assert inside == {"to": [{"podSelector": policy["spec"]["podSelector"]}]}
    assert {(each["protocol"], each["port"]) for each in names["ports"]} == {
        ("UDP", 53),
        ("TCP", 53),
    }
    assert named == {"to": [{"ipBlock": {"cidr": "10.0.0.1/32"}}]}
    assert reachable(values, "redis", "gateway") == {6379}  # who may come in is as before


def test_pods_reach_everything_unless_told_otherwise() -> None:
    for policy in render(cluster()):
        if policy["kind"] == "NetworkPolicy":
            assert policy["spec"]["policyTypes"] == ["Ingress"]


@pytest.mark.parametrize(
    "edit",
    [
        *(pytest.param({place: {"pod": POD}}, id=place) for place in PLACES[:4]),
        pytest.param({"head": {"pod": {"tolerations": POD["tolerations"]}}}, id="head's taints"),
        pytest.param({"gateway": {"pod": {"tolerations": POD["tolerations"]}}}, id="gateways' taints"),
        pytest.param({"gpuPools": {"l4": {"pod": {"tolerations": POD["tolerations"]}}}}, id="a pool's taints"),
        pytest.param({"gateway": {"pod": {"serviceAccount": {"annotations": ROLE}}}}, id="rights of gateways"),
        pytest.param({"gpuPools": {"l4": {"pod": {"serviceAccount": {"annotations": ROLE}}}}}, id="rights of a pool"),
        pytest.param({"trust": {"proxy": {"https": "http://p:1"}}}, id="proxy"),
        pytest.param({"global": {"imageRegistry": "mirror"}}, id="registry"),
        pytest.param({"networkPolicy": {"egress": {"enabled": True}}}, id="egress"),
    ],
)  # fmt: skip
def test_plan_says_what_the_rendered_objects_do(edit: Object) -> None:
    check(cluster(), deep_merge(cluster(), edit))


def test_python_reads_what_the_chart_does() -> None:
    platform = platform_of(EVERYWHERE)
    assert platform.gpu_pools["l4"].pod == platform.pool_defaults.pod
    assert platform.head.pod.env["NCCL_IB_HCA"] == "mlx5"
    assert model()["pool"] in platform.gpu_pools

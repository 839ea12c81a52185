import base64
import json
import re
import shutil
import subprocess
from typing import Any

import kubernetes_validate
import pytest
import yaml
from jsonschema import Draft202012Validator
from k8s.render import MANIFESTS, NAMESPACE, OVERLAYS, RELEASE, ROOT, VALUES, manifests, values
from tests.chart.charts import CHART, one, pods, render, values_file

from tera.config.keys_file import load_keys_file
from tera.config.platform import PlatformConfig

SAMPLES = ROOT / "k8s/samples"
README = (ROOT / "k8s/README.md").read_text()
PREREQUISITES = (ROOT / "k8s/prerequisites/README.md").read_text()
RAYSERVICE = json.loads((ROOT / "tests/chart/rayservice.schema.json").read_text())
KUBERNETES = "1.37"
FOREIGN = {"RayService", "PodMonitor", "PrometheusRule"}

Object = dict[str, Any]
EACH_OVERLAY = pytest.mark.parametrize("overlay", VALUES)


def committed(overlay: str) -> list[Object]:
    return list(yaml.safe_load_all((OVERLAYS / overlay / MANIFESTS).read_text()))


def sample(name: str) -> Object:
    made: Object = yaml.safe_load((SAMPLES / f"{name}.yaml").read_text())
    return made


def named_secrets(value: Any) -> set[str]:
    """Return the Secrets that an object names, wherever it does."""
    if isinstance(value, list):
        return set().union(*map(named_secrets, value))
    if not isinstance(value, dict):
        return set()
    own = {value["secretName"]} if "secretName" in value else set()
    if "secretKeyRef" in value:
        own.add(value["secretKeyRef"]["name"])
    return own.union(*map(named_secrets, value.values()))


@EACH_OVERLAY
def test_committed_manifests_are_current(overlay: str) -> None:
    made = (OVERLAYS / overlay / MANIFESTS).read_text()
    assert made == manifests(overlay), "run `make overlays`"


@EACH_OVERLAY
def test_manifests_are_the_same_each_time_and_hold_no_secret(overlay: str) -> None:
    assert manifests(overlay) == manifests(overlay)
    assert "Secret" not in {each["kind"] for each in committed(overlay)}


@EACH_OVERLAY
def test_kubernetes_and_kuberay_know_every_object(overlay: str) -> None:
    objects = committed(overlay)
    for each in [*objects, *pods(objects).values()]:
        if each["kind"] not in FOREIGN:
            kubernetes_validate.validate(each, KUBERNETES, strict=True)
    Draft202012Validator(RAYSERVICE).validate(one(objects, "RayService")["spec"])


@EACH_OVERLAY
def test_secrets_to_make_are_told(overlay: str) -> None:
    (row,) = re.findall(rf"^\| `{overlay}` \|.*\| (.*) \|$", README, re.MULTILINE)
    ingress = {"llm-example-com"}  # TLS is the ingress controller's
    assert set(re.findall(r"`([^`]+)`", row)) == named_secrets(committed(overlay)) - ingress


@EACH_OVERLAY
def test_kustomization_is_of_the_namespace_that_is_rendered_for(overlay: str) -> None:
    kustomization = yaml.safe_load((OVERLAYS / overlay / "kustomization.yaml").read_text())
    assert kustomization["namespace"] == NAMESPACE
    assert kustomization["resources"] == [MANIFESTS]


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="there is no kubectl")
@EACH_OVERLAY
def test_kustomize_builds_it(overlay: str) -> None:
    command = ["kubectl", "kustomize", str(OVERLAYS / overlay)]
    built = subprocess.run(command, check=True, capture_output=True, text=True)  # noqa: S603
    kinds = sorted(each["kind"] for each in yaml.safe_load_all(built.stdout))
    assert kinds == sorted(each["kind"] for each in committed(overlay))


def test_overlay_without_gpus_has_the_image_without_cuda() -> None:
    version = yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"]
    assert values("cpu-dev")["image"]["tag"] == f"{version}-cpu"


@pytest.mark.parametrize("name", ["keys-secret", "redis-secret", "gcs-secret"])
def test_secret_is_one(name: str) -> None:
    kubernetes_validate.validate(sample(name), KUBERNETES, strict=True)


def test_keys_of_the_sample_are_read_and_open_nothing(tmp_path: Any) -> None:
    secret = sample("keys-secret")
    path = tmp_path / "keys.yaml"
    path.write_text(secret["stringData"]["keys.yaml"])
    (entry,) = load_keys_file(path)
    assert entry.key is None
    assert set(entry.key_hash or "") == {"0"}


@pytest.mark.parametrize(
    ("name", "made"),
    [
        ("keys-secret", "tera-keys"),
        ("redis-secret", "tera-redis"),
        ("gcs-secret", "tera-gcs"),
    ],
)
def test_sample_has_what_the_chart_would_make(name: str, made: str) -> None:
    secret = sample(name)
    data = one(render({}, RELEASE), "Secret", made)["data"]
    assert secret["metadata"] == {"name": made, "namespace": NAMESPACE}
    assert set(secret["stringData"]) == set(data) - {"bootstrap-key"}


@pytest.mark.parametrize("name", ["redis", "gcs"])
def test_sample_of_a_valkey_has_the_charts_settings(name: str) -> None:
    ours = sample(f"{name}-secret")["stringData"]
    data = one(render({}, RELEASE), "Secret", f"tera-{name}")["data"]
    theirs = {key: base64.b64decode(value).decode() for key, value in data.items()}
    placed = theirs["valkey.conf"].replace(theirs["password"], ours["password"])
    assert ours["valkey.conf"] == placed


def test_external_secret_makes_the_keys_secret() -> None:
    spec = sample("external-secret")["spec"]
    keys = sample("keys-secret")
    assert spec["target"]["name"] == keys["metadata"]["name"]
    assert {each["secretKey"] for each in spec["data"]} == set(keys["stringData"])


def test_argo_ignores_the_secrets_that_the_chart_makes_and_no_others() -> None:
    spec = sample("argo-cd-application")["spec"]
    helm = spec["source"]["helm"]
    objects = render(helm["valuesObject"], helm["releaseName"], spec["destination"]["namespace"])
    made = {each["metadata"]["name"] for each in objects if each["kind"] == "Secret"}
    assert {each["name"] for each in spec["ignoreDifferences"]} == made
    for each in spec["ignoreDifferences"]:
        assert (each["kind"], each["jsonPointers"]) == ("Secret", ["/data"])
    assert "RespectIgnoreDifferences=true" in spec["syncPolicy"]["syncOptions"]
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert spec["source"]["targetRevision"] == chart["version"]


def test_nodes_are_those_that_the_pool_wants() -> None:
    spec = sample("karpenter-node-pool")["spec"]
    pool = PlatformConfig.parse(values_file("production")).gpu_pools["l4"]
    node = spec["template"]
    assert pool.node_selector.items() <= node["metadata"]["labels"].items()
    tolerated = {(each.key, each.effect) for each in pool.tolerations}
    assert {(each["key"], each["effect"]) for each in node["spec"]["taints"]} <= tolerated
    gpus = pool.max_workers * pool.gpus_per_worker
    assert int(spec["limits"][pool.gpu_resource]) >= gpus


def test_prerequisites_are_pinned() -> None:
    commands = re.findall(r"helm upgrade --install [\s\S]*?(?=```)", PREREQUISITES)
    assert len(commands) == 3
    for command in commands:
        assert re.search(r"--version v?\d+\.\d+\.\d+ ", command), command
    assert re.search(r"releases/download/v\d+\.\d+\.\d+/standard-install.yaml", PREREQUISITES)
    (kuberay,) = re.findall(r"kuberay-operator --version (\d+)\.(\d+)", PREREQUISITES)
    assert tuple(map(int, kuberay)) >= (1, 7)


def test_prerequisites_are_where_the_chart_looks_for_them() -> None:
    policy = values_file("")["networkPolicy"]
    for name in ("operatorNamespace", "monitoringNamespace"):
        assert f"--namespace {policy[name]} " in PREREQUISITES
    assert f"`{policy['ingressNamespace']}`" in PREREQUISITES
    labels = values_file("production")["observability"]["labels"]
    assert "helm upgrade --install prometheus " in PREREQUISITES
    assert labels == {"release": "prometheus"}


def test_every_sample_is_in_the_readme() -> None:
    for path in SAMPLES.iterdir():
        assert f"| `{path.name}` |" in README

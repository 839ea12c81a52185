"""The values files that come with the chart do what they are for."""

import re
from pathlib import Path
from typing import Any

import pytest
from tests.chart.charts import CHART, VALUES_FILES, one, pods, ray_templates, render, values_file

INSTALL = (Path(__file__).parents[2] / "docs/install.md").read_text()

Object = dict[str, Any]


def test_every_file_is_tested_and_told_of() -> None:
    there = {path.stem.removeprefix("values-") for path in CHART.glob("values-*.yaml")}
    # `tera serve` reads the last one.
    assert there == {*VALUES_FILES, "local"}
    told = set(re.findall(r"^\| `values-([a-z0-9-]+).yaml` \|", INSTALL, re.MULTILINE))
    assert told == set(VALUES_FILES)


@pytest.mark.parametrize("name", VALUES_FILES)
def test_first_gpu_model_has_a_worker_that_holds_it(name: str) -> None:
    # Whether the sums are right is checked while rendering.
    values = values_file(name)
    templates = ray_templates(render(values))
    assert set(values.get("gpuPools", {})) | {"head", "cpu"} == set(templates)


def test_two_replicas_of_a_large_model_fit_into_one_node_of_eight_gpus() -> None:
    values = values_file("h100")
    (container,) = ray_templates(render(values))["h100"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "8"
    # No second cluster could have GPUs, nor mount its volume.
    assert one(render(values), "RayService")["spec"]["upgradeStrategy"] == {"type": "None"}


def test_nothing_that_a_stream_breaks_with_is_on_spot_nodes() -> None:
    templates = ray_templates(render(values_file("spot")))
    for name in ("head", "cpu", "l4"):
        assert templates[name]["spec"]["nodeSelector"]["karpenter.sh/capacity-type"] == "on-demand"
    assert templates["l4-spot"]["spec"]["nodeSelector"]["karpenter.sh/capacity-type"] == "spot"


def test_air_gapped_pods_have_no_way_out() -> None:
    objects = render(values_file("air-gapped"))
    for name, pod in pods(objects).items():
        (container,) = pod["spec"]["containers"]
        assert container["image"].startswith("registry.example.com/mirror/"), name
    for name in ("cpu", "l4"):
        (container,) = ray_templates(objects)[name]["spec"]["containers"]
        assert {"name": "HF_HUB_OFFLINE", "value": "1"} in container["env"]
    egress = one(objects, "NetworkPolicy", "prod-egress")["spec"]["egress"]
    assert [
        each["ipBlock"] for rule in egress for each in rule.get("to", []) if "ipBlock" in each
    ] == [{"cidr": "10.96.0.1/32"}]


def test_openshift_chooses_every_user() -> None:
    for name, pod in pods(render(values_file("openshift"))).items():
        context = pod["spec"]["securityContext"]
        assert context == {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}, name


def test_argo_cd_renders_the_same_each_time() -> None:
    values = values_file("argo-cd")
    assert render(values) == render(values)
    assert "Secret" not in {each["kind"] for each in render(values)}

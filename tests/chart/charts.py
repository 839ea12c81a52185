"""The chart rendered as Helm renders it, without a cluster."""

import json
import pickle
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import yaml
from helm_python import Chart

from tera.config.merge import deep_merge
from tera.config.platform import PlatformConfig

CHART = Path(__file__).parents[2] / "helm/tera"
VALUES_FILES = (
    *("small", "cpu", "production"),
    *("h100", "spot", "air-gapped", "openshift", "argo-cd"),
)

Object = dict[str, Any]


@cache
def _chart() -> Chart:
    return Chart.load(str(CHART))


def render(values: Object, name: str = "prod", namespace: str = "llm") -> list[Object]:
    """Return the objects of a release, which the caller may change."""
    objects: list[Object] = pickle.loads(_rendered(json.dumps(values), name, namespace))  # noqa: S301
    return objects


@lru_cache(maxsize=256)
def _rendered(values: str, name: str, namespace: str) -> bytes:
    """Render values, given as JSON: a tenth of a second, and many tests look at the same ones."""
    rendered = _chart().render(json.loads(values), name=name, namespace=namespace)
    texts = [text for path, text in rendered.items() if path.endswith(".yaml")]
    return pickle.dumps(
        [each for text in texts for each in yaml.load_all(text, yaml.CSafeLoader) if each]
    )


def notes(values: Object, name: str = "prod", namespace: str = "llm") -> str:
    """Return what Helm says after an installation."""
    rendered = _chart().render(values, name=name, namespace=namespace)
    return rendered["tera/templates/NOTES.txt"]


def one(objects: list[Object], kind: str, name: str | None = None) -> Object:
    """Return the only object of a kind, or that of a name."""
    (found,) = [
        each
        for each in objects
        if each["kind"] == kind and name in (None, each["metadata"]["name"])
    ]
    return found


def values_file(name: str) -> Object:
    """Return one of the values files that come with the chart; "" is the defaults."""
    path = CHART / (f"values-{name}.yaml" if name else "values.yaml")
    values: Object = yaml.safe_load(path.read_text())
    return values


def platform_of(values: Object) -> PlatformConfig:
    """Return what Python makes of values over the chart's defaults."""
    return PlatformConfig.parse(deep_merge(values_file(""), values))


def ray_cluster(values: Object, name: str = "prod") -> Object:
    """Return the RayService's `rayClusterConfig`."""
    cluster: Object = one(render(values, name), "RayService")["spec"]["rayClusterConfig"]
    return cluster


def serve_config_of(values: Object) -> Object:
    """Return the RayService's Serve config."""
    config: Object = json.loads(one(render(values), "RayService")["spec"]["serveConfigV2"])
    return config


def ray_templates(objects: list[Object]) -> dict[str, Object]:
    """Return the pod templates of the RayService: `head` and each group's."""
    cluster = one(objects, "RayService")["spec"]["rayClusterConfig"]
    groups = {group["groupName"]: group["template"] for group in cluster["workerGroupSpecs"]}
    return {"head": cluster["headGroupSpec"]["template"], **groups}


def pods(objects: list[Object]) -> dict[str, Object]:
    """Return all pods that a release makes, by a name for people, as objects of kind Pod."""
    templates = ray_templates(objects)
    for each in objects:
        if each["kind"] in ("StatefulSet", "Job"):
            templates[each["metadata"]["name"]] = each["spec"]["template"]
        if each["kind"] == "Pod":
            templates[each["metadata"]["name"]] = {
                "metadata": {"labels": each["metadata"]["labels"]},
                "spec": each["spec"],
            }
    return {
        name: {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, **template["metadata"]},
            "spec": template["spec"],
        }
        for name, template in templates.items()
    }

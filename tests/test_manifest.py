import importlib
from typing import Any

import pytest

from tera import manifest
from tera.config import default_values_file, load_platform, parse_platform
from tera.manifest import serve_config


def values(**model: Any) -> dict[str, Any]:
    demo = {
        "id": "org/demo",
        "engine": {"kind": "simulated"},
        "replicas": {"min": 1, "max": 2},
        "scaling": {"maxOngoingRequests": 8},
    }
    other = {"id": "org/other", "engine": {"kind": "simulated"}}
    return {"models": {"demo": {**demo, **model}, "other": other}}


def applications(platform: dict[str, Any]) -> dict[str, Any]:
    config = serve_config(parse_platform(platform))
    return {application["name"]: application for application in config["applications"]}


# What Serve rolls an application for (architecture D5); everything else applies in place.
def reloading_part(application: dict[str, Any]) -> dict[str, Any]:
    deployments = [
        {key: deployment[key] for key in ("name", "ray_actor_options")}
        for deployment in application["deployments"]
    ]
    kept = {key: application[key] for key in ("name", "import_path", "args", "route_prefix")}
    return {**kept, "deployments": deployments, "runtime_env": application.get("runtime_env")}


def test_one_application_for_each_deployed_model_and_the_gateway() -> None:
    platform = values()
    platform["models"]["off"] = {"id": "x", "enabled": False, "engine": {"kind": "simulated"}}
    assert list(applications(platform)) == ["model-demo", "model-other", "gateway"]


def test_only_the_gateway_has_a_route() -> None:
    routes = {name: each["route_prefix"] for name, each in applications(values()).items()}
    assert routes == {"model-demo": None, "model-other": None, "gateway": "/"}


@pytest.mark.parametrize(
    "edit",
    [
        pytest.param({"replicas": {"min": 0, "max": 9}}, id="replicas"),
        pytest.param(
            {"scaling": {"maxOngoingRequests": 99, "upscaleDelaySeconds": 1}}, id="scaling"
        ),
        pytest.param({"aliases": ["another"]}, id="aliases"),
        pytest.param({"id": "org/renamed"}, id="id"),
        pytest.param({"capabilities": ["completions"]}, id="capabilities"),
    ],
)
def test_edit_reloads_nothing(edit: dict[str, Any]) -> None:
    before, after = applications(values()), applications(values(**edit))
    assert before != after
    for name in before:
        assert reloading_part(before[name]) == reloading_part(after[name])


@pytest.mark.parametrize(
    "edit",
    [
        pytest.param({"requests": {"retries": 5, "deadlineSeconds": 5}}, id="requests"),
        pytest.param({"replicas": {"min": 2, "max": 5}}, id="replicas"),
    ],
)
def test_edit_of_the_gateway_reloads_nothing(edit: dict[str, Any]) -> None:
    before, after = applications(values()), applications({**values(), "gateway": edit})
    assert before["gateway"] != after["gateway"]
    for name in before:
        assert reloading_part(before[name]) == reloading_part(after[name])


@pytest.mark.parametrize(
    "edit",
    [
        pytest.param({"engine": {"kind": "simulated", "args": {"profile": {}}}}, id="engine"),
        pytest.param({"source": "hf://org/other"}, id="source"),
        pytest.param({"parallelism": {"tensor": 2}}, id="parallelism"),
    ],
)
def test_edit_of_what_an_engine_is_made_of_reloads_that_model_alone(edit: dict[str, Any]) -> None:
    before, after = applications(values()), applications(values(**edit))
    assert before["model-demo"]["args"] != after["model-demo"]["args"]
    for name in ("model-other", "gateway"):
        assert reloading_part(before[name]) == reloading_part(after[name])


def test_serve_listens_where_it_is_told() -> None:
    config = serve_config(parse_platform({}), host="127.0.0.1", port=8123)
    assert config["http_options"] == {"host": "127.0.0.1", "port": 8123}


@pytest.mark.slow
class TestAgainstRay:
    """Imports Ray Serve, which takes seconds."""

    @pytest.mark.parametrize("kind", ["default values", "two models"])
    def test_serve_accepts_what_is_made(self, kind: str) -> None:
        from ray.serve.config import AutoscalingConfig
        from ray.serve.schema import ServeDeploySchema

        default = load_platform(default_values_file())
        platform = default if kind == "default values" else parse_platform(values())
        config = serve_config(platform)
        accepted = ServeDeploySchema.model_validate(config)
        assert [each.name for each in accepted.applications] == [
            each["name"] for each in config["applications"]
        ]
        for application in config["applications"]:
            for deployment in application["deployments"]:
                scaling = deployment["autoscaling_config"]
                # Ray ignores what it does not know, so nothing of ours may be missing there.
                known = AutoscalingConfig.model_validate(scaling)
                assert scaling.keys() <= AutoscalingConfig.model_fields.keys()
                assert {key: getattr(known, key) for key in scaling} == scaling

    def test_import_paths_name_what_builds_the_applications(self) -> None:
        for application in applications(values()).values():
            module, _, name = application["import_path"].partition(":")
            assert callable(getattr(importlib.import_module(module), name))

    def test_names_are_those_of_the_deployments(self) -> None:
        from tera import deploy
        from tera.gateway import deployment

        assert manifest.GATEWAY_APPLICATION == deployment.GATEWAY_APPLICATION
        assert manifest.GATEWAY_DEPLOYMENT == deployment.GATEWAY_DEPLOYMENT
        assert manifest.ENGINE_DEPLOYMENT == deployment.ENGINE_DEPLOYMENT
        made = applications(values())
        assert deployment.application_name("demo") in made
        for application in made.values():
            build = getattr(deploy, application["import_path"].partition(":")[2])
            ingress = build(application["args"])._bound_deployment
            assert [ingress.name] == [each["name"] for each in application["deployments"]]

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from tera.config.platform import PlatformConfig
from tera.config.values_file import default_values_file, load_platform
from tera.errors import ConfigError
from tera.manifest import cluster_serve_config, serve_config, values_schema

CHART = Path(__file__).parents[1] / "helm/tera"


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
    config = serve_config(PlatformConfig.parse(platform))
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
        pytest.param({"gpuSharing": {"replicasPerGpu": 2}}, id="GPU sharing"),
    ],
)
def test_edit_of_what_an_engine_is_made_of_reloads_that_model_alone(edit: dict[str, Any]) -> None:
    before, after = applications(values()), applications(values(**edit))
    assert before["model-demo"]["args"] != after["model-demo"]["args"]
    for name in ("model-other", "gateway"):
        assert reloading_part(before[name]) == reloading_part(after[name])


def test_how_long_replicas_drain_is_a_value_that_applies_in_place() -> None:
    edit = {"requests": {"drainSeconds": 2.5}}
    before, after = applications(values()), applications({**values(), "gateway": edit})
    assert before.keys() == after.keys()
    for name, application in after.items():
        (deployment,) = application["deployments"]
        assert deployment["graceful_shutdown_timeout_s"] == 2.5
        assert reloading_part(before[name]) == reloading_part(application)
        if name != "gateway":
            assert deployment["user_config"] == {"drainSeconds": 2.5}


def test_serve_listens_where_it_is_told() -> None:
    config = serve_config(PlatformConfig.parse({}), host="127.0.0.1", port=8123)
    assert config["http_options"] == {"host": "127.0.0.1", "port": 8123}


def on_cluster(**model: Any) -> dict[str, Any]:
    """Return the deployment of one vLLM model with a pool, on a cluster."""
    one = {"id": "org/one", "source": "hf://org/one", "pool": "l4", **model}
    pools = {"l4": {"order": 1, "gpusPerWorker": 4}}
    config = cluster_serve_config(PlatformConfig.parse({"models": {"one": one}, "gpuPools": pools}))
    deployment: dict[str, Any] = config["applications"][0]["deployments"][0]
    return deployment


class TestCluster:
    def test_replica_on_one_gpu_asks_for_it_and_for_its_pool(self) -> None:
        deployment = on_cluster()
        assert deployment["ray_actor_options"] == {
            "num_cpus": 1,
            "num_gpus": 1,
            "resources": {"pool_l4": 0.001},
        }
        assert "placement_group_bundles" not in deployment

    @pytest.mark.parametrize("replicas_per_gpu", range(1, 9))
    def test_replicas_that_share_a_gpu_fit_on_it_and_no_more_do(
        self, replicas_per_gpu: int
    ) -> None:
        deployment = on_cluster(gpuSharing={"replicasPerGpu": replicas_per_gpu})
        part = deployment["ray_actor_options"]["num_gpus"]
        assert part * replicas_per_gpu <= 1 < part * (replicas_per_gpu + 1)

    @pytest.mark.parametrize(
        ("parallelism", "bundles", "strategy"),
        [
            pytest.param({"tensor": 4}, 4, "STRICT_PACK", id="tensor: in one worker"),
            pytest.param({"pipeline": 2}, 2, "PACK", id="pipeline: over workers"),
            pytest.param({"tensor": 2, "pipeline": 3}, 6, "PACK", id="both"),
        ],
    )
    def test_replica_on_several_gpus_has_a_bundle_for_each(
        self, parallelism: dict[str, int], bundles: int, strategy: str
    ) -> None:
        deployment = on_cluster(parallelism=parallelism)
        first, *others = deployment["placement_group_bundles"]
        assert first == {"CPU": 1, "GPU": 1, "pool_l4": 0.001}
        assert others == [{"GPU": 1, "pool_l4": 0.001}] * (bundles - 1)
        assert deployment["placement_group_strategy"] == strategy
        # Serve puts the replica into the first bundle, so that must have what it asks for.
        assert deployment["ray_actor_options"] == {"num_cpus": 1}

    def test_gateways_and_models_without_a_pool_share_the_group_without_gpus(self) -> None:
        config = cluster_serve_config(PlatformConfig.parse(values()))
        for application in config["applications"]:
            (deployment,) = application["deployments"]
            assert deployment["ray_actor_options"] == {
                "num_cpus": 1,
                "resources": {"pool_cpu": 0.001},
            }

    def test_one_machine_knows_no_pool(self) -> None:
        pools = {"l4": {"order": 1}}
        config = serve_config(PlatformConfig.parse({**values(pool="l4"), "gpuPools": pools}))
        for application in config["applications"]:
            (deployment,) = application["deployments"]
            assert deployment["ray_actor_options"] == {"num_cpus": 1}

    @pytest.mark.parametrize(
        ("model", "fault"),
        [
            pytest.param({"source": "hf://x/y"}, "models.demo.pool: is missing", id="no pool"),
            pytest.param({"source": "demo://x"}, "models.demo.source: demo://", id="demo model"),
        ],
    )
    def test_model_of_one_machine_is_refused(self, model: dict[str, Any], fault: str) -> None:
        platform = PlatformConfig.parse(values(engine={"kind": "vllm"}, **model))
        with pytest.raises(ConfigError) as raised:
            cluster_serve_config(platform)
        assert any(line.startswith(fault) for line in raised.value.message.splitlines())


def test_committed_schema_is_current() -> None:
    assert (CHART / "values.schema.json").read_text() == values_schema(), "run `make schema`"


def test_schema_lets_no_unknown_key_through() -> None:
    schema = json.loads(values_schema())
    parts = {"": schema, **schema["$defs"]}
    for name, part in parts.items():
        if "properties" not in part:
            continue
        # Helm hands the `global` values of a parent chart to this one too.
        assert part["additionalProperties"] is (name == "GlobalConfig"), name
        for key, each in part["properties"].items():
            if "patternProperties" in each:
                assert each["additionalProperties"] is False, (name, key)


@pytest.mark.slow
class TestAgainstRay:
    """Imports Ray Serve, which takes seconds."""

    @pytest.mark.parametrize("kind", ["default values", "two models", "parallel model"])
    def test_serve_accepts_what_is_made(self, kind: str) -> None:
        from ray.serve.config import AutoscalingConfig
        from ray.serve.schema import ServeDeploySchema

        default = load_platform(default_values_file())
        platform = default if kind == "default values" else PlatformConfig.parse(values())
        config = serve_config(platform)
        if kind == "parallel model":
            config["applications"][0]["deployments"][0] = on_cluster(
                parallelism={"tensor": 2, "pipeline": 2}
            )
        accepted = ServeDeploySchema.model_validate(config)
        assert [each.name for each in accepted.applications] == [
            each["name"] for each in config["applications"]
        ]
        for application in config["applications"]:
            for deployment in application["deployments"]:
                scaling = deployment["autoscaling_config"]
                # Ray ignores what it does not know, so nothing of ours may be missing there.
                known = AutoscalingConfig.model_validate(scaling).model_dump()
                known["policy"].pop("policy_kwargs")
                assert {**known, **scaling} == known

    def test_import_paths_name_what_builds_the_applications(self) -> None:
        for application in applications(values()).values():
            module, _, name = application["import_path"].partition(":")
            assert callable(getattr(importlib.import_module(module), name))

    def test_names_are_those_of_the_deployments(self) -> None:
        from tera import deploy

        for application in applications(values()).values():
            build = getattr(deploy, application["import_path"].partition(":")[2])
            ingress = build(application["args"])._bound_deployment
            assert [ingress.name] == [each["name"] for each in application["deployments"]]

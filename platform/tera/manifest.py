"""Converts a `PlatformConfig` into what other systems read: Ray Serve's config, Helm's schema."""

import json
from collections.abc import Callable
from typing import Any

from tera.config.model import ModelConfig, ReplicaBounds, Scaling
from tera.config.names import (
    CPU_POOL,
    ENGINE_DEPLOYMENT,
    GATEWAY_APPLICATION,
    GATEWAY_DEPLOYMENT,
    HTTP_PORT,
    application_name,
    pool_resource,
)
from tera.config.platform import PlatformConfig
from tera.errors import ConfigError

GATEWAY_ONGOING_REQUESTS = 10_000
"""Requests that a gateway replica accepts at once: bounds its memory. Queues are per model."""
GATEWAY_TARGET_ONGOING_REQUESTS = 200

HEALTH_CHECK_PERIOD_S, HEALTH_CHECK_TIMEOUT_S = 2, 10
"""Serve replaces a replica after three failed checks: a stalled engine is gone in seconds."""

SCALING_METRICS = {"metrics_interval_s": 1.0, "look_back_period_s": 2.0}
"""How often waiting and running generations are counted, and over how long they are averaged. With
Serve's 10 and 30 s, a burst would be over, or have grown, before it is noticed."""

SCALING_POLICY = {"policy_function": "tera.autoscaling.policy:idle_replicas_first"}
"""The autoscaling policy of models. Editing it would restart them, so it depends on no value."""

POOL_SHARE = 0.001
"""Share of a worker's `pool_<name>` resource that a replica takes: keeps it on its pool without
limiting anything."""

_RELOADING = ("source", "engine", "parallelism", "gpuSharing")
"""Parts of a model that its application is built from; see `tera.deploy.ModelArgs`."""

_NOT_RELOADED = {"replicas", "resources", "auth", "connections", "pod"}
"""Parts of `gateway` that only Serve, its proxy and Kubernetes use; replicas do not get them."""

Placement = Callable[[ModelConfig | None], dict[str, Any]]
"""Maps a model, or None for the gateway, to the options that place its replicas."""


def serve_config(
    platform: PlatformConfig, *, host: str = "127.0.0.1", port: int = HTTP_PORT
) -> dict[str, Any]:
    """Return the Serve config of a platform on one machine, which has no pools."""
    return _serve_config(platform, host, port, _local_placement)


def cluster_serve_config(platform: PlatformConfig) -> dict[str, Any]:
    """Return the Serve config of a platform on a cluster: KubeRay's `serveConfigV2`.

    The chart renders the same in `templates/_serve-config.tpl`; a test compares them.

    Raises:
        ConfigError: models cannot run on a cluster; one line for each, with its path.
    """
    faults = []
    for name, model in platform.deployed_models().items():
        if model.engine.kind == "vllm" and not model.pool:
            faults.append(f"models.{name}.pool: is missing; on a cluster a vllm model needs one")
        if model.weights is not None and model.weights.scheme == "demo":
            faults.append(f"models.{name}.source: demo:// is for one machine")
    if faults:
        raise ConfigError("\n".join(faults))
    # Inside a pod the gateway listens on all interfaces; the NetworkPolicy restricts access.
    return _serve_config(platform, "0.0.0.0", HTTP_PORT, _cluster_placement)  # noqa: S104


def _serve_config(
    platform: PlatformConfig, host: str, port: int, placement: Placement
) -> dict[str, Any]:
    return {
        "proxy_location": "EveryNode",
        "http_options": {"host": host, "port": port},
        # Logging each request in each replica costs 4 % of a short request's CPU; metrics count
        # them.
        "logging_config": {"enable_access_log": False},
        "applications": _applications(platform, placement),
    }


def applications(platform: PlatformConfig, *, on_cluster: bool) -> dict[str, dict[str, Any]]:
    """Return the applications of a platform's Serve config, by name, without validating them."""
    placement = _cluster_placement if on_cluster else _local_placement
    return {each["name"]: each for each in _applications(platform, placement)}


def _applications(platform: PlatformConfig, placement: Placement) -> list[dict[str, Any]]:
    models, drain_s = platform.deployed_models(), platform.gateway.requests.drain_seconds
    return [
        *(_model_application(name, model, placement, drain_s) for name, model in models.items()),
        _gateway_application(platform, models, placement),
    ]


def _local_placement(_: ModelConfig | None) -> dict[str, Any]:
    return {"ray_actor_options": {"num_cpus": 1}}


def _cluster_placement(model: ModelConfig | None) -> dict[str, Any]:
    pool = {pool_resource(model.pool if model and model.pool else CPU_POOL): POOL_SHARE}
    if model is None:
        # With two in a pod, one lost node would take more gateways than it need.
        return {
            "ray_actor_options": {"num_cpus": 1, "resources": pool},
            "max_replicas_per_node": 1,
        }
    if not model.pool:
        return {"ray_actor_options": {"num_cpus": 1, "resources": pool}}
    if model.gpus == 1:
        part = model.gpu_sharing.gpu_part
        return {"ray_actor_options": {"num_cpus": 1, "num_gpus": part, "resources": pool}}
    # vLLM wants a bundle per GPU; the replica itself is in the first one and holds no GPU.
    bundle = {"GPU": 1, **pool}
    return {
        "ray_actor_options": {"num_cpus": 1},
        "placement_group_bundles": [{"CPU": 1, **bundle}, *[bundle] * (model.gpus - 1)],
        "placement_group_strategy": "STRICT_PACK" if model.parallelism.pipeline == 1 else "PACK",
    }


def _model_application(
    name: str, model: ModelConfig, placement: Placement, drain_s: float
) -> dict[str, Any]:
    values = model.file_form()
    return {
        "name": application_name(name),
        "import_path": "tera.deploy:build_model",
        "route_prefix": None,
        # Only settings that must reload the engine: Serve rolls the application when these change.
        "args": {key: values[key] for key in _RELOADING},
        "deployments": [
            {
                "name": ENGINE_DEPLOYMENT,
                "autoscaling_config": {
                    **_autoscaling(model.replicas, model.scaling),
                    "policy": SCALING_POLICY,
                },
                "max_ongoing_requests": model.scaling.max_ongoing_requests,
                # Applied in place, unlike `args`; see `EngineReplica.reconfigure`.
                "user_config": {"drainSeconds": drain_s},
                **placement(model),
                **_lifecycle(drain_s),
            }
        ],
    }


def _gateway_application(
    platform: PlatformConfig, models: dict[str, ModelConfig], placement: Placement
) -> dict[str, Any]:
    gateway = platform.gateway
    scaling = Scaling(target_ongoing_requests=GATEWAY_TARGET_ONGOING_REQUESTS)
    return {
        "name": GATEWAY_APPLICATION,
        "import_path": "tera.deploy:build_gateway",
        "route_prefix": "/",
        "args": {},
        "deployments": [
            {
                "name": GATEWAY_DEPLOYMENT,
                "autoscaling_config": _autoscaling(gateway.replicas, scaling),
                "max_ongoing_requests": GATEWAY_ONGOING_REQUESTS,
                **placement(None),
                "user_config": {
                    "models": {name: model.file_form() for name, model in models.items()},
                    "gateway": gateway.file_form(exclude_none=True, exclude=_NOT_RELOADED),
                },
                **_lifecycle(gateway.requests.drain_seconds),
            }
        ],
    }


def _autoscaling(replicas: ReplicaBounds, scaling: Scaling) -> dict[str, Any]:
    """Return Serve's autoscaling section: only numbers, so that every edit is applied in place."""
    return {
        "min_replicas": replicas.min,
        "max_replicas": replicas.max,
        "target_ongoing_requests": scaling.target_ongoing_requests,
        "upscale_delay_s": scaling.upscale_delay_seconds,
        "downscale_delay_s": scaling.downscale_delay_seconds,
        "downscale_to_zero_delay_s": scaling.downscale_to_zero_delay_seconds,
        **SCALING_METRICS,
    }


def _lifecycle(drain_s: float) -> dict[str, Any]:
    return {
        "health_check_period_s": HEALTH_CHECK_PERIOD_S,
        "health_check_timeout_s": HEALTH_CHECK_TIMEOUT_S,
        "graceful_shutdown_timeout_s": drain_s,
    }


def values_schema() -> str:
    """Return the chart's `values.schema.json`, against which Helm checks values."""
    dialect = "https://json-schema.org/draft/2020-12/schema"
    schema = _tidy(PlatformConfig.model_json_schema(by_alias=True))
    return json.dumps({"$schema": dialect, **schema}, indent=2) + "\n"


def _tidy(schema: Any) -> Any:
    """Return a schema without pydantic's redundant parts, in which every map's keys are checked."""
    if isinstance(schema, list):
        return [_tidy(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    # A property may be named "title"; then its value is a schema.
    repeated = {"default"} if "$ref" in schema else set()
    if isinstance(schema.get("title"), str):
        repeated.add("title")
    tidy = {key: _tidy(value) for key, value in schema.items() if key not in repeated}
    return {**tidy, "additionalProperties": False} if "patternProperties" in tidy else tidy

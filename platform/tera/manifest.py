"""From one `PlatformConfig` to what other systems read: Ray Serve's configuration."""

from typing import Any

from tera.config import ModelConfig, PlatformConfig, ReplicaBounds, Scaling

HTTP_PORT = 8000

# The names that `tera.deploy` and `tera.gateway.deployment` give; a test holds them together.
GATEWAY_APPLICATION, GATEWAY_DEPLOYMENT, ENGINE_DEPLOYMENT = "gateway", "Gateway", "Engine"

GATEWAY_ONGOING_REQUESTS = 10_000
"""Streams of one gateway replica; a bound for memory, not a queue (admission is per model)."""
GATEWAY_TARGET_ONGOING_REQUESTS = 200

HEALTH_CHECK_PERIOD_S, HEALTH_CHECK_TIMEOUT_S = 2, 10
"""Serve replaces a replica after three failed checks: a stalled engine is gone in seconds."""
DRAIN_S = 30


def serve_config(
    platform: PlatformConfig,
    *,
    host: str = "0.0.0.0",  # noqa: S104  see below
    port: int = HTTP_PORT,
) -> dict[str, Any]:
    """Return the Serve config (KubeRay's `serveConfigV2`) of a platform.

    Inside a pod the gateway listens on all interfaces; the NetworkPolicy says who reaches it.
    """
    models = platform.deployed_models()
    return {
        "proxy_location": "EveryNode",
        "http_options": {"host": host, "port": port},
        # A line per request and replica costs 4 % of a short request's CPU; the metrics count them.
        "logging_config": {"enable_access_log": False},
        "applications": [
            *(_model_application(name, model) for name, model in models.items()),
            _gateway_application(platform, models),
        ],
    }


def _model_application(name: str, model: ModelConfig) -> dict[str, Any]:
    values = model.model_dump(mode="json", by_alias=True)
    return {
        "name": f"model-{name}",
        "import_path": "tera.deploy:build_model",
        "route_prefix": None,
        # Only what must reload the engine: Serve rolls the application when these change.
        "args": {key: values[key] for key in ("source", "engine", "parallelism")},
        "deployments": [
            {
                "name": ENGINE_DEPLOYMENT,
                "autoscaling_config": _autoscaling(model.replicas, model.scaling),
                "max_ongoing_requests": model.scaling.max_ongoing_requests,
                "ray_actor_options": {"num_cpus": 1},
                **_lifecycle(),
            }
        ],
    }


def _gateway_application(
    platform: PlatformConfig, models: dict[str, ModelConfig]
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
                "ray_actor_options": {"num_cpus": 1},
                "user_config": {
                    "models": {
                        name: model.model_dump(mode="json", by_alias=True)
                        for name, model in models.items()
                    },
                    "gateway": gateway.model_dump(mode="json", by_alias=True, exclude={"replicas"}),
                },
                **_lifecycle(),
            }
        ],
    }


def _autoscaling(replicas: ReplicaBounds, scaling: Scaling) -> dict[str, Any]:
    """Return Serve's autoscaling section: numbers only, so that every edit applies in place."""
    return {
        "min_replicas": replicas.min,
        "max_replicas": replicas.max,
        "target_ongoing_requests": scaling.target_ongoing_requests,
        "upscale_delay_s": scaling.upscale_delay_seconds,
        "downscale_delay_s": scaling.downscale_delay_seconds,
        "downscale_to_zero_delay_s": scaling.downscale_to_zero_delay_seconds,
    }


def _lifecycle() -> dict[str, Any]:
    return {
        "health_check_period_s": HEALTH_CHECK_PERIOD_S,
        "health_check_timeout_s": HEALTH_CHECK_TIMEOUT_S,
        "graceful_shutdown_timeout_s": DRAIN_S,
    }

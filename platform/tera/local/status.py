"""What a running platform is doing, read from Ray Serve and its replicas."""

from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

from redis import Redis
from redis.exceptions import RedisError

from tera.local.cluster import attached
from tera.local.state import LocalSecrets, LocalState
from tera.manifest import ENGINE_DEPLOYMENT, GATEWAY_APPLICATION, GATEWAY_DEPLOYMENT

ANSWER_TIMEOUT_S = 3.0
STARTING = {"STARTING", "RECOVERING"}
"""States of a replica that is not ready yet."""


def read_status(state: LocalState, secrets: LocalSecrets) -> dict[str, Any]:
    """Return the models with their replicas, the gateway's replicas and Redis.

    Raises:
        ConfigError: Ray does not answer.
    """
    with attached(state, secrets) as client:
        applications = client.get_serve_details()["applications"]
        gateway = applications.get(GATEWAY_APPLICATION, {})
        catalog = _catalog(gateway)
        return {
            "models": [_model(name, values, applications) for name, values in catalog.items()],
            "gateway": [
                {"replica_id": replica["replica_id"], "pid": replica.get("pid")}
                for replica in _replicas(gateway, GATEWAY_DEPLOYMENT)
            ],
            "redis": _redis(state),
        }


def _catalog(gateway: dict[str, Any]) -> dict[str, Any]:
    """Return the models as the gateway was told them, in its order."""
    config = _deployment(gateway, GATEWAY_DEPLOYMENT).get("deployment_config") or {}
    models: dict[str, Any] = (config.get("user_config") or {}).get("models", {})
    return models


def _replicas(application: dict[str, Any], deployment: str) -> list[dict[str, Any]]:
    """Return what Serve knows of the replicas; one that is starting may have no `pid` yet."""
    replicas: list[dict[str, Any]] = _deployment(application, deployment).get("replicas", [])
    return replicas


def _deployment(application: dict[str, Any], deployment: str) -> dict[str, Any]:
    found: dict[str, Any] = application.get("deployments", {}).get(deployment, {})
    return found


def _model(name: str, values: dict[str, Any], applications: dict[str, Any]) -> dict[str, Any]:
    application_name = f"model-{name}"
    application = applications.get(application_name, {})
    replicas = _replicas(application, ENGINE_DEPLOYMENT)
    running = [replica for replica in replicas if replica["state"] == "RUNNING"]
    if running:
        status = "ready"
    elif application.get("status") == "DEPLOY_FAILED":
        status = "failed"
    elif values["replicas"]["min"] == 0 and not replicas:
        status = "scaled_to_zero"
    else:
        status = "starting"
    loads = _loads(application_name) if running else {}
    return {
        "name": name,
        "id": values["id"],
        "status": status,
        "wanted": _deployment(application, ENGINE_DEPLOYMENT).get("target_num_replicas", 0),
        "running": len(running),
        "starting": sum(replica["state"] in STARTING for replica in replicas),
        "replicas": [
            {
                "replica_id": replica["replica_id"],
                "pid": replica.get("pid"),
                "running": loads.get(replica["replica_id"], {}).get("running"),
                "waiting": loads.get(replica["replica_id"], {}).get("waiting"),
                "asleep": loads.get(replica["replica_id"], {}).get("asleep"),
                "draining": replica["state"] == "STOPPING",
            }
            for replica in replicas
        ],
    }


def _loads(application: str) -> dict[str, dict[str, Any]]:
    """Return what each replica says of itself; one that does not answer is left out."""
    from ray import serve

    handle: Any = serve.get_deployment_handle(ENGINE_DEPLOYMENT, application)
    # Whatever Ray raises, the table shows what there is.
    with suppress(Exception):
        answers = handle.broadcast("status").results(
            timeout_s=ANSWER_TIMEOUT_S, return_exceptions=True
        )
        return {answer["replica_id"]: answer for answer in answers if isinstance(answer, dict)}
    return {}


def _redis(state: LocalState) -> dict[str, Any]:
    address = urlsplit(state.redis_url)
    client = Redis.from_url(state.redis_url, socket_timeout=ANSWER_TIMEOUT_S)
    try:
        client.ping()
        answers = "ok"
    except RedisError:
        answers = "away"
    finally:
        client.close()
    return {
        "address": f"{address.hostname}:{address.port}",
        "pid": state.redis_pid,
        "state": answers,
    }

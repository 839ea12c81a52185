"""The status of a running platform, which `tera serve` reports over a socket.

`tera serve` is connected to Ray anyway; another command would need a second of CPU to connect.
"""

import asyncio
import json
import logging
import socket
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

from redis import Redis
from redis.exceptions import RedisError

from tera.config.names import (
    ENGINE_DEPLOYMENT,
    GATEWAY_APPLICATION,
    GATEWAY_DEPLOYMENT,
    application_name,
)
from tera.errors import UnreachableError
from tera.gateway.model_status import model_status
from tera.local.gateway import ANSWER_TIMEOUT_S, engine_gauges, readiness
from tera.local.state import LocalState
from tera.upstream.ray_cluster import serve_client

_logger = logging.getLogger(__name__)

STATUS_TIMEOUT_S = 30.0
_LOAD = {
    "running": "tera_engine_running",
    "waiting": "tera_engine_waiting",
    "asleep": "tera_engine_asleep",
}
STARTING = {"STARTING", "RECOVERING"}
"""States of a replica that is not ready yet."""


def read_status(state: LocalState) -> dict[str, Any]:
    """Return the models with their replicas, the gateway's replicas and Redis.

    Raises:
        UnreachableError: the platform does not answer.
    """
    try:
        with socket.socket(socket.AF_UNIX) as asking:
            asking.settimeout(STATUS_TIMEOUT_S)
            asking.connect(str(state.status_socket))
            with asking.makefile("rb") as answer:
                found: dict[str, Any] = json.load(answer)
    except (OSError, ValueError) as error:
        raise UnreachableError(f"The platform at {state.base_url} does not answer.") from error
    return found


@asynccontextmanager
async def telling_status(state: LocalState) -> AsyncGenerator[None]:
    """Answer `read_status` while the block runs; this process must be connected to Ray."""
    turn = asyncio.Lock()

    async def tell(_: asyncio.StreamReader, answer: asyncio.StreamWriter) -> None:
        try:
            async with turn:
                found = await asyncio.to_thread(_status, state)
            answer.write(json.dumps(found).encode())
            await answer.drain()
        except Exception:  # the command gets no answer, and the platform goes on
            _logger.exception("The status cannot be reported")
        finally:
            answer.close()

    server = await asyncio.start_unix_server(tell, state.status_socket)
    try:
        yield
    finally:
        server.close()


def _status(state: LocalState) -> dict[str, Any]:
    applications = serve_client().get_serve_details()["applications"]
    gateway = applications.get(GATEWAY_APPLICATION, {})
    # From the gateway's metrics: a Serve handle in this process would have to be closed before Ray
    # is shut down; otherwise Ray's core crashes.
    gauges = engine_gauges(state.base_url)
    told = readiness(state.base_url)
    return {
        "models": [
            with_failure(_model(name, values, applications, gauges), told)
            for name, values in _catalog(gateway).items()
        ],
        "gateway": [
            {"replica_id": replica["replica_id"], "pid": replica.get("pid")}
            for replica in _replicas(gateway, GATEWAY_DEPLOYMENT)
        ],
        "redis": _redis(state),
    }


def _catalog(gateway: dict[str, Any]) -> dict[str, Any]:
    """Return the models in the gateway's configuration, in its order."""
    config = _deployment(gateway, GATEWAY_DEPLOYMENT).get("deployment_config") or {}
    models: dict[str, Any] = (config.get("user_config") or {}).get("models", {})
    return models


def _replicas(application: dict[str, Any], deployment: str) -> list[dict[str, Any]]:
    """Return the replicas that Serve knows; one that is starting may have no `pid` yet."""
    replicas: list[dict[str, Any]] = _deployment(application, deployment).get("replicas", [])
    return replicas


def _deployment(application: dict[str, Any], deployment: str) -> dict[str, Any]:
    found: dict[str, Any] = application.get("deployments", {}).get(deployment, {})
    return found


def _model(
    name: str,
    values: dict[str, Any],
    applications: dict[str, Any],
    gauges: dict[str, dict[str, int]],
) -> dict[str, Any]:
    application = applications.get(application_name(name), {})
    known = ENGINE_DEPLOYMENT in application.get("deployments", {})
    replicas = _replicas(application, ENGINE_DEPLOYMENT)
    states = Counter(replica["state"] for replica in replicas)
    status = model_status(
        application.get("status"),
        states if known else None,
        least_replicas=values["replicas"]["min"],
    )
    return {
        "name": name,
        "id": values["id"],
        "status": status,
        "wanted": _deployment(application, ENGINE_DEPLOYMENT).get("target_num_replicas", 0),
        "running": states["RUNNING"],
        "starting": sum(replica["state"] in STARTING for replica in replicas),
        "replicas": [
            {
                "replica_id": replica["replica_id"],
                "pid": replica.get("pid"),
                **_load(gauges.get(replica["replica_id"])),
                "draining": replica["state"] == "STOPPING",
            }
            for replica in replicas
        ],
    }


def with_failure(model: dict[str, Any], told: dict[str, Any]) -> dict[str, Any]:
    """Return a model's entry with why it has failed, if it has.

    Args:
        model: the entry as Serve knows it.
        told: the body of `/readyz`. A gateway may be unable to load a model whose replicas run.
    """
    failure = told.get("failures", {}).get(model["name"], "")
    listed = told.get("models", {})
    failed = listed.get(model["id"]) == "failed" or (failure and model["id"] not in listed)
    return {**model, "failure": failure, **({"status": "failed"} if failed else {})}


def _load(told: dict[str, int] | None) -> dict[str, Any]:
    if told is None:
        return dict.fromkeys(_LOAD)
    return {name: told[metric] for name, metric in _LOAD.items()} | {
        "asleep": bool(told[_LOAD["asleep"]])
    }


def _redis(state: LocalState) -> dict[str, Any]:
    address = urlsplit(state.redis_url)
    client = Redis.from_url(state.redis_url, socket_timeout=ANSWER_TIMEOUT_S)
    try:
        client.ping()
        answers = "ok"
    except RedisError:
        answers = "away"  # a status says no more than that
    finally:
        client.close()
    return {
        "address": f"{address.hostname}:{address.port}",
        "pid": state.redis_pid,
        "state": answers,
    }

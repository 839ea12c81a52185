"""Asks the gateway of this machine's platform for its state, over HTTP."""

import logging
from typing import Any, Final

import httpx
from prometheus_client.parser import text_string_to_metric_families

_logger = logging.getLogger(__name__)

ANSWER_TIMEOUT_S: Final = 5.0
"""Longer than the gateway waits for its replicas."""


def is_ready(base_url: str) -> bool:
    """Return whether `/readyz` says that it is, through HAProxy, as for clients' requests."""
    try:
        return _get(base_url, "/readyz").status_code == httpx.codes.OK
    except httpx.RequestError:
        return False  # the caller polls


def engine_gauges(base_url: str) -> dict[str, dict[str, int]]:
    """Return the gauges of each engine replica, by replica and metric.

    A replica that does not answer is left out; if the gateway does not, all are.
    """
    try:
        text = _get(base_url, "/metrics/all").text
    except httpx.RequestError as error:
        _logger.warning("The gateway does not answer with its metrics: %r", error)
        return {}
    ours = "\n".join(line for line in text.splitlines() if line.startswith("tera_engine_"))
    gauges: dict[str, dict[str, int]] = {}
    for family in text_string_to_metric_families(ours):
        for sample in family.samples:
            gauges.setdefault(sample.labels["replica"], {})[sample.name] = int(sample.value)
    return gauges


def readiness(base_url: str) -> dict[str, Any]:
    """Return the body of `/readyz`; empty if the gateway does not answer with one."""
    try:
        found = _get(base_url, "/readyz").json()
    except (httpx.RequestError, ValueError) as error:
        _logger.warning("The gateway does not answer with its readiness: %r", error)
        return {}
    return found if isinstance(found, dict) else {}


def _get(base_url: str, path: str) -> httpx.Response:
    # A proxy named in the environment is meant for other machines.
    return httpx.get(f"{base_url}{path}", timeout=ANSWER_TIMEOUT_S, trust_env=False)

"""What the gateway of the platform on this machine says over HTTP."""

import logging
from typing import Final

import httpx
from prometheus_client.parser import text_string_to_metric_families

_logger = logging.getLogger(__name__)

ANSWER_TIMEOUT_S: Final = 5.0
"""Above what the gateway gives its replicas."""


def is_ready(base_url: str) -> bool:
    """Return whether `/readyz` says so; it comes through HAProxy, as requests of clients do."""
    try:
        return _get(base_url, "/readyz").status_code == httpx.codes.OK
    except httpx.RequestError:
        return False  # whoever starts a platform asks again


def engine_gauges(base_url: str) -> dict[str, dict[str, int]]:
    """Return what each engine replica says of itself, by replica and metric.

    A replica that does not answer is left out, and so is every one if the gateway does not.
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


def _get(base_url: str, path: str) -> httpx.Response:
    # The environment may name a proxy, which is for other machines.
    return httpx.get(f"{base_url}{path}", timeout=ANSWER_TIMEOUT_S, trust_env=False)

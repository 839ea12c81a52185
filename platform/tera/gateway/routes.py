"""Every path that the gateway answers, in one table that everything else reads.

It gives the labels of metrics and of the ledger, and the paths of the chart's Ingress and
HTTPRoute; the tests of the OpenAPI document use it, and so do the checks that each generating route
is admitted and settled.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from tera.gateway.dialects.base import Dialect
from tera.gateway.dialects.chat import ChatQuestion
from tera.gateway.dialects.completions import CompletionQuestion

Audience = Literal["tenants", "operators"]


@dataclass(frozen=True, slots=True)
class ApiRoute:
    """One path and method."""

    path: str
    method: Literal["GET", "POST"]
    endpoint: str
    """Name of the handler; see `app.py`."""
    audience: Audience = "tenants"
    """Tenants present a key; operators' routes need none and are not reachable from outside."""
    dialect: Dialect | None = None
    """For a route that generates text: how to read its bodies and write its answers."""

    def matches(self, path: str) -> bool:
        """Return whether a path belongs to this route; parameters are never empty."""
        prefix, brace, _ = self.path.partition("{")
        return path.startswith(prefix) and path != prefix if brace else path == self.path


COMPLETIONS = ApiRoute("/v1/completions", "POST", "generate", dialect=CompletionQuestion)
CHAT = ApiRoute("/v1/chat/completions", "POST", "generate", dialect=ChatQuestion)
MODELS = ApiRoute("/v1/models", "GET", "models")
MODEL = ApiRoute("/v1/models/{id}", "GET", "model")
DOCUMENT = ApiRoute("/openapi.json", "GET", "document")
HEALTH = ApiRoute("/healthz", "GET", "healthz", "operators")
READY = ApiRoute("/readyz", "GET", "readyz", "operators")
METRICS = ApiRoute("/metrics", "GET", "metrics", "operators")
ALL_METRICS = ApiRoute("/metrics/all", "GET", "all_metrics", "operators")

ROUTES = (COMPLETIONS, CHAT, MODELS, MODEL, DOCUMENT, HEALTH, READY, METRICS, ALL_METRICS)
"""The most frequent requests come first."""

PathType = Literal["Exact", "Prefix"]
"""How an Ingress compares a path; a prefix ends where a segment does."""


def public_paths(routes: Iterable[ApiRoute] = ROUTES) -> dict[str, PathType]:
    """Return the paths that are reachable from outside: those of the tenants' routes.

    Everything below the first segment of such a path is reachable, so that a client with a wrong
    path gets the API's own error.
    """
    paths: dict[str, PathType] = {}
    for route in routes:
        if route.audience == "tenants":
            segment, _, rest = route.path.removeprefix("/").partition("/")
            paths[f"/{segment}"] = "Prefix" if rest else "Exact"
    return paths


OTHER = "other"
"""Label of every path that belongs to no route."""


def label(path: str, routes: Iterable[ApiRoute] = ROUTES) -> str:
    """Return a label with few possible values for an arbitrary path."""
    return next((route.path for route in routes if route.matches(path)), OTHER)

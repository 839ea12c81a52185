"""Every path that the gateway answers: the one list, which all who name routes read.

The labels of metrics and of the ledger, the OpenAPI document's tests and the checks that each
generating route is admitted and settled go by it.
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
    """Name of the function that answers; see `app.py`."""
    audience: Audience = "tenants"
    """Tenants show a key; what is for operators needs none and is not routed to the outside."""
    dialect: Dialect | None = None
    """Of a route that generates text: how its bodies are read and its answers written."""

    def matches(self, path: str) -> bool:
        """Return whether a path is this route's; parameters are never empty."""
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
"""The requests most often made come first."""

OTHER = "other"
"""Label of every path that is no route's."""


def label(path: str, routes: Iterable[ApiRoute] = ROUTES) -> str:
    """Return a label of few values for a path that may be anything."""
    return next((route.path for route in routes if route.matches(path)), OTHER)

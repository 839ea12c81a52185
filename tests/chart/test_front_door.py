"""A-5: what the chart's Ingress and HTTPRoute let through, held against the table of routes."""

from typing import Any
from urllib.parse import unquote

import pytest
from tests.chart.charts import one, render
from tests.chart.refusals import cluster

from tera.gateway.routes import ROUTES, public_paths

INGRESS = {"enabled": True, "host": "llm.example.com"}
HTTP_ROUTE = {"enabled": True, "parentRefs": [{"name": "public"}]}


def ingress_paths() -> dict[str, str]:
    """Return the paths of the Ingress, and how each is compared."""
    [rule] = one(render(cluster(ingress=INGRESS)), "Ingress")["spec"]["rules"]
    paths = rule["http"]["paths"]
    service = {"service": {"name": "prod-gateway", "port": {"number": 8000}}}
    assert all(path["backend"] == service for path in paths)
    return {path["path"]: path["pathType"] for path in paths}


def http_route_paths() -> dict[str, str]:
    """Return the same of the HTTPRoute; a rule without matches takes every path."""
    rules: list[dict[str, Any]] = one(render(cluster(httpRoute=HTTP_ROUTE)), "HTTPRoute")["spec"][
        "rules"
    ]
    everything = [{"path": {"type": "PathPrefix", "value": "/"}}]
    paths = [match["path"] for rule in rules for match in rule.get("matches", everything)]
    return {path["value"]: path["type"].removeprefix("Path") for path in paths}


FRONT_DOORS = pytest.mark.parametrize(
    "paths",
    [
        pytest.param(ingress_paths, id="ingress"),
        pytest.param(http_route_paths, id="http-route"),
    ],
)


def passes(path: str, paths: dict[str, str]) -> bool:
    """Return whether a path is let through, as Kubernetes compares: by whole segments."""
    return any(
        path == allowed or (kind == "Prefix" and path.startswith(f"{allowed.rstrip('/')}/"))
        for allowed, kind in paths.items()
    )


@FRONT_DOORS
def test_a5_the_front_door_has_the_paths_of_the_route_table(paths: Any) -> None:
    assert paths() == public_paths()


@FRONT_DOORS
@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.path)
def test_a5_tenants_routes_are_let_through_and_operators_are_not(paths: Any, route: Any) -> None:
    assert passes(route.path, paths()) == (route.audience == "tenants")


@FRONT_DOORS
@pytest.mark.parametrize(
    "path",
    [
        *("/%6detrics", "/metrics%2fall", "/%72eadyz", "/healthz/", "//metrics", "/METRICS"),
        *("/-/routes", "/%2d/routes", "/-%2froutes", "/-/healthz"),
        *("/", "/v1.metrics", "/V1/models"),
    ],
)
def test_a5_no_spelling_of_another_path_is_let_through(paths: Any, path: str) -> None:
    # Ingress controllers compare as it was sent, or decoded.
    assert not passes(path, paths())
    assert not passes(unquote(path), paths())

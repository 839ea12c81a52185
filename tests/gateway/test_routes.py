"""The one table of paths, held against all that answers, counts or describes them."""

import ast
import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from starlette.routing import Route
from tests.gateway.conftest import CALLER, MODEL, Client, Gateway

import tera
from tera.contract.openapi import openapi_document
from tera.errors import InvalidApiKeyError
from tera.gateway import routes
from tera.gateway.edge import Edge
from tera.gateway.routes import ROUTES, ApiRoute, label
from tera.tenancy.keys import ApiKey

GENERATING = [route for route in ROUTES if route.dialect is not None]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "One"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "One"}]},
}
"""What to ask of each route that generates; a new one has to be named here."""

EACH = [pytest.param(route, id=f"{route.method} {route.path}") for route in ROUTES]


class OneKey:
    """An `Authenticator` that knows one key."""

    def authenticate(self, authorization: str | None) -> ApiKey:
        if authorization != "Bearer known":
            raise InvalidApiKeyError("The API key is not valid.")
        return CALLER


def concrete(route: ApiRoute) -> str:
    return route.path.replace("{id}", MODEL)


def body(route: ApiRoute, **fields: Any) -> dict[str, Any] | None:
    if route.dialect is None:
        return None
    return {"model": MODEL, "max_tokens": 4, **BODIES[route.path], **fields}


async def status(gateway: Gateway, route: ApiRoute, key: str = "") -> int | None:
    client = Client(body(route))
    await gateway.request(client, route.method, concrete(route), key)
    return client.status


@pytest.mark.parametrize("route", EACH)
async def test_every_route_is_answered(gateway: Gateway, route: ApiRoute) -> None:
    assert await status(gateway, route) == 200


def test_the_application_has_these_routes_and_no_other(gateway: Gateway) -> None:
    assert isinstance(gateway.app, Edge)
    answered = set()
    for route in gateway.app._app.routes:  # type: ignore[attr-defined]  # FastAPI's
        assert isinstance(route, Route)
        answered |= {(method, route.path.replace(":path", "")) for method in route.methods or ()}
    assert answered - {("HEAD", route.path) for route in ROUTES} == {
        (route.method, route.path) for route in ROUTES
    }


@pytest.mark.parametrize("route", EACH)
async def test_h1_tenants_show_a_key_and_operators_need_none(route: ApiRoute) -> None:
    async with Gateway(keys=OneKey()) as gateway:
        assert await status(gateway, route, "known") == 200
        for key in ("", "unknown"):
            wanted = 401 if route.audience == "tenants" else 200
            assert await status(gateway, route, key) == wanted


def test_every_route_that_generates_has_a_body_here() -> None:
    assert BODIES.keys() == {route.path for route in GENERATING}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("route", GENERATING, ids=lambda route: route.path)
async def test_l3_what_generates_is_admitted_settled_and_counted_by_its_route(
    gateway: Gateway, route: ApiRoute, stream: bool
) -> None:
    client = Client(body(route, stream=stream))
    posting = asyncio.create_task(gateway.post(client, route.path))
    admitted: dict[str, object] = {}
    while not posting.done():
        admitted |= gateway.admitter.running
        await asyncio.sleep(0)
    await posting
    assert client.status == 200
    [record] = gateway.admitter.settled
    assert list(admitted) == [record.request_id]
    assert (record.route, record.status, record.completion_tokens) == (route.path, "finished", 4)
    text = gateway.metrics.exposition()
    assert f'tera_requests_total{{code="",model="one",route="{route.path}",status="200"}} 1' in text


@pytest.mark.parametrize(
    "route", [route for route in ROUTES if route.dialect is None], ids=lambda route: route.path
)
async def test_l3_what_generates_nothing_costs_nothing(gateway: Gateway, route: ApiRoute) -> None:
    assert await status(gateway, route) == 200
    assert gateway.admitter.settled == []


async def test_metrics_are_this_replicas_unless_all_are_asked_for(gateway: Gateway) -> None:
    told = {}
    for route in (routes.METRICS, routes.ALL_METRICS):
        client = Client()
        await gateway.request(client, "GET", route.path)
        [head] = [message for message in client.sent if "headers" in message]
        assert dict(head["headers"])[b"content-type"].startswith(b"text/plain")
        told[route] = client.body
    assert b"\ntera_usage_given_up 0.0\n" in told[routes.METRICS]
    assert b'\ntera_usage_given_up{replica="replica-1"} 0.0\n' in told[routes.ALL_METRICS]


def test_the_openapi_document_describes_these_routes_and_no_other() -> None:
    described = {
        (method.upper(), path): operation
        for path, operations in openapi_document()["paths"].items()
        for method, operation in operations.items()
    }
    assert described.keys() == {(route.method, route.path) for route in ROUTES}
    for route in ROUTES:
        keyless = described[route.method, route.path].get("security") == []
        assert keyless == (route.audience == "operators"), route.path


@pytest.mark.parametrize(
    ("path", "wanted"),
    [
        *((concrete(route), route.path) for route in ROUTES),
        ("/v1/models/a", "/v1/models/{id}"),
        ("/v1/models/a/b/c", "/v1/models/{id}"),
        ("/v1/models/a/", "/v1/models/{id}"),
        ("/v1/models/", "other"),
        ("/v1/models//", "/v1/models/{id}"),
        ("/v1/modelsx", "other"),
        ("/v1/models/{id}", "/v1/models/{id}"),
        ("/v1/completions/", "other"),
        ("/v1/completions/more", "other"),
        ("/V1/completions", "other"),
        ("//v1/completions", "other"),
        ("/metrics/", "other"),
        ("/metrics/alles", "other"),
        ("/", "other"),
        ("", "other"),
        ("/\x00", "other"),
        ("/{", "other"),
        ("other", "other"),
        ("/" + "x" * 10_000, "other"),
    ],
    ids=lambda text: text[:32] or "empty",
)
def test_labels_are_few_whatever_is_asked_for(path: str, wanted: str) -> None:
    assert label(path) == wanted


async def test_a_route_that_is_off_is_unknown_and_counted_as_such(gateway: Gateway) -> None:
    gateway.config = gateway.config.model_copy(update={"openapi": False})
    for method in ("GET", "POST", "OPTIONS"):
        client = Client()
        await gateway.request(client, method, routes.DOCUMENT.path)
        assert client.status == 404
        assert json.loads(client.body)["error"]["code"] == "unknown_url"
    text = gateway.metrics.exposition()
    assert f'route="{routes.DOCUMENT.path}"' not in text
    assert 'code="unknown_url",model="",route="other",status="404"} 3' in text


def imports(path: Path) -> set[str]:
    """Return the modules that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


PACKAGE = Path(tera.__file__).parent
DIALECTS = "tera.gateway.dialects"


def module(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)


def test_nobody_but_the_table_knows_which_dialects_there_are() -> None:
    own = {f"{DIALECTS}.{path.stem}" for path in (PACKAGE / "gateway/dialects").glob("[!_]*.py")}
    dialects = own - {f"{DIALECTS}.base", f"{DIALECTS}.openai"}  # what they are, and have in common
    assert {route.dialect.__module__ for route in GENERATING} == dialects
    for path in PACKAGE.rglob("*.py"):
        if module(path) == "tera.gateway.routes":
            continue
        known = imports(path) & own - {f"{DIALECTS}.base"}
        if module(path) in own:
            known -= {f"{DIALECTS}.openai"}
        assert known == set(), module(path)


def test_the_pipeline_knows_no_dialect_and_no_transport() -> None:
    known = {
        name
        for each in ("pipeline", "derender", "pieces", "request", "checks", "render")
        for name in imports(PACKAGE / f"gateway/{each}.py")
    }
    for forbidden in (DIALECTS, "tera.gateway.relay", "tera.gateway.app", "starlette", "fastapi"):
        assert not [name for name in known if name.startswith(forbidden)]

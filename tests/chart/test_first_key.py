"""How an operator gets the first API key of a release."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
from tests.chart.charts import notes, ray_templates, render
from tests.chart.refusals import cluster
from tests.tenancy.conftest import RedisServer
from typer.testing import CliRunner

from tera.cli import app
from tera.tenancy.keys import KEY_PATTERN

OWN_SECRET = {"gateway": {"auth": {"existingSecret": "own"}}}
SECRETS = {"own": {"key-pepper": "a pepper", "cluster-secret": "a secret"}}
COMMAND = "exec service/prod-gateway -- tera keys create --tenant admin"


@pytest.fixture
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with RedisServer.running(tmp_path_factory.mktemp("redis")) as server:
        yield server


def environment(container: dict[str, Any]) -> dict[str, str]:
    """Return a container's variables as Kubernetes sets them."""
    found: dict[str, str] = {}
    for each in container["env"]:
        if "value" in each:
            found[each["name"]] = re.sub(r"\$\((\w+)\)", lambda name: found[name[1]], each["value"])
        elif "secretKeyRef" in each["valueFrom"]:
            reference = each["valueFrom"]["secretKeyRef"]
            found[each["name"]] = SECRETS[reference["name"]][reference["key"]]
    return found


def test_a_gateways_pod_can_make_keys_with_an_operators_own_secret(redis: RedisServer) -> None:
    address = redis.url.removeprefix("redis://").removesuffix("/0")
    external = {"embedded": False, "external": {"address": address}}
    gateway = ray_templates(render(cluster(**OWN_SECRET, redis=external)))["cpu"]
    assert gateway["metadata"]["labels"]["app.kubernetes.io/component"] == "gateway"
    (container,) = gateway["spec"]["containers"]
    made = CliRunner().invoke(
        app, ["keys", "create", "--tenant", "admin"], env=environment(container)
    )
    assert made.exit_code == 0, made.output
    assert re.fullmatch(KEY_PATTERN, made.stdout.strip())


def test_notes_say_how_to_get_the_first_key() -> None:
    assert COMMAND in notes(cluster(**OWN_SECRET))
    assert COMMAND in notes(cluster(gateway={"auth": {"bootstrapKeys": False}}))
    assert COMMAND not in notes(cluster())

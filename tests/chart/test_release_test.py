"""What `helm test` runs."""

from typing import Any

import pytest
from tests.chart.charts import notes, one, render, values_file
from tests.chart.refusals import cluster, model
from typer.testing import CliRunner

from tera.cli import app

Object = dict[str, Any]

KEY: Object = {
    "name": "TERA_API_KEY",
    "valueFrom": {"secretKeyRef": {"name": "prod-keys", "key": "bootstrap-key"}},
}
ADDRESS: Object = {"name": "TERA_BASE_URL", "value": "http://prod-gateway:8000"}


def probe(values: Object) -> Object:
    """Return the container of the test."""
    (container,) = one(render(values), "Pod")["spec"]["containers"]
    found: Object = container
    return found


def test_it_asks_a_model_with_the_first_key() -> None:
    container = probe(cluster())
    assert container["command"] == ["tera", "probe", "--timeout", "720s"]
    assert container["env"] == [ADDRESS, KEY]


@pytest.mark.parametrize(
    "values",
    [
        pytest.param(cluster(gateway={"auth": {"bootstrapKeys": False}}), id="no first key"),
        pytest.param(
            cluster(gateway={"auth": {"existingSecret": "ours"}}), id="a Secret of others"
        ),
        pytest.param(values_file("production"), id="production"),
        pytest.param(cluster(models={}), id="no model"),
        pytest.param(cluster(models={"one": model(replicas={"max": 0})}), id="no model deployed"),
    ],
)
def test_without_a_key_or_a_model_it_asks_whether_the_gateway_is_ready(values: Object) -> None:
    container = probe(values)
    assert container["command"] == ["tera", "probe", "--ready-only"]
    assert container["env"] == [ADDRESS]


def test_it_waits_for_the_slowest_cold_start_and_the_answer() -> None:
    models = {
        "one": model(scaling={"coldStartDeadlineSeconds": 1800.5}),
        "two": model(id="two"),
        "off": model(id="off", enabled=False, scaling={"coldStartDeadlineSeconds": 9000}),
    }
    gateway = {"requests": {"firstTokenDeadlineSeconds": 30}}
    container = probe(cluster(models=models, gateway=gateway))
    assert container["command"][-1] == "1831s"


@pytest.mark.parametrize("values", [cluster(), cluster(models={})], ids=["model", "no model"])
def test_the_command_is_one_that_tera_takes(
    values: Object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERA_BASE_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("TERA_API_KEY", "sk-tera-of-no-account")
    result = CliRunner().invoke(app, probe(values)["command"][1:])
    assert result.exit_code == 1
    assert "http://127.0.0.1:1 cannot be reached" in result.stderr


def test_its_log_outlives_it() -> None:
    # `helm test --logs` reads it after the pods that a policy deletes are deleted (helm#9098).
    annotations = one(render(cluster()), "Pod")["metadata"]["annotations"]
    assert annotations["helm.sh/hook-delete-policy"] == "before-hook-creation"


def test_notes_say_how_to_run_it_and_what_to_ask_before_an_edit() -> None:
    said = notes(cluster())
    assert "helm test prod --namespace llm --logs" in said
    assert "tera plan -f values.yaml --against live.yaml" in said


def test_notes_say_how_to_see_a_cluster_that_does_not_take_over() -> None:
    assert "get rayservice prod -o jsonpath='{.status.pendingServiceStatus}'" in notes(cluster())

"""What Tera starts Ray and Ray Serve with, against the installed ones."""

import inspect
import re
from pathlib import Path

import pytest
from ray._private import ray_constants, services
from ray._private.worker import Worker
from ray.serve import context
from ray.serve._private import client, constants
from tests.chart.charts import CHART

from tera.upstream.ray_cluster import ON_LOOPBACK, REQUIRED, Ports, serve_environment

SERVE = Path(constants.__file__).parents[1]
SET = serve_environment("haproxy", Path("/scratch"), Ports(1, 2, 3, 4, 5, 6, 7), 600)


def _of_the_chart() -> set[str]:
    templates = "\n".join(path.read_text() for path in CHART.glob("templates/*.tpl"))
    return set(re.findall(r"RAY_SERVE_\w+", templates))


@pytest.mark.parametrize("name", sorted({*SET, *_of_the_chart()} - {"RAY_worker_niceness"}))
def test_serve_reads_what_it_is_set_to(name: str) -> None:
    assert any(name in path.read_text() for path in (SERVE / "_private").glob("*.py"))


def test_the_chart_sets_what_is_required_everywhere() -> None:
    assert REQUIRED.keys() <= _of_the_chart()


def test_ray_can_be_kept_on_the_loopback_interface() -> None:
    assert ON_LOOPBACK == {ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR: "0"}
    source = inspect.getsource(services.get_node_ip_address)
    assert "if not ray_constants.ENABLE_RAY_CLUSTER" in source
    assert "return get_localhost_ip()" in source


def test_serve_has_a_client_that_deploys_and_tells_details() -> None:
    assert "_get_global_client" in vars(context)
    assert (
        list(inspect.signature(client.ServeControllerClient.deploy_apps).parameters)[1] == "config"
    )
    assert callable(client.ServeControllerClient.get_serve_details)


def test_ray_prints_from_threads_that_can_be_told_to_stop() -> None:
    source = inspect.getsource(inspect.getmodule(Worker))  # type: ignore[arg-type]
    assert "threads_stopped" in source
    assert "worker.gcs_error_subscriber = " in source

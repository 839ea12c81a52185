from typing import Any

import pytest
from helm_python.errors import HelmError
from tests.chart.charts import render
from tests.chart.refusals import CLUSTER_ONLY, CROSS_FIELD, SHAPE, cluster, model


def refusal(values: Any, name: str = "prod") -> str:
    with pytest.raises(HelmError) as raised:
        render(values, name=name)
    return str(raised.value)


@pytest.mark.parametrize(("values", "beginning"), [*CROSS_FIELD, *CLUSTER_ONLY])
def test_chart_says_what_python_says(values: Any, beginning: str) -> None:
    lines = refusal(values).splitlines()
    assert any(line.strip().startswith(beginning) for line in lines), lines


@pytest.mark.parametrize(("values", "path"), SHAPE)
def test_schema_names_the_path(values: Any, path: str) -> None:
    text = refusal(values)
    # Helm names where it looked and, of an unknown key, the key beside it.
    *above, last = path.split(".")
    assert "/".join(above) in text
    assert last in text


def test_all_faults_are_told_at_once() -> None:
    text = refusal(cluster(models={"one": model(pool="a"), "two": model(id="y", pool="b")}))
    assert "models.one.pool: " in text
    assert "models.two.pool: " in text


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("a" * 41, id="long"),
        pytest.param("1a", id="digit"),
        pytest.param("a.b", id="dot"),
    ],
)
def test_name_that_kuberay_refuses_is_refused(name: str) -> None:
    assert "release name: " in refusal(cluster(), name=name)

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import pytest
from prometheus_client import Counter, Histogram
from tests.chart.charts import one, render, values_file
from tests.chart.refusals import cluster, model

from tera.errors import TeraError
from tera.generation import ReplicaLoad
from tera.observability import Metrics, load_exposition

OPERATIONS = (Path(__file__).parents[2] / "docs/operations.md").read_text()
MONITORED = {"observability": {"podMonitor": True, "rules": True}}
SCRAPED = {"job", "pod", "instance", "replica", "le"}
"""Labels that Prometheus, the gateway and histograms add."""

Rule = dict[str, Any]


def metrics() -> dict[str, set[str]]:
    """Return the series that a gateway shows, with the labels of each."""
    found: dict[str, set[str]] = {"up": set()}
    for metric in vars(Metrics()).values():
        if hasattr(metric, "_name"):
            kinds: dict[type, tuple[str, ...]] = {
                Counter: ("_total",),
                Histogram: ("_bucket", "_sum", "_count"),
            }
            for suffix in kinds.get(type(metric), ("",)):
                found[metric._name + suffix] = set(metric._labelnames)
    # Of `NewRayServiceMetricsManager` in KubeRay 1.7.
    of_a_service = {"name", "namespace", "uid", "condition"}
    found["kuberay_service_condition_upgrade_in_progress"] = of_a_service
    load = load_exposition("one", ReplicaLoad(running=0, waiting=0, kv_usage_ratio=0.0))
    for name in re.findall(r"^(\w+){", load, re.MULTILINE):
        found[name] = {"model"}
    return found


def error_codes(kind: type[TeraError] = TeraError) -> set[str]:
    return {kind.code}.union(*(error_codes(each) for each in kind.__subclasses__()))


def rules(values: Any, name: str = "prod") -> list[Rule]:
    groups = one(render(values, name), "PrometheusRule")["spec"]["groups"]
    return [rule for group in groups for rule in group["rules"]]


def parts(expression: Any) -> Iterator[Any]:
    """Return an expression with all that it is made of."""
    yield expression
    for name in ("expr", "lhs", "rhs", "vector_selector"):
        if hasattr(expression, name):
            yield from parts(getattr(expression, name))
    for argument in getattr(expression, "args", ()):
        yield from parts(argument)


def selectors(rule: Rule) -> list[Any]:
    expression = promql_parser.parse(rule["expr"])
    return [it for it in parts(expression) if isinstance(it, promql_parser.VectorSelector)]


ALL = rules(
    {**cluster(models={"one": model(), "idle": model(id="b", replicas={"min": 0})}), **MONITORED}
)
EACH = pytest.mark.parametrize("rule", ALL, ids=[rule["alert"] for rule in ALL])


def test_walk_finds_every_metric() -> None:
    for rule in ALL:
        found = {selector.name for selector in selectors(rule)}
        assert found == set(re.findall(r"\b(?:up|(?:tera|kuberay)_\w+)(?={)", rule["expr"]))
        assert found


@EACH
def test_metrics_and_labels_are_those_of_a_gateway(rule: Rule) -> None:
    shown = metrics()
    for selector in selectors(rule):
        assert selector.name in shown
        known = shown[selector.name] | SCRAPED
        assert {it.name for it in selector.matchers.matchers} <= known
    for part in parts(promql_parser.parse(rule["expr"])):
        if isinstance(part, promql_parser.AggregateExpr) and part.modifier is not None:
            labels = set().union(*(shown[it.name] for it in selectors(rule)))
            assert set(part.modifier.labels) <= labels | SCRAPED


@EACH
def test_codes_are_those_of_errors(rule: Rule) -> None:
    for selector in selectors(rule):
        for matcher in selector.matchers.matchers:
            if matcher.name == "code":
                assert set(matcher.value.split("|")) <= error_codes()


def test_failures_are_counted_by_every_code_that_is_the_platforms_fault() -> None:
    (failing,) = [rule for rule in ALL if rule["alert"] == "TeraRequestsFailing"]
    counted = {
        code
        for selector in selectors(failing)
        for matcher in selector.matchers.matchers
        if matcher.name == "code"
        for code in matcher.value.split("|")
    }

    def faults(kind: type[TeraError] = TeraError) -> set[str]:
        own = {kind.code} if kind.status >= 500 else set()
        return own.union(*(faults(each) for each in kind.__subclasses__()))

    assert counted == faults()


@EACH
def test_alerts_are_of_one_release(rule: Rule) -> None:
    for selector in selectors(rule):
        if selector.name.startswith("kuberay_"):
            labels = {it.name: it.value for it in selector.matchers.matchers}
            assert (labels["namespace"], labels["name"]) == ("llm", "prod")
            continue
        jobs = [it.value for it in selector.matchers.matchers if it.name == "job"]
        # What the operator names the target of the PodMonitor `prod-gateway`.
        assert jobs == ["llm/prod-gateway"]


@EACH
def test_alert_says_what_and_how_bad(rule: Rule) -> None:
    assert rule["labels"]["severity"] in ("critical", "warning")
    assert rule["annotations"]["summary"]
    assert rule["alert"].startswith("Tera")
    # Prometheus fills these in; what Helm took for its own would be gone.
    assert rule["annotations"]["summary"].count("{{") == rule["annotations"]["summary"].count("}}")


def test_podmonitor_makes_the_job() -> None:
    objects = render({**cluster(), **MONITORED})
    monitor = one(objects, "PodMonitor", "prod-gateway")
    assert [it["path"] for it in monitor["spec"]["podMetricsEndpoints"]] == ["/metrics/all"]


def test_only_models_that_are_always_there_are_missed() -> None:
    missed = [rule for rule in ALL if rule["alert"] == "TeraModelWithoutReplica"]
    assert [(rule["labels"]["model"], rule["for"]) for rule in missed] == [("one", "600s")]


def test_upgrade_is_stuck_half_an_hour_after_the_slowest_start() -> None:
    slow = model(id="b", scaling={"coldStartDeadlineSeconds": 1200.5})
    values = {**cluster(models={"one": model(), "slow": slow}), **MONITORED}
    (stuck,) = [rule for rule in rules(values) if rule["alert"] == "TeraUpgradeStuck"]
    assert stuck["for"] == "3001s"


def test_first_token_is_slow_from_a_bucket_of_its_histogram() -> None:
    (slow,) = [rule for rule in ALL if rule["alert"] == "TeraFirstTokenSlow"]
    comparison = promql_parser.parse(slow["expr"])
    assert isinstance(comparison, promql_parser.BinaryExpr)
    threshold_s = comparison.rhs
    assert isinstance(threshold_s, promql_parser.NumberLiteral)
    buckets = Metrics().first_token_s._upper_bounds
    assert threshold_s.val in buckets
    assert math.isinf(buckets[-1])


def test_every_alert_is_in_the_operations_page_and_no_other() -> None:
    documented = re.findall(r"^\| `(Tera\w+)`", OPERATIONS, re.MULTILINE)
    assert sorted(documented) == sorted({rule["alert"] for rule in ALL})


def test_no_rules_unless_they_are_wanted() -> None:
    kinds = {each["kind"] for each in render(values_file("small"))}
    assert "PrometheusRule" not in kinds

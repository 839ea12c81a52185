import json
import logging
import math

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from tera.observability import JsonLines, Metrics, merge_expositions


def samples(text: str) -> list[Sample]:
    return [sample for family in text_string_to_metric_families(text) for sample in family.samples]


def total(text: str, name: str, **labels: str) -> float:
    """Return what `sum(name{labels})` is in PromQL."""
    return math.fsum(
        sample.value
        for sample in samples(text)
        if sample.name == name and labels.items() <= sample.labels.items()
    )


def replica_text(requests: int) -> str:
    metrics = Metrics()
    metrics.requests.labels("demo", "/v1/completions", "200", "").inc(requests)
    metrics.redis_degraded.set(0)
    for _ in range(requests):
        metrics.first_token_s.labels("demo").observe(0.03)
    return metrics.exposition()


def test_merged_text_parses_and_sums_over_replicas_are_right() -> None:
    text = merge_expositions([("gateway-1", replica_text(3)), ("gateway-2", replica_text(4))])
    assert total(text, "tera_requests_total", model="demo", status="200") == 7
    assert total(text, "tera_requests_total", replica="gateway-1") == 3
    assert total(text, "tera_time_to_first_token_seconds_count") == 7
    assert total(text, "tera_time_to_first_token_seconds_bucket", le="0.05") == 7
    assert total(text, "tera_time_to_first_token_seconds_bucket", le="0.025") == 0


def test_every_sample_has_its_replica_and_none_is_there_twice() -> None:
    text = merge_expositions([("a", replica_text(1)), ("b", replica_text(1))])
    found = samples(text)
    assert {sample.labels["replica"] for sample in found} == {"a", "b"}
    identities = [(each.name, tuple(sorted(each.labels.items()))) for each in found]
    assert len(set(identities)) == len(identities)


def test_each_family_is_one_group_with_one_header() -> None:
    text = merge_expositions([("a", replica_text(1)), ("b", replica_text(2))])
    types = [line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")]
    assert len(types) == len(set(types))
    helps = [line.split()[2] for line in text.splitlines() if line.startswith("# HELP")]
    assert helps == types
    assert text.endswith("\n")


def test_families_that_only_one_replica_has_are_kept() -> None:
    registry = CollectorRegistry()
    Gauge("vllm:kv_cache_usage_perc", "Of an engine only.", registry=registry).set(0.25)
    parts = [("gateway", replica_text(1)), ("engine", generate_latest(registry).decode())]
    text = merge_expositions(parts)
    assert total(text, "vllm:kv_cache_usage_perc", replica="engine") == 0.25
    assert total(text, "tera_requests_total", replica="gateway") == 1


@pytest.mark.parametrize(
    "value",
    [
        pytest.param('a "quoted" word', id="quotes"),
        pytest.param("back\\slash", id="backslash"),
        pytest.param("two\nlines", id="newline"),
        pytest.param("{curly} and , comma", id="curly"),
        pytest.param("closing } and space", id="closing"),
        pytest.param("日本 ü", id="unicode"),
        pytest.param("", id="empty"),
    ],
)
def test_label_values_survive_merging(value: str) -> None:
    registry = CollectorRegistry()
    Counter("tera_things", "Things.", ["name", "other"], registry=registry).labels(value, "x").inc(
        5
    )
    text = merge_expositions([("a", generate_latest(registry).decode())])
    counted = [each for each in samples(text) if each.name == "tera_things_total"]
    assert [(each.labels, each.value) for each in counted] == [
        ({"replica": "a", "name": value, "other": "x"}, 5)
    ]


def test_values_that_are_no_plain_numbers_survive_merging() -> None:
    registry = CollectorRegistry()
    gauge = Gauge("tera_level", "A level.", ["name"], registry=registry)
    for name, value in {"up": math.inf, "down": -math.inf, "tiny": 1e-9}.items():
        gauge.labels(name).set(value)
    Histogram("tera_wait_seconds", "Waits.", buckets=[1.0], registry=registry).observe(3)
    text = merge_expositions([("a", generate_latest(registry).decode())])
    levels = {each.labels["name"]: each.value for each in samples(text) if "name" in each.labels}
    assert levels == {"up": math.inf, "down": -math.inf, "tiny": 1e-9}
    assert total(text, "tera_wait_seconds_bucket", le="+Inf") == 1


def test_replica_without_metrics_changes_nothing() -> None:
    alone = merge_expositions([("a", replica_text(1))])
    assert (
        merge_expositions([("a", replica_text(1)), ("simulated", "")]).splitlines()[0]
        == (alone.splitlines()[0])
    )
    assert len(samples(merge_expositions([("simulated", "")]))) == 0


def test_exposition_holds_every_metric_of_the_process() -> None:
    families = {family.name for family in text_string_to_metric_families(Metrics().exposition())}
    assert "tera_requests" in families
    assert all(name.startswith("tera_") for name in families)


def test_a_log_line_is_one_json_object() -> None:
    record = logging.LogRecord("tera.x", logging.ERROR, "", 1, "two\nlines of %r", ("é",), None)
    line = json.loads(JsonLines().format(record))
    assert line.pop("at").endswith("Z")
    assert line == {"level": "error", "logger": "tera.x", "message": "two\nlines of 'é'"}
    assert "\n" not in JsonLines().format(record)

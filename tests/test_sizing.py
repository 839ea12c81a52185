import base64
import json
import math
import re
from pathlib import Path

import pytest
from tests.chart.charts import one, render

from tera.manifest import GATEWAY_TARGET_ONGOING_REQUESTS

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/sizing.md").read_text()
GIB = 2**30
ACTIVATIONS_GIB, USED_OF_A_GPU = 2, 0.92


def table(first: str) -> list[list[str]]:
    """Return the cells of the table whose head begins with these columns."""
    (found,) = re.findall(rf"^\| {re.escape(first)} .*\n\|[-|]+\n((?:\|.*\n)+)", PAGE, re.MULTILINE)
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in found.splitlines()]


def number(text: str) -> float:
    return float(re.sub(r"[^\d.]", "", text))


MODELS = {row[0]: list(map(number, row[1:])) for row in table("model | parameters")}


@pytest.mark.parametrize("model", list(MODELS))
def test_weights_and_cache_are_those_of_the_formula(model: str) -> None:
    parameters, layers, heads, size, weights_gib, kv_bytes = MODELS[model]
    assert weights_gib == round(parameters * 2 / GIB, 1)
    assert kv_bytes == 2 * layers * heads * size * 2


@pytest.mark.parametrize("row", table("model | GPU"), ids=lambda row: f"{row[0]} on {row[1]}")
def test_tokens_that_fit_are_those_of_the_formula(row: list[str]) -> None:
    parameters, _, heads, _, _, kv_bytes = MODELS[row[0]]
    gpu_gib, tensor, weights_gib, cache_gib, tokens = map(number, row[2:])
    assert heads % tensor == 0
    weights = parameters * 2 / GIB / tensor
    cache = USED_OF_A_GPU * gpu_gib - weights - ACTIVATIONS_GIB
    assert (weights_gib, cache_gib) == (round(weights, 1), round(cache, 1))
    assert tokens == round(cache * GIB * tensor / kv_bytes, -3)


def test_replicas_of_the_example_are_littles_law() -> None:
    seconds = 0.5 + 300 * 0.025
    assert f"take {seconds:g} s each: {12 * seconds:g} in\nflight" in PAGE
    assert math.ceil(12 * seconds / 16) == 6


def test_figures_of_redis_are_those_of_the_benchmark() -> None:
    measured = json.loads((ROOT / "benchmarks/results/limits.json").read_text())
    said = [number(figure) for _, figure in table("what | figure")]
    names = ("many_redis_requests_per_core_s", "tenant_open_bytes", "tenant_limits_bytes")
    assert said[:4] == [round(measured[name]) for name in (*names, "tenant_ledger_bytes")]
    assert said[1] + said[3] <= 6200
    assert f"costs Redis {measured['many_redis_cpu_ms']:.2f} ms" in PAGE


def test_memory_of_the_ledger_is_counted_as_the_formula_says() -> None:
    assert round((1000 * 6200 + 100_000 * 35 * 420) / 1e9, 1) == 1.5
    conf = one(render({}), "Secret", "prod-redis")["data"]["valkey.conf"]
    (limit_mb,) = re.findall(r"maxmemory (\d+)mb", base64.b64decode(conf).decode())
    assert f"{limit_mb} MB" in PAGE
    assert int(limit_mb) * 2**20 >= 50_000 * 35 * 420


def test_gateways_are_kept_at_what_serve_aims_at() -> None:
    assert f"keeps them at {GATEWAY_TARGET_ONGOING_REQUESTS} requests in flight each" in PAGE


def test_cores_of_the_example_are_those_of_the_formula() -> None:
    requests = 100 * (1.4 + 0.002 * 2000) / 1000
    tokens = [100 * 300 * us / 1e6 for us in (14, 53)]
    assert f"{requests:.2f} cores for the\nrequests and {tokens[0]:.2f} to {tokens[1]:.2f}" in PAGE

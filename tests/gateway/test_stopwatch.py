"""What is measured of the times at which an answer's tokens come."""

import time

import pytest
from starlette.types import Message

from tera.gateway.exchange import Exchange
from tera.gateway.stopwatch import GAPS_AT_ONCE, Stopwatch
from tera.generation import TokenDelta
from tera.observability import Metrics

ARRIVED = 100.0


async def _send(message: Message) -> None:
    raise AssertionError(message)


@pytest.fixture
def exchange() -> Exchange:
    return Exchange("req_1", "/v1/completions", ARRIVED, time.time(), _send)


def measured(metrics: Metrics, name: str) -> float:
    value = metrics.registry.get_sample_value(name, {"model": "m"})
    assert value is not None
    return value


@pytest.mark.parametrize("deliveries", [1, 2, GAPS_AT_ONCE, GAPS_AT_ONCE + 1, 3 * GAPS_AT_ONCE])
def test_each_gap_is_measured_by_the_end(
    monkeypatch: pytest.MonkeyPatch, exchange: Exchange, deliveries: int
) -> None:
    metrics = Metrics()
    stopwatch = Stopwatch(metrics, "m", exchange, first_sample=True)
    for number in range(deliveries):
        monkeypatch.setattr(time, "monotonic", lambda at=ARRIVED + 2 + number / 4: at)
        stopwatch.delivered(TokenDelta(1, [number], cached_tokens=7))
    stopwatch.tell()
    stopwatch.tell()  # which has nothing left to tell
    between = "tera_time_between_tokens_seconds"
    assert measured(metrics, f"{between}_count") == deliveries - 1
    assert measured(metrics, f"{between}_sum") == (deliveries - 1) / 4
    assert measured(metrics, "tera_time_to_first_token_seconds_sum") == 2
    assert (exchange.first_token_s, exchange.cached_tokens) == (2, 7)


def test_other_samples_of_a_prompt_count_its_cached_tokens_no_second_time(
    exchange: Exchange,
) -> None:
    Stopwatch(Metrics(), "m", exchange, first_sample=False).delivered(
        TokenDelta(1, [5], cached_tokens=7)
    )
    assert exchange.cached_tokens == 0

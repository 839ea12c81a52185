import pytest
from tests.test_probe import Impostor

from tera.local.gateway import engine_gauges, is_ready, readiness

NOBODY = "http://127.0.0.1:1"
METRICS = b"""\
# TYPE tera_requests_total counter
tera_requests_total{model="m"} 7.0
# TYPE tera_engine_running gauge
tera_engine_running{model="m",replica="one"} 2.0
tera_engine_running{model="m",replica="two"} 0.0
# TYPE tera_engine_waiting gauge
tera_engine_waiting{model="m",replica="one"} 5.0
"""


@pytest.mark.parametrize(("status", "ready"), [(200, True), (500, False)])
def test_a_gateway_is_ready_when_it_says_so(status: int, ready: bool) -> None:
    with Impostor({"/readyz": (status, {}, b"{}")}) as gateway:
        assert is_ready(gateway.base_url) is ready


def test_nobody_is_not_ready() -> None:
    assert not is_ready(NOBODY)


def test_no_proxy_of_the_environment_stands_between(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", NOBODY)
    with Impostor({"/readyz": (200, {}, b"{}")}) as gateway:
        assert is_ready(gateway.base_url)


def test_gauges_are_found_by_replica_and_metric() -> None:
    with Impostor({"/metrics/all": (200, {}, METRICS)}) as gateway:
        assert engine_gauges(gateway.base_url) == {
            "one": {"tera_engine_running": 2, "tera_engine_waiting": 5},
            "two": {"tera_engine_running": 0},
        }


def test_a_gateway_without_an_answer_has_no_gauges_and_a_line_in_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert engine_gauges(NOBODY) == {}
    assert "metrics" in caplog.text


def test_readiness_is_told_also_by_a_gateway_that_is_not_ready() -> None:
    with Impostor({"/readyz": (500, {}, b'{"failures": {"m": "It is gated."}}')}) as gateway:
        assert readiness(gateway.base_url) == {"failures": {"m": "It is gated."}}


@pytest.mark.parametrize("body", [b"<html>", b"[]"])
def test_another_answer_tells_nothing(body: bytes) -> None:
    with Impostor({"/readyz": (200, {}, body)}) as gateway:
        assert readiness(gateway.base_url) == {}
    assert readiness(NOBODY) == {}

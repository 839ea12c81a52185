"""Many gateway replicas at once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from redis import Redis as BlockingRedis
from tests.tenancy.limiting import (
    NOW_US,
    SECOND_US,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.tenancy.conftest import RedisServer


class Processes:
    """Four processes, each of which admits from many tasks."""

    def __init__(self) -> None:
        program = [sys.executable, str(Path(__file__).with_name("admitting.py"))]
        self._processes = [
            subprocess.Popen(  # noqa: S603  our own file
                program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            for _ in range(4)
        ]

    def admit(self, **order: Any) -> int:
        """Return how many requests passed in all of them."""
        for number, process in enumerate(self._processes):
            assert process.stdin is not None
            process.stdin.write(json.dumps({**order, "name": f"req-{number}"}) + "\n")
            process.stdin.flush()
        total = 0
        for process in self._processes:
            assert process.stdout is not None
            total += int(process.stdout.readline())
        return total

    def end(self) -> None:
        for process in self._processes:
            process.communicate()


@pytest.fixture(scope="module")
def processes() -> Iterator[Processes]:
    started = Processes()
    try:
        yield started
    finally:
        started.end()


@pytest.mark.parametrize(
    ("limits", "tokens", "expected"),
    [
        pytest.param({"requests_per_minute": 123}, 1, 123, id="requests"),
        pytest.param({"tokens_per_minute": 1000}, 7, 142, id="tokens"),
        pytest.param({"concurrent_requests": 77}, 1, 77, id="concurrency"),
        pytest.param({"token_budget": 1000}, 9, 111, id="budget"),
        pytest.param(
            {
                "requests_per_minute": 110,
                "tokens_per_minute": 999,
                "concurrent_requests": 105,
                "token_budget": 100_000,
                "budget_period": "day",
            },
            10,
            99,
            id="all",
        ),
    ],
)
def test_l2_four_processes_admit_exactly_the_limit(
    redis_server: RedisServer,
    processes: Processes,
    limits: dict[str, Any],
    tokens: int,
    expected: int,
) -> None:
    passed = processes.admit(
        url=redis_server.url, limits=limits, tokens=tokens, requests=100, now_us=NOW_US
    )
    assert passed == expected


def test_l2_four_processes_stay_within_the_limit_and_what_drains_meanwhile(
    redis_server: RedisServer, processes: Processes
) -> None:
    limit = 300
    with BlockingRedis.from_url(redis_server.url) as redis:
        began = redis.time()
        passed = processes.admit(
            url=redis_server.url,
            limits={"requests_per_minute": limit},
            tokens=1,
            requests=300,
            now_us=None,
        )
        ended = redis.time()
    took_us = (ended[0] - began[0]) * SECOND_US + ended[1] - began[1]
    assert limit <= passed <= limit + limit * took_us / (60 * SECOND_US)

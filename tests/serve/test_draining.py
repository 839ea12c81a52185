"""Replicas that go, asked or not, while streams run on them."""

import asyncio
import os
import signal

import psutil
import pytest
from benchmarks.streams import ask_all
from openai import AsyncOpenAI
from tests.serve.conftest import Platform, until
from tests.serve.load import (
    PACED,
    STEADY,
    Streams,
    apply,
    bounds,
    endless,
    faults,
    greedy,
    new_key,
    serving,
    told,
    undisturbed,
    used,
    values,
)

pytestmark = pytest.mark.slow

MODEL = PACED
GATEWAYS = 2
DRAIN_S = 8
"""In which a leaving replica's streams may finish."""
LONG_TOKENS = 500
"""Seventeen seconds more than `DRAIN_S`: they are not over yet, however late the replica leaves."""
SHORT_TOKENS = 100
"""Enough to be under way until whatever happens has happened."""
GRACE_S = 2
"""From SIGTERM to SIGKILL."""


def with_replicas(count: int) -> str:
    return values(
        {
            "replicas": bounds(count),
            "scaling": {"maxOngoingRequests": 256, "downscaleDelaySeconds": 0},
        },
        gateway={"replicas": bounds(GATEWAYS), "requests": {"drainSeconds": DRAIN_S}},
    )


@pytest.fixture(scope="module")
def platform(operated: Platform) -> Platform:
    operated.become(with_replicas(2))
    return operated


@pytest.fixture
def replicas(platform: Platform) -> list[int]:
    """The process ids of both replicas, whatever the test before has done to them."""

    def both() -> bool:
        return len(platform.replicas("paced")) == len(serving(platform, "paced")) == 2

    until(both, timeout_s=90)
    return serving(platform, "paced")


async def test_b6_a_replica_that_is_taken_away_finishes_or_hands_over(
    platform: Platform, replicas: list[int]
) -> None:
    long, short, new = range(8), range(8, 16), range(16, 24)
    bodies = [endless(MODEL, number, LONG_TOKENS) for number in long]
    bodies += [endless(MODEL, number, SHORT_TOKENS) for number in short]
    later = [endless(MODEL, number, 10) for number in new]
    expected, expected_later = (
        await undisturbed(platform, bodies),
        await undisturbed(platform, later),
    )
    switches = platform.sample("tera_replica_switches_total", model="paced")
    try:
        async with (
            Streams(platform, platform.api_key, bodies) as streams,
            asyncio.TaskGroup() as beside,
        ):
            beside.create_task(apply(platform, with_replicas(1)))

            def one_leaves() -> bool:
                return len(serving(platform, "paced")) == 1

            await asyncio.to_thread(until, one_leaves)
            (stays,) = serving(platform, "paced")
            answers_later = await ask_all(
                platform.port, platform.api_key, later, clients=len(later)
            )
            answers = await streams.answers()
        assert not faults([*answers, *answers_later])
        assert [answer.choices for answer in answers] == expected
        assert [answer.choices for answer in answers_later] == expected_later
        # Short streams finished where they were; the leaving replica's long ones moved.
        moved = platform.sample("tera_replica_switches_total", model="paced") - switches
        assert 1 <= moved <= len(long)

        def one_is_left() -> bool:
            return [each["pid"] for each in platform.replicas("paced")] == [stays]

        until(one_is_left, timeout_s=30)
    finally:
        await apply(platform, with_replicas(2))


async def test_b6_a_terminated_replicas_streams_go_on(
    platform: Platform, replicas: list[int]
) -> None:
    bodies = [endless(MODEL, number, SHORT_TOKENS) for number in range(20)]
    expected = await undisturbed(platform, bodies)
    async with Streams(platform, platform.api_key, bodies) as streams:
        victim = psutil.Process(replicas[0])
        victim.terminate()
        _, alive = await asyncio.to_thread(psutil.wait_procs, [victim], GRACE_S)
        for process in alive:
            process.kill()
        answers = await streams.answers()
    assert not faults(answers)
    assert [answer.choices for answer in answers] == expected


async def test_a_gateway_killed_under_load_costs_clients_their_own_retries(
    platform: Platform, replicas: list[int]
) -> None:
    bodies = [endless(MODEL, number, 80) for number in range(30)]
    later = greedy(STEADY, 30, 20)
    expected = await undisturbed(platform, bodies)
    [expected_later] = await undisturbed(platform, [later])
    victim = platform.status()["gateway"][0]["pid"]
    async with AsyncOpenAI(base_url=f"{platform.base_url}/v1", api_key=platform.api_key) as client:
        asked = [asyncio.create_task(client.completions.create(**body)) for body in bodies]

        def all_run() -> bool:
            return platform.sample("tera_engine_running", model="paced") == len(bodies)

        await asyncio.to_thread(until, all_run, timeout_s=20, every_s=0)
        os.kill(victim, signal.SIGKILL)
        async with asyncio.timeout(60):
            completions_later = [await client.completions.create(**later) for _ in range(20)]
            completions = await asyncio.gather(*asked)

            def replaced() -> bool:
                pids = {replica["pid"] for replica in platform.status()["gateway"]}
                return len(pids - {victim}) == GATEWAYS

            await asyncio.to_thread(until, replaced, timeout_s=60)
            completions_later += [await client.completions.create(**later) for _ in range(20)]
    assert not psutil.pid_exists(victim)
    assert [each.choices[0].text for each in completions] == [each[0].text for each in expected]
    texts_later = [each.choices[0].text for each in completions_later]
    assert texts_later == [expected_later[0].text] * 40


async def test_a_gateways_death_ends_no_streams_but_its_own(
    platform: Platform, replicas: list[int]
) -> None:
    until(lambda: len(platform.status()["gateway"]) == GATEWAYS, timeout_s=60)
    key = new_key(platform, "bereaved", gateways=GATEWAYS)
    bodies = [endless(MODEL, number, SHORT_TOKENS) for number in range(20)]
    expected = await undisturbed(platform, bodies)
    victim = platform.status()["gateway"][0]["pid"]
    async with Streams(platform, key, bodies) as streams:
        os.kill(victim, signal.SIGKILL)
        answers = await streams.answers()
    whole = [number for number, answer in enumerate(answers) if not answer.error]
    assert whole
    assert [answers[number].choices for number in whole] == [expected[number] for number in whole]
    # What the other gateway replica had to end counts as cancelled, what died with one as lost.
    until(lambda: used(platform, "bereaved")["requests"] >= len(whole), timeout_s=15)
    assert used(platform, "bereaved")["cancelled"] == 0


async def test_a_replica_dies_while_redis_is_away(platform: Platform, replicas: list[int]) -> None:
    until(lambda: len(platform.status()["gateway"]) == GATEWAYS, timeout_s=60)
    key = new_key(platform, "stranded", "--concurrent-requests", "100", gateways=GATEWAYS)
    bodies = [endless(MODEL, number, SHORT_TOKENS) for number in range(20)]
    later = [endless(MODEL, number, 10) for number in range(20, 30)]
    expected, expected_later = (
        await undisturbed(platform, bodies),
        await undisturbed(platform, later),
    )
    redis: int = platform.status()["redis"]["pid"]
    async with Streams(platform, key, bodies) as streams:
        os.kill(redis, signal.SIGSTOP)
        try:
            os.kill(replicas[0], signal.SIGKILL)
            answers_later = await ask_all(platform.port, key, later, clients=len(later))
            answers = await streams.answers()
        finally:
            os.kill(redis, signal.SIGCONT)
    assert not faults([*answers, *answers_later])
    assert [answer.choices for answer in answers] == expected
    assert [answer.choices for answer in answers_later] == expected_later
    paid = told([*answers, *answers_later])
    until(lambda: used(platform, "stranded") == paid, timeout_s=60)

"""More and fewer replicas, another version, none at all: no request fails on the way."""

import asyncio
import itertools
from functools import partial
from typing import Any

import httpx
import psutil
import pytest
from benchmarks.streams import Answer, StreamClient
from tests.serve.conftest import Platform, until
from tests.serve.load import (
    PACED,
    STEADY,
    Load,
    apply,
    bounds,
    faults,
    greedy,
    serving,
    undisturbed,
    values,
)

pytestmark = pytest.mark.slow

WAITING = 50
MOST = 4
"""Of the replicas that a model may grow to."""


def simulated(name: str, profile: dict[str, float], **others: Any) -> dict[str, Any]:
    engine = {"kind": "simulated", "args": {"profile": profile}}
    return {"id": f"sim/{name}", "engine": engine, **others}


SHARED = {"gpuSharing": {"replicasPerGpu": 2, "turnSeconds": 0.5}}
OTHERS = {
    "sleeper": simulated(
        "sleeper",
        {"startup_s": 4},
        replicas=bounds(0, 4),
        scaling={"targetOngoingRequests": 2 * WAITING, "upscaleDelaySeconds": 0},
    ),
    "one-of-two": simulated("one-of-two", {"decode_step_s": 0.01}, **SHARED),
    "two-of-two": simulated("two-of-two", {"decode_step_s": 0.01}, **SHARED),
}
QUICK_TO_SCALE = {
    "targetOngoingRequests": 2,
    "upscaleDelaySeconds": 0,
    "downscaleDelaySeconds": 2,
}


def with_paced(**paced: Any) -> str:
    return values(paced, gateway={"requests": {"keepAliveSeconds": 1}}, **OTHERS)


VALUES = with_paced(replicas=bounds(1, MOST), scaling=QUICK_TO_SCALE)
TWO = with_paced(replicas=bounds(2))
ROLLED = with_paced(**simulated("paced", {"decode_step_s": 0.04}), replicas=bounds(2))


@pytest.fixture(scope="module")
def platform(operated: Platform) -> Platform:
    operated.become(VALUES)
    return operated


async def becomes(platform: Platform, model: str, replicas: int) -> None:
    def so_many() -> bool:
        return len(platform.replicas(model)) == len(serving(platform, model)) == replicas

    await asyncio.to_thread(until, so_many, timeout_s=120, every_s=0.5)


async def test_a_model_grows_and_shrinks_under_load_without_an_error(platform: Platform) -> None:
    bodies = [greedy(PACED, number) for number in range(24)]
    expected = await undisturbed(platform, bodies)
    await becomes(platform, "paced", 1)
    async with Load(platform, bodies, clients=1) as one:
        async with Load(platform, bodies, clients=20) as many:
            await becomes(platform, "paced", MOST)
        await becomes(platform, "paced", 1)
    for load in (one, many):
        assert load.answers
        assert load.changed(expected) == []


async def test_another_version_of_a_model_takes_over_without_an_error(platform: Platform) -> None:
    await apply(platform, TWO)
    await becomes(platform, "paced", 2)
    bodies = [greedy(PACED, number) for number in range(10)]
    others = [greedy(STEADY, number) for number in range(10)]
    expected, expected_others = (
        await undisturbed(platform, bodies),
        await undisturbed(platform, others),
    )
    old, beside = serving(platform, "paced"), serving(platform, "steady")
    async with (
        Load(platform, bodies, clients=6) as load,
        Load(platform, others, clients=1) as other,
    ):
        await apply(platform, ROLLED)

        def taken_over() -> bool:
            there = {each["pid"] for each in platform.replicas("paced")}
            return there.isdisjoint(old) and len(serving(platform, "paced")) == len(there) == 2

        await asyncio.to_thread(until, taken_over, timeout_s=120, every_s=0.5)
    assert serving(platform, "steady") == beside
    assert load.changed(expected) == []
    assert other.changed(expected_others) == []


async def test_b3_fifty_requests_wake_a_model_once_and_are_all_answered(platform: Platform) -> None:
    def status() -> str:
        with platform.http() as http:
            models = http.get("/v1/models").json()["data"]
        (found,) = [model["status"] for model in models if model["id"] == "sim/sleeper"]
        return str(found)

    assert status() == "scaled_to_zero"
    seen: set[str] = set()
    statuses: list[str] = []

    def awake() -> bool:
        statuses.append(status())
        seen.update(each["replica_id"] for each in platform.replicas("sleeper"))
        return statuses[-1] == "ready"

    bodies = [greedy("sim/sleeper", number, 20) for number in range(WAITING)]
    async with httpx.AsyncClient(
        base_url=platform.base_url,
        headers={"authorization": f"Bearer {platform.api_key}"},
        timeout=120,
        limits=httpx.Limits(max_connections=WAITING),
    ) as http:

        async def stream(body: dict[str, Any]) -> Answer:
            async with StreamClient(platform.port, platform.api_key) as client:
                return await client.ask(body)

        streams = [asyncio.create_task(stream(body)) for body in bodies[::2]]
        whole = [
            asyncio.create_task(http.post("/v1/completions", json=body)) for body in bodies[1::2]
        ]
        await asyncio.to_thread(until, awake, timeout_s=60)
        async with asyncio.timeout(60):
            answers = await asyncio.gather(*streams)
            responses = await asyncio.gather(*whole)
    assert not faults(answers)
    assert all(answer.keep_alives for answer in answers)
    assert {response.status_code for response in responses} == {200}
    assert [name for name, _ in itertools.groupby(statuses)] in (
        ["scaled_to_zero", "starting", "ready"],
        ["starting", "ready"],
    )
    seen.update(each["replica_id"] for each in platform.replicas("sleeper"))
    assert len(seen) == 1


async def test_models_on_one_gpu_take_turns_and_one_that_dies_leaves_its_turn(
    platform: Platform,
) -> None:
    names = ("one-of-two", "two-of-two")
    bodies = [greedy(f"sim/{name}", number) for number in range(6) for name in names]
    expected = await undisturbed(platform, bodies)
    async with Load(platform, bodies, clients=6) as load:

        def is_asleep(name: str) -> bool:
            return platform.sample("tera_engine_asleep", model=name) == 1

        for name in names:
            await asyncio.to_thread(until, partial(is_asleep, name))
        (pid,) = serving(platform, names[0])
        await asyncio.to_thread(until, lambda: not is_asleep(names[0]))
        psutil.Process(pid).kill()
        await becomes(platform, names[0], 1)
        before = len(load.answers)
        await asyncio.to_thread(until, lambda: len(load.answers) > before + 2 * len(bodies))
    assert load.changed(expected) == []

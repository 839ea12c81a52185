"""Fewer replicas, of which one is busy: it stays, whichever Serve would have taken."""

import asyncio
import os
import signal
from contextlib import AsyncExitStack

import pytest
from benchmarks.streams import ask_all
from tests.serve.conftest import Platform, until
from tests.serve.load import (
    PACED,
    STEP_S,
    Streams,
    apply,
    bounds,
    endless,
    faults,
    undisturbed,
    values,
)

pytestmark = pytest.mark.slow

MODEL = PACED
LASTING_TOKENS = 4000
"""Minutes, in which a replica has long been taken away."""


def with_replicas(least: int, most: int) -> str:
    return values(
        {
            # A generation that moves is longer than its prompt, and might belong to a certain
            # replica.
            "routing": "least_loaded",
            "replicas": bounds(least, most),
            "scaling": {
                "targetOngoingRequests": 2,
                "upscaleDelaySeconds": 0,
                "downscaleDelaySeconds": 2,
            },
        }
    )


@pytest.fixture(scope="module")
def platform(operated: Platform) -> Platform:
    operated.become(with_replicas(2, 2))
    return operated


def loads(platform: Platform) -> dict[str, int | None]:
    """Return how many streams each replica has; None if it does not say."""
    return {each["replica_id"]: each["running"] for each in platform.replicas("paced")}


async def has(platform: Platform, expected: dict[str, int]) -> None:
    """Return once the replicas are these and have so many streams."""
    await asyncio.to_thread(until, lambda: loads(platform) == expected, timeout_s=60)


async def settled(platform: Platform, count: int) -> set[str]:
    """Return the replicas' ids once there are so many."""
    found: dict[str, int | None] = {}

    def so_many() -> bool:
        found.clear()
        found.update(loads(platform))
        return len(found) == count and None not in found.values()

    await asyncio.to_thread(until, so_many, timeout_s=120)
    return set(found)


async def scaled(platform: Platform, least: int, most: int, *, becomes: int) -> set[str]:
    """Set the bounds, and return the replicas' ids once there are so many."""
    await apply(platform, with_replicas(least, most))
    return await settled(platform, becomes)


async def reported(platform: Platform) -> None:
    """Return once Serve has heard of what runs: after five seconds' text, and it hears in 1.4."""
    assert await undisturbed(platform, [endless(MODEL, 0, 1000)])


@pytest.mark.parametrize(
    "most", [pytest.param(1, id="replicas.max"), pytest.param(3, id="the autoscaler")]
)
async def test_the_busy_replica_stays_be_it_the_newest(platform: Platform, most: int) -> None:
    lasting = endless(MODEL, 0, LASTING_TOKENS)
    beside = [endless(MODEL, number, LASTING_TOKENS) for number in (1, 2)]
    switches = platform.sample("tera_replica_switches_total", model="paced")
    older = await scaled(platform, 2, 2, becomes=2)
    async with AsyncExitStack() as stack:
        async with Streams(platform, platform.api_key, beside):
            (newest,) = await scaled(platform, 3, 3, becomes=3) - older
            stream = Streams(platform, platform.api_key, [lasting])
            await stack.enter_async_context(stream)
        await has(platform, {**dict.fromkeys(older, 0), newest: 1})
        await reported(platform)
        assert await scaled(platform, 1, most, becomes=1) == {newest}
        assert loads(platform) == {newest: 1}
        assert platform.sample("tera_replica_switches_total", model="paced") == switches


async def test_a_replica_stays_that_goes_on_with_what_a_dead_one_ran(platform: Platform) -> None:
    lasting, short = endless(MODEL, 0, LASTING_TOKENS), endless(MODEL, 1, 1)
    older = await scaled(platform, 2, 2, becomes=2)
    async with Streams(platform, platform.api_key, [lasting]) as stream:
        (victim,) = (replica for replica, streams in loads(platform).items() if streams)
        (idle,) = older - {victim}
        (newer,) = await scaled(platform, 3, 3, becomes=3) - older
        pids = {each["replica_id"]: each["pid"] for each in platform.replicas("paced")}
        os.kill(pids[idle], signal.SIGSTOP)  # so that it is given nothing
        try:
            # Who has had something can be given what another has lost, without a call of Serve's.
            assert not faults(await ask_all(platform.port, platform.api_key, [short], clients=1))
            os.kill(pids[victim], signal.SIGKILL)
            later = stream.events + 1 / STEP_S  # more than was on its way
            await asyncio.to_thread(until, lambda: stream.events > later, timeout_s=20)
        finally:
            os.kill(pids[idle], signal.SIGCONT)
        (newest,) = await settled(platform, 3) - older - {newer}
        await has(platform, {idle: 0, newer: 1, newest: 0})
        await reported(platform)
        assert await scaled(platform, 1, 1, becomes=1) == {newer}
        assert loads(platform) == {newer: 1}

"""Fewer replicas, of which one is busy: it stays, whichever Serve would have taken."""

import asyncio
import os
import signal
from collections.abc import Iterator
from contextlib import AsyncExitStack

import pytest
from benchmarks.streams import ask_all
from tests.serve.conftest import Platform, until
from tests.serve.load import Streams, apply, endless, faults, undisturbed

pytestmark = pytest.mark.slow

MODEL = "sim/elastic"
STEP_S = 0.05
LASTING_TOKENS = 4000
"""Minutes, in which a replica has long been taken away."""


def values(least: int, most: int) -> str:
    return f"""\
models:
  elastic:
    id: {MODEL}
    # A generation that moves is longer than its prompt, and might belong to a certain replica.
    routing: least_loaded
    engine: {{kind: simulated, args: {{profile: {{decode_step_s: {STEP_S}}}}}}}
    replicas: {{min: {least}, max: {most}}}
    scaling: {{targetOngoingRequests: 2, upscaleDelaySeconds: 0, downscaleDelaySeconds: 2}}
  steady:
    id: sim/steady
    engine: {{kind: simulated, args: {{profile: {{decode_step_s: 0.005}}}}}}
"""


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    with Platform.running(tmp_path_factory.mktemp("scale-down") / "home", values(2, 2)) as found:
        yield found


def loads(platform: Platform) -> dict[str, int | None]:
    """Return how many streams each replica has; None if it does not say."""
    return {each["replica_id"]: each["running"] for each in platform.replicas("elastic")}


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
    await apply(platform, values(least, most))
    return await settled(platform, becomes)


async def reported(platform: Platform) -> None:
    """Return once Serve has heard of what runs: after five seconds' text, and it hears in 1.4."""
    assert await undisturbed(platform, [endless(MODEL, 0, 1000)], "sim/steady")


@pytest.mark.parametrize(
    "most", [pytest.param(1, id="replicas.max"), pytest.param(3, id="the autoscaler")]
)
async def test_the_busy_replica_stays_be_it_the_newest(platform: Platform, most: int) -> None:
    lasting = endless(MODEL, 0, LASTING_TOKENS)
    beside = [endless(MODEL, number, LASTING_TOKENS) for number in (1, 2)]
    switches = platform.sample("tera_replica_switches_total", model="elastic")
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
        assert platform.sample("tera_replica_switches_total", model="elastic") == switches


async def test_a_replica_stays_that_goes_on_with_what_a_dead_one_ran(platform: Platform) -> None:
    lasting, short = endless(MODEL, 0, LASTING_TOKENS), endless(MODEL, 1, 1)
    older = await scaled(platform, 2, 2, becomes=2)
    async with Streams(platform, platform.api_key, [lasting]) as stream:
        (victim,) = (replica for replica, streams in loads(platform).items() if streams)
        (idle,) = older - {victim}
        (newer,) = await scaled(platform, 3, 3, becomes=3) - older
        pids = {each["replica_id"]: each["pid"] for each in platform.replicas("elastic")}
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

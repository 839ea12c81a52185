"""More and fewer replicas, another version, none at all: no request fails on the way."""

import asyncio
import itertools
from collections.abc import Iterator
from functools import partial
from typing import Any

import httpx
import psutil
import pytest
from benchmarks.streams import Answer, StreamClient
from tests.serve.conftest import Platform, until
from tests.serve.load import Load, apply, faults, greedy, serving, undisturbed

pytestmark = pytest.mark.slow

WAITING = 50
STEP_S = 0.05
VALUES = f"""\
models:
  elastic:
    id: sim/elastic
    engine: {{kind: simulated, args: {{profile: {{decode_step_s: {STEP_S}}}}}}}
    replicas: {{min: 1, max: 8}}
    scaling: {{targetOngoingRequests: 2, upscaleDelaySeconds: 0, downscaleDelaySeconds: 2}}
  rolled:
    id: sim/rolled
    engine: {{kind: simulated, args: {{profile: {{decode_step_s: {STEP_S}}}}}}}
    replicas: {{min: 2, max: 2}}
  steady:
    id: sim/steady
    engine: {{kind: simulated, args: {{profile: {{decode_step_s: 0.005}}}}}}
  sleeper:
    id: sim/sleeper
    engine: {{kind: simulated, args: {{profile: {{startup_s: 4}}}}}}
    replicas: {{min: 0, max: 4}}
    scaling: {{targetOngoingRequests: {2 * WAITING}, upscaleDelaySeconds: 0}}
  one-of-two:
    id: sim/one-of-two
    engine: {{kind: simulated, args: {{profile: {{decode_step_s: 0.01}}}}}}
    gpuSharing: &sharing {{replicasPerGpu: 2, turnSeconds: 0.5}}
  two-of-two:
    id: sim/two-of-two
    engine: {{kind: simulated, args: {{profile: {{decode_step_s: 0.01}}}}}}
    gpuSharing: *sharing
gateway: {{requests: {{keepAliveSeconds: 1}}}}
"""
ROLLED = VALUES.replace(
    f"""\
  rolled:
    id: sim/rolled
    engine: {{kind: simulated, args: {{profile: {{decode_step_s: {STEP_S}}}}}}}""",
    """\
  rolled:
    id: sim/rolled
    engine: {kind: simulated, args: {profile: {decode_step_s: 0.04}}}""",
)


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    with Platform.running(tmp_path_factory.mktemp("scaling") / "home", VALUES) as found:
        yield found


async def becomes(platform: Platform, model: str, replicas: int) -> None:
    def so_many() -> bool:
        return len(platform.replicas(model)) == len(serving(platform, model)) == replicas

    await asyncio.to_thread(until, so_many, timeout_s=120, every_s=0.5)


async def test_a_model_grows_and_shrinks_under_load_without_an_error(platform: Platform) -> None:
    bodies = [greedy("sim/elastic", number) for number in range(24)]
    expected = await undisturbed(platform, bodies, "sim/steady")
    await becomes(platform, "elastic", 1)
    async with Load(platform, bodies, clients=1) as one:
        async with Load(platform, bodies, clients=20) as many:
            await becomes(platform, "elastic", 8)
        await becomes(platform, "elastic", 1)
    for load in (one, many):
        assert load.answers
        assert load.changed(expected) == []


async def test_another_version_of_a_model_takes_over_without_an_error(platform: Platform) -> None:
    bodies = [greedy("sim/rolled", number) for number in range(10)]
    others = [greedy("sim/steady", number) for number in range(10)]
    expected, expected_others = (
        await undisturbed(platform, bodies, "sim/steady"),
        await undisturbed(platform, others, "sim/steady"),
    )
    old, beside = serving(platform, "rolled"), serving(platform, "steady")
    async with (
        Load(platform, bodies, clients=6) as load,
        Load(platform, others, clients=1) as other,
    ):
        await apply(platform, ROLLED)

        def taken_over() -> bool:
            there = {each["pid"] for each in platform.replicas("rolled")}
            return there.isdisjoint(old) and len(serving(platform, "rolled")) == len(there) == 2

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
    expected = await undisturbed(platform, bodies, "sim/steady")
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

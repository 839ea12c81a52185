"""Replicas killed under a hundred streams: no request is lost, and none is counted twice."""

import asyncio
import os
import random
import signal
from typing import Any

import pytest
from benchmarks.streams import Answer, StreamClient
from tests.serve.conftest import Platform, until
from tests.serve.load import PACED, bounds, faults, new_key, serving, told, used, values

pytestmark = pytest.mark.slow

SEED = 6
ROUNDS = 4
STREAMS = 100
REPLICAS = 3
MODEL = PACED
VALUES = values({"replicas": bounds(REPLICAS), "scaling": {"maxOngoingRequests": 256}})

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


@pytest.fixture(scope="module")
def platform(operated: Platform) -> Platform:
    operated.become(VALUES)
    return operated


def request(number: int) -> tuple[str, dict[str, Any]]:
    """Return a path and a body; of each kind of request there are as many."""
    about = f"Tell of subject number {number} and of what follows from it"
    kinds: list[tuple[str, dict[str, Any]]] = [
        (COMPLETIONS, {"prompt": about, "temperature": 0}),
        (COMPLETIONS, {"prompt": about, "temperature": 0.9, "seed": number, "n": 3}),
        (COMPLETIONS, {"prompt": about, "temperature": 0, "logprobs": 2}),
        (COMPLETIONS, {"prompt": about, "temperature": 0, "stop": [" of", "?"]}),
        (CHAT, {"messages": [{"role": "user", "content": about}], "temperature": 0}),
    ]
    path, body = kinds[number % len(kinds)]
    return path, {"model": MODEL, "max_tokens": 60, **body}


async def all_streams(
    platform: Platform, key: str, kill_at: int = 0, victim: int = 0
) -> list[Answer]:
    """Return the answers to all requests, sent at once; `victim` dies after so many events."""
    events = 0

    def count() -> None:
        nonlocal events
        events += 1
        if events == kill_at:
            os.kill(victim, signal.SIGKILL)

    async def one(number: int) -> Answer:
        path, body = request(number)
        async with StreamClient(platform.port, key) as client:
            return await client.ask(body, path, on_event=count)

    async with asyncio.timeout(60):
        return await asyncio.gather(*map(one, range(STREAMS)))


async def test_b2_deaths_at_random_moments_lose_nothing(platform: Platform) -> None:
    # As many slots as streams: one that a death kept would refuse a stream of the next round.
    key = new_key(platform, "deaths", "--concurrent-requests", str(STREAMS))
    switches = platform.sample("tera_replica_switches_total", model="paced")
    rng = random.Random(SEED)
    undisturbed = await all_streams(platform, key)
    assert not faults(undisturbed)
    events = sum(len(answer.arrivals_s) for answer in undisturbed)
    rounds = [undisturbed]
    for number in range(ROUNDS):
        until(lambda: len(serving(platform, "paced")) == REPLICAS, timeout_s=60)
        platform.wait_until_idle("paced", replicas=REPLICAS)
        moment, victim = rng.randrange(1, events), rng.choice(serving(platform, "paced"))
        answers = await all_streams(platform, key, moment, victim)
        assert not faults(answers), f"round {number}, killed at event {moment} of {events}"
        changed = [
            number
            for number, (answer, expected) in enumerate(zip(answers, undisturbed, strict=True))
            if answer.choices != expected.choices
        ]
        assert changed == [], f"round {number}, killed at event {moment} of {events}"
        assert told(answers) == told(undisturbed), "each token counts once"
        rounds.append(answers)
    moved = platform.sample("tera_replica_switches_total", model="paced") - switches
    assert moved > ROUNDS
    expected = told([answer for answers in rounds for answer in answers])
    until(lambda: used(platform, "deaths") == expected, timeout_s=15)

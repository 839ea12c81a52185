"""Engines that share a GPU."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
from pydantic import JsonValue
from tests.engine.conftest import Asker, Clock, until

from tera.engine import turns
from tera.engine.base import TextEngine
from tera.engine.simulated import SimulatedEngine
from tera.engine.turns import Turn, TurnTakingEngine
from tera.errors import ConfigError, EngineStalledError, ReplicaLostError, TeraError
from tera.generation import Sampling

PROMPT = [504, 575, 282, 260, 314, 325]
LONG = Sampling(max_tokens=400, temperature=0, ignore_eos=True)
SHORT = Sampling(max_tokens=5, temperature=0, ignore_eos=True)


class Gpu:
    """Notes which engines are awake, and that it is never more than one."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.clock = Clock()
        self.awake: set[object] = set()
        self.wakes = 0
        self.slept: list[float] = []
        """What those who waited for a turn have slept, in seconds."""

    def turn(self) -> Turn:
        return Turn(self.directory, poll_s=0.002, sleep=self.sleep)

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        await asyncio.sleep(min(seconds, 0.01))

    @asynccontextmanager
    async def engine(
        self, turn_s: float = 10, stall_s: float = 60, **args: JsonValue
    ) -> AsyncGenerator[Asker]:
        gpu = self

        class Noted(SimulatedEngine):
            async def sleep(self) -> None:
                await super().sleep()
                gpu.awake.remove(self)

            async def wake(self) -> None:
                gpu.takes(self)
                await super().wake()

        async def start() -> Noted:
            profile: JsonValue = {"decode_step_s": 0.001, "context_tokens": 2048}
            engine = await Noted.launch({"profile": profile, **args}, stall_s=stall_s)
            assert isinstance(engine, Noted)
            self.takes(engine)
            return engine

        turn = self.turn()
        await turn.take()
        engine = TurnTakingEngine(await start(), turn, turn_s, self.clock)
        try:
            yield Asker(engine)
        finally:
            await engine.close()

    def takes(self, engine: object) -> None:
        assert not self.awake, "another engine has the GPU's memory"
        self.awake.add(engine)
        self.wakes += 1


@pytest.fixture
def gpu(tmp_path: Path) -> Gpu:
    return Gpu(tmp_path / "gpus" / "0")


def asleep(*askers: Asker) -> list[bool]:
    return [asker.engine.load().asleep for asker in askers]


async def health_fault(engine: TextEngine) -> TeraError:
    """Return what an engine's health check raises, once it does."""
    async with asyncio.timeout(10):
        while True:
            try:
                await engine.check_health()
            except TeraError as error:
                return error
            await asyncio.sleep(0.005)


async def test_two_engines_that_are_asked_in_turns_are_awake_in_turns(gpu: Gpu) -> None:
    async with gpu.engine() as first, gpu.engine() as second:
        assert asleep(first, second) == [True, False]
        texts = [await asker.tokens(PROMPT, SHORT) for asker in (first, second, first, second)]
    assert texts[0] == texts[1] == texts[2] == texts[3]
    assert gpu.wakes == 6


async def test_an_engine_that_nobody_waits_for_stays_awake(gpu: Gpu) -> None:
    async with gpu.engine() as only:
        for _ in range(3):
            await only.tokens(PROMPT, SHORT)
    assert gpu.wakes == 1


async def test_a_text_goes_on_after_the_turns_of_others(gpu: Gpu) -> None:
    async with gpu.engine() as first, gpu.engine() as second:
        undisturbed = await first.tokens(PROMPT, LONG)
        reads = asyncio.create_task(first.tokens(PROMPT, LONG))
        await until(lambda: first.engine.load().running == 1)
        other = asyncio.create_task(second.tokens(PROMPT, SHORT))
        gpu.clock.now = 10
        await other
        assert not reads.done()
        assert await reads == undisturbed


async def test_who_waits_does_so_until_the_turn_is_over(gpu: Gpu) -> None:
    async with gpu.engine(turn_s=10) as first, gpu.engine() as second:
        await first.tokens(PROMPT, SHORT)
        reads = asyncio.create_task(first.tokens(PROMPT, LONG))
        await until(lambda: first.engine.load().running == 1)
        waits = asyncio.create_task(second.tokens(PROMPT, SHORT))
        gpu.clock.now = 9
        done, _ = await asyncio.wait([waits], timeout=0.1)
        assert not done
        assert asleep(first, second) == [False, True]
        await second.engine.check_health()
        gpu.clock.now = 10
        await waits
        await reads


async def test_many_texts_of_many_engines_are_what_they_are_alone(gpu: Gpu) -> None:
    async with AsyncExitStack() as stack:
        askers = [await stack.enter_async_context(gpu.engine(turn_s=0)) for _ in range(4)]
        sampling = Sampling(max_tokens=40, temperature=0, ignore_eos=True)
        prompts = [[*PROMPT, 300 + index] for index in range(6)]
        alone = [await askers[0].tokens(prompt, sampling) for prompt in prompts]
        together = await asyncio.gather(
            *(asker.tokens(prompt, sampling) for asker in askers for prompt in prompts)
        )
    assert together == alone * 4
    assert gpu.wakes > 4


async def test_an_engine_that_does_not_start_leaves_its_turn(gpu: Gpu) -> None:
    async def fails() -> SimulatedEngine:
        return await SimulatedEngine.launch({"faults": {"failStart": True}}, stall_s=5)

    with pytest.raises(ConfigError):
        await TurnTakingEngine.launch(fails, gpu.turn(), 10)
    async with gpu.engine() as asker:
        assert await asker.tokens(PROMPT, SHORT)


async def test_an_engine_that_closes_in_its_sleep_leaves_the_others_their_turn(gpu: Gpu) -> None:
    async with gpu.engine() as first:
        async with gpu.engine() as second:
            await first.tokens(PROMPT, SHORT)
            assert asleep(first, second) == [False, True]
        async with gpu.engine() as third:
            assert asleep(first, third) == [True, False]


async def test_an_engine_closes_once(gpu: Gpu) -> None:
    async with gpu.engine() as first, gpu.engine() as second:
        await first.engine.close()
        await first.engine.close()
        assert await second.tokens(PROMPT, SHORT)


async def test_whoever_stops_waiting_blocks_nobody(gpu: Gpu) -> None:
    holder, leaves, stays = (gpu.turn() for _ in range(3))
    await holder.take()
    assert not holder.is_wanted()
    waiting = asyncio.create_task(leaves.take())
    await until(holder.is_wanted)
    waiting.cancel()
    await asyncio.wait([waiting])
    assert not holder.is_wanted()
    waiting = asyncio.create_task(stays.take())
    await until(holder.is_wanted)
    holder.leave()
    await waiting
    for turn in (holder, leaves, stays):
        turn.close()


HOLDS = """
import asyncio, os, pathlib, sys, time
from tera.engine.turns import Turn
turn = Turn(pathlib.Path(sys.argv[1]))
asyncio.run(turn.take())
child = os.fork()
if child:
    print(child, flush=True)
os.close(1)
time.sleep(600)
"""


async def test_a_dead_replica_leaves_its_turn_after_its_processes_had_time_to_end(gpu: Gpu) -> None:
    command = [sys.executable, "-c", HOLDS, str(gpu.directory)]
    process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE)
    assert process.stdout is not None
    child = int(await process.stdout.readline())
    turn = gpu.turn()
    waiting = asyncio.create_task(turn.take())
    try:
        await until(lambda: len(gpu.slept) > 10)
        assert not waiting.done()
        process.kill()
        await process.wait()
        async with asyncio.timeout(30):
            await waiting  # although what the replica has forked still runs
    finally:
        os.kill(child, signal.SIGKILL)
        if process.returncode is None:
            process.kill()
    assert turns.AFTERMATH_S in gpu.slept
    gpu.slept.clear()
    turn.leave()
    await turn.take()
    assert gpu.slept == []
    turn.close()


async def test_an_engine_that_does_not_wake_is_unhealthy(gpu: Gpu) -> None:
    class Broken(SimulatedEngine):
        async def wake(self) -> None:
            raise ReplicaLostError("no memory")

    turn = gpu.turn()
    engine = await TurnTakingEngine.launch(lambda: Broken.launch({}, stall_s=5), turn, 10)
    async with gpu.engine():
        await until(lambda: engine.load().asleep)
        reads = asyncio.create_task(Asker(engine).tokens(PROMPT, SHORT))
        await until(lambda: engine.load().waiting == 1)
        assert isinstance(await health_fault(engine), ReplicaLostError)
        await engine.close()
        with pytest.raises(ReplicaLostError):
            await reads


async def test_an_engine_that_stalls_in_its_turn_is_unhealthy(gpu: Gpu) -> None:
    async with gpu.engine(stall_s=0.05, faults={"stall_after_tokens": 3}) as asker:
        reads = asyncio.create_task(asker.tokens(PROMPT, LONG))
        assert isinstance(await health_fault(asker.engine), EngineStalledError)
        reads.cancel()
        await asyncio.wait([reads])

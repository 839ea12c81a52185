import asyncio
import multiprocessing
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import JsonValue
from tests.engine.conftest import Asker, until
from tests.engine.streams import streamed

from tera.engine.simulated import SimulatedEngine
from tera.engine.simulated_args import SimulatedArgs
from tera.engine.simulated_faults import CRASH_STATUS
from tera.engine.simulated_vocabulary import Vocabulary
from tera.errors import (
    ConfigError,
    EngineError,
    EngineStalledError,
    InvalidRequestError,
    ReplicaLostError,
    UnsupportedParameterError,
)
from tera.generation import FinishReason, Sampling

VOCABULARY = Vocabulary()
GREEDY = Sampling(max_tokens=1000, temperature=0)
INSTANT: dict[str, JsonValue] = {"decode_step_s": 0, "prefill_tokens_per_s": 0}


class Clock:
    """Time that passes only in sleeps, and remembers each of them."""

    def __init__(self) -> None:
        self.now = 0.0
        self.sleeps: list[float] = []

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.sleeps.append(seconds)
        await asyncio.sleep(0)


async def started(
    profile: dict[str, JsonValue] | None = None, **faults: JsonValue
) -> SimulatedEngine:
    args: dict[str, JsonValue] = {"profile": {**INSTANT, **(profile or {})}, "faults": faults}
    return await SimulatedEngine.launch(args, stall_s=5)


@pytest.fixture
async def asker() -> AsyncGenerator[Asker]:
    engine = await started()
    yield Asker(engine)
    await engine.close()


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_survives_the_vocabulary(text: str) -> None:
    assert VOCABULARY.decode(VOCABULARY.encode(text)) == text


@given(st.lists(st.sampled_from([" the", " naïve", "日本", "🚀", "e\u0301", "x", "<|end|>"])))
def test_known_strings_survive_the_vocabulary(parts: list[str]) -> None:
    text = "".join(parts)
    token_ids = VOCABULARY.encode(text)
    assert VOCABULARY.decode(token_ids) == text
    assert VOCABULARY.eos_id not in token_ids


def test_words_are_single_tokens() -> None:
    assert len(VOCABULARY.encode(" the people together")) == 3
    assert len(VOCABULARY.encode(" theory")) == 4  # " the", then bytes


@pytest.mark.parametrize("token_id", [-1, VOCABULARY.size])
def test_unknown_tokens_have_no_text(token_id: int) -> None:
    with pytest.raises(IndexError):
        VOCABULARY.token_bytes(token_id)


async def test_text_ends_by_itself_and_is_whole_utf8(asker: Asker) -> None:
    spelled = 0
    for index in range(200):
        prompt = VOCABULARY.encode(f"Tell me about number {index}.")
        deltas = await asker.deltas(prompt, GREEDY)
        token_ids = [token_id for delta in deltas for token_id in delta.token_ids]
        assert deltas[-1].finish_reason is FinishReason.STOP
        assert token_ids[-1] == VOCABULARY.eos_id
        assert 20 <= len(token_ids) <= 410
        assert "\ufffd" not in VOCABULARY.decode(token_ids)
        spelled += sum(128 <= token_id < 256 for token_id in token_ids)
    assert spelled > 1000


@pytest.mark.parametrize(
    "sampling",
    [
        pytest.param(Sampling(max_tokens=1000, temperature=0), id="greedy"),
        pytest.param(Sampling(max_tokens=1000, temperature=0.7, seed=42), id="seed"),
        pytest.param(
            Sampling(max_tokens=1000, temperature=0, logit_bias={300: -100.0, 240: -100.0}),
            id="bias",
        ),
    ],
)
async def test_resumed_text_is_the_undisturbed_one_at_every_cut(
    asker: Asker, sampling: Sampling
) -> None:
    prompt = VOCABULARY.encode("Write a story about a 🚀")
    whole = await asker.tokens(prompt, sampling)
    for cut in range(1, len(whole)):
        assert await asker.tokens(prompt + whole[:cut], sampling, cut) == whole[cut:]


async def test_a_step_costs_what_the_profile_says() -> None:
    clock = Clock()
    profile: dict[str, JsonValue] = {
        "prefill_tokens_per_s": 100,
        "decode_step_s": 0.5,
        "startup_s": 7,
    }
    engine = await SimulatedEngine.launch(
        {"profile": profile}, stall_s=5, clock=clock, sleep=clock.sleep
    )
    asker = Asker(engine)
    sampling = Sampling(max_tokens=3, temperature=0)
    await asker.deltas([300] * 40, sampling)
    # 40 prompt tokens at 100 a second, then two steps of decoding alone.
    assert clock.sleeps == pytest.approx([7, 0.9, 0.5, 0.5])
    await asker.deltas([300] * 40, sampling)
    assert clock.sleeps[4:] == pytest.approx([0.58, 0.5, 0.5])  # 32 of 40 were in the cache
    await engine.close()


async def test_prefix_cache_forgets_the_longest_unused() -> None:
    engine = await started({"kv_tokens": 64})
    asker = Asker(engine)
    one = Sampling(max_tokens=1, temperature=0)
    await asker.deltas([300] * 33, one)
    assert (await asker.deltas([300] * 33, one))[0].cached_tokens == 32
    await asker.deltas([301] * 60, one)
    assert (await asker.deltas([300] * 33, one))[0].cached_tokens < 32
    await engine.close()


async def test_structured_output_is_unsupported(asker: Asker) -> None:
    sampling = Sampling(max_tokens=5, structured={"json_object": True})
    with pytest.raises(UnsupportedParameterError) as raised:
        await asker.deltas([300], sampling)
    assert raised.value.param == "response_format"


@pytest.mark.parametrize("token_ids", [[], [-1], [VOCABULARY.size], [2**40]])
async def test_impossible_prompts_are_refused(asker: Asker, token_ids: list[int]) -> None:
    with pytest.raises(InvalidRequestError):
        await asker.deltas(token_ids, GREEDY)


def test_null_takes_an_argument_away() -> None:
    assert SimulatedArgs.parse({"max_model_len": None}) == SimulatedArgs()


@pytest.mark.parametrize(
    ("args", "path"),
    [
        pytest.param({"profil": {}}, "engine.args.profil", id="section"),
        pytest.param({"profile": {"speed": 1}}, "engine.args.profile.speed", id="key"),
        pytest.param(
            {"profile": {"max_running": 0}}, "engine.args.profile.max_running", id="value"
        ),
        pytest.param({"faults": {"refuse": "yes"}}, "engine.args.faults.refuse", id="type"),
    ],
)
async def test_wrong_arguments_are_refused_with_their_path(args: Any, path: str) -> None:
    with pytest.raises(ConfigError) as raised:
        await SimulatedEngine.launch(args, stall_s=5)
    assert raised.value.message.startswith(f"{path}: ")


async def test_an_engine_may_be_told_not_to_start() -> None:
    with pytest.raises(ConfigError, match="told not to start"):
        await started(fail_start=True)


async def test_a_marker_limits_a_fault_to_its_prompts() -> None:
    engine = await started(only_prompts_with="bad day", refuse=True)
    asker = Asker(engine)
    with pytest.raises(InvalidRequestError):
        await asker.deltas(VOCABULARY.encode("What a bad day"), GREEDY)
    assert await asker.tokens(VOCABULARY.encode("What a day"), GREEDY)
    await engine.close()


async def test_a_failed_generation_has_given_its_tokens() -> None:
    engine = await started(fail_after_tokens=3)
    asker = Asker(engine)
    stream = streamed(engine, asker.generation([300], GREEDY))
    received = [token_id for _ in range(3) for token_id in (await anext(stream)).token_ids]
    assert len(received) == 3
    with pytest.raises(EngineError) as raised:
        await anext(stream)
    assert raised.value.retryable
    assert engine.load().running == 0
    await engine.check_health()
    await engine.close()


async def test_a_stalled_engine_is_seen_by_its_health_check() -> None:
    clock = Clock()
    engine = await SimulatedEngine.launch(
        {"profile": INSTANT, "faults": {"stall_after_tokens": 2}}, stall_s=5, clock=clock
    )
    asker = Asker(engine)
    clock.now += 60  # idle, so no stall
    await engine.check_health()
    pending = asyncio.create_task(asker.deltas([300], GREEDY))
    await until(lambda: engine.load().running == 1)
    await engine.check_health()
    clock.now += 5.1
    with pytest.raises(EngineStalledError):
        await engine.check_health()
    await engine.close()
    with pytest.raises(ReplicaLostError):
        await pending


async def test_slow_steps_last_longer() -> None:
    clock = Clock()
    engine = await SimulatedEngine.launch(
        {"profile": INSTANT, "faults": {"slow_step_s": 2}},
        stall_s=5,
        clock=clock,
        sleep=clock.sleep,
    )
    await Asker(engine).deltas([300], Sampling(max_tokens=2, temperature=0))
    assert clock.sleeps == pytest.approx([0, 2, 2])
    await engine.close()


async def test_open_generations_fail_when_the_engine_closes() -> None:
    engine = await started({"decode_step_s": 3600})
    asker = Asker(engine)
    pending = asyncio.create_task(asker.deltas([300], GREEDY))
    await until(lambda: engine.load().running == 1)
    await engine.close()
    await engine.close()
    with pytest.raises(ReplicaLostError):
        await pending
    with pytest.raises(ReplicaLostError):
        await asker.deltas([300], GREEDY)
    with pytest.raises(ReplicaLostError):
        await engine.check_health()


def _die_while_generating() -> None:
    async def generate() -> None:
        engine = await started(die_after_tokens=3)
        await Asker(engine).deltas([300], GREEDY)

    asyncio.run(generate())


def test_a_fatal_fault_ends_the_process() -> None:
    process = multiprocessing.get_context("fork").Process(target=_die_while_generating)
    process.start()
    process.join(30)
    assert process.exitcode == CRASH_STATUS

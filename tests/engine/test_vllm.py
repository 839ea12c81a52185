import asyncio
import json
import signal
from collections.abc import AsyncGenerator
from dataclasses import fields
from typing import Any

import psutil
import pytest
from pydantic import JsonValue
from tests.engine.conftest import STALL_S, VLLM_MARKS, Asker, Clock, until
from tests.engine.streams import streamed

from tera.engine.bounds import MAX_LOGIT_BIAS_TOKENS
from tera.engine.vllm import VllmEngine
from tera.engine.vllm_args import async_engine_args
from tera.engine.vllm_sampling import sampling_params
from tera.errors import (
    ConfigError,
    EngineError,
    EngineStalledError,
    ReplicaLostError,
)
from tera.generation import FinishReason, Generation, Sampling, TokenDelta
from tera.upstream.vllm import argument_names

pytestmark = [*VLLM_MARKS, pytest.mark.asyncio(loop_scope="session")]

PROMPT = [504, 3575, 282, 4649, 314]  # "The capital of France is"
COLOURS = ["red like a rose in June", "blue like the sea in May"]
SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": COLOURS}},
    "required": ["colour"],
    "additionalProperties": False,
}


@pytest.fixture
def asker(vllm_engine: VllmEngine) -> Asker:
    return Asker(vllm_engine)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        pytest.param(
            {"max_modl_len": 5},
            "engine.args.max_modl_len: vLLM has no such argument; max_model_len is nearest",
            id="unknown",
        ),
        pytest.param({"model": "x"}, "engine.args.model: set source instead", id="ours"),
        pytest.param(
            {"tensor_parallel_size": 2},
            "engine.args.tensor_parallel_size: set parallelism.tensor instead",
            id="parallelism",
        ),
        pytest.param(
            {"worker_extension_cls": "x.Y"},
            "engine.args.worker_extension_cls: Tera uses its own extension there",
            id="worker",
        ),
        pytest.param(
            {"structured_outputs_config": {"backend": "outlines"}},
            "engine.args.structured_outputs_config.backend: is always xgrammar",
            id="backend",
        ),
    ],
)
async def test_wrong_arguments_are_named(
    args: dict[str, JsonValue], message: str, model_path: str
) -> None:
    with pytest.raises(ConfigError) as raised:
        await VllmEngine.launch(model_path, args, stall_s=5)
    assert raised.value.message == message


async def test_x2_no_request_chooses_the_backend_of_its_engine(model_path: str) -> None:
    args: dict[str, JsonValue] = {"structured_outputs_config": {"disable_any_whitespace": True}}
    for given in ({}, args, {"reasoning_parser": "deepseek_r1"}):
        engine_args = async_engine_args({**given}, sleeps=False, model=model_path)
        config = engine_args.create_structured_outputs_config()
        assert config.backend == "xgrammar"
        assert config.disable_any_whitespace is (given is args)


async def test_arguments_are_known_without_importing_vllm() -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs

    assert argument_names() == {field.name for field in fields(AsyncEngineArgs)}


async def test_wrong_values_are_refused(model_path: str, vllm_environment: None) -> None:
    with pytest.raises(ConfigError, match=r"^engine\.args: "):
        await VllmEngine.launch(model_path, {"dtype": "float3"}, stall_s=5)


@pytest.mark.parametrize(
    "penalties",
    [
        pytest.param({"frequency_penalty": 1.5}, id="frequency"),
        pytest.param({"presence_penalty": 1.5}, id="presence"),
        pytest.param({"repetition_penalty": 1.3}, id="repetition"),
        pytest.param(
            {"frequency_penalty": 0.4, "presence_penalty": 0.6, "repetition_penalty": 1.2}, id="all"
        ),
        pytest.param({"frequency_penalty": -0.5, "presence_penalty": -1.0}, id="negative"),
    ],
)
async def test_penalties_count_what_was_generated_before_a_cut(
    asker: Asker, penalties: dict[str, Any]
) -> None:
    def sampling(max_tokens: int) -> Sampling:
        return Sampling(max_tokens=max_tokens, temperature=0, ignore_eos=True, **penalties)

    whole = await asker.tokens(PROMPT, sampling(30))
    plain = await asker.tokens(PROMPT, Sampling(max_tokens=30, temperature=0, ignore_eos=True))
    assert whole != plain  # so the penalties matter here
    # Together, so that the batch holds resumed and undisturbed generations beside each other.
    cuts = (3, 10, 15, 27)
    resumed = [asker.tokens(PROMPT + whole[:cut], sampling(30 - cut), cut) for cut in cuts]
    again, *rests = await asyncio.gather(asker.tokens(PROMPT, sampling(30)), *resumed)
    assert again == whole
    assert rests == [whole[cut:] for cut in cuts]


@pytest.mark.parametrize("bias", [None, dict.fromkeys(range(MAX_LOGIT_BIAS_TOKENS), 1.0)])
async def test_a_resumption_names_no_token_in_a_bias(bias: dict[int, float] | None) -> None:
    sampling = Sampling(
        max_tokens=20, logit_bias=bias, presence_penalty=2.0, frequency_penalty=-2.0
    )
    token_ids = [*range(4000)]
    generation = Generation(1, "a", token_ids, sampling, resumed_tokens=3990)
    assert sampling_params(generation).logit_bias == bias


async def test_more_different_tokens_than_a_bias_can_name_are_resumed_with_penalties(
    asker: Asker,
) -> None:
    prompt = [*PROMPT, *range(1000, 2200)]
    sampling = Sampling(max_tokens=20, temperature=0, ignore_eos=True, frequency_penalty=2.0)
    assert len(await asker.tokens(prompt, sampling, 1200)) == 20


async def test_structured_output_fits_its_schema(asker: Asker, vllm_engine: VllmEngine) -> None:
    sampling = Sampling(max_tokens=60, temperature=0, structured={"json": SCHEMA})
    deltas = await asker.deltas(PROMPT, sampling)
    token_ids = [token_id for delta in deltas for token_id in delta.token_ids]
    tokenizer = vllm_engine._llm.get_tokenizer()
    assert deltas[-1].finish_reason is FinishReason.STOP
    answer = json.loads(tokenizer.decode(token_ids, skip_special_tokens=True))
    assert answer["colour"] in COLOURS


@pytest.mark.parametrize("cut", [1, 4, 9])
async def test_b2_a_resumed_structured_output_is_the_undisturbed_one(
    asker: Asker, cut: int
) -> None:
    def sampling(most: int) -> Sampling:
        return Sampling(max_tokens=most, temperature=0, structured={"json": SCHEMA})

    whole = await asker.tokens(PROMPT, sampling(60))
    assert len(whole) > cut
    assert await asker.tokens(PROMPT + whole[:cut], sampling(60 - cut), cut) == whole[cut:]


async def test_a_resumed_structured_output_that_does_not_fit_its_format_fails_alone(
    asker: Asker,
) -> None:
    sampling = Sampling(max_tokens=20, temperature=0, structured={"json": SCHEMA})
    with pytest.raises(EngineError):
        await asker.tokens([*PROMPT, *PROMPT[:3]], sampling, 3)
    assert await asker.tokens(PROMPT, Sampling(max_tokens=3, temperature=0))


async def test_metrics_are_vllms_own(asker: Asker, vllm_engine: VllmEngine) -> None:
    await asker.tokens(PROMPT, Sampling(max_tokens=3, temperature=0))
    lines = vllm_engine.metrics_text().splitlines()
    samples = [line for line in lines if not line.startswith("#")]
    assert samples
    assert all(line.startswith("vllm:") for line in samples)
    tokens = [line for line in samples if line.startswith("vllm:generation_tokens_total{")]
    assert [float(line.rsplit(" ", 1)[1]) >= 3 for line in tokens] == [True]


# The last test with this engine, of which it leaves nothing.
async def test_a_stall_is_seen_and_a_death_is_retryable_and_nothing_is_left(
    asker: Asker, vllm_engine: VllmEngine, vllm_clock: Clock
) -> None:
    engine = vllm_engine
    children = psutil.Process().children(recursive=True)
    processes = [each for each in children if each.name().startswith("VLLM::")]
    (core,) = [each for each in processes if each.name().startswith("VLLM::EngineCor")]
    vllm_clock.now += 2 * STALL_S  # idle, so no stall
    await engine.check_health()

    sampling = Sampling(max_tokens=2000, temperature=0, ignore_eos=True)
    stream = streamed(engine, asker.generation(PROMPT, sampling))
    await anext(stream)
    core.send_signal(signal.SIGSTOP)
    try:
        await _until_stalled(engine, vllm_clock)
    finally:
        core.send_signal(signal.SIGCONT)
    await anext(stream)
    await anext(stream)
    await engine.check_health()

    core.kill()
    with pytest.raises(EngineError) as raised:
        await _drain(stream)
    assert raised.value.retryable
    with pytest.raises(ReplicaLostError):
        await engine.check_health()
    with pytest.raises(ReplicaLostError):
        await asker.tokens(PROMPT, Sampling(max_tokens=2))
    await engine.close()
    await engine.close()
    await until(lambda: not any(each.is_running() for each in processes))


async def _drain(stream: AsyncGenerator[TokenDelta]) -> None:
    async for _ in stream:
        pass


async def _until_stalled(engine: VllmEngine, clock: Clock) -> None:
    # A step that ended before the signal may be reported after it, so time goes on until seen.
    async with asyncio.timeout(30):
        while True:
            clock.now += STALL_S + 0.1
            try:
                await engine.check_health()
            except EngineStalledError:
                return
            await asyncio.sleep(0.01)

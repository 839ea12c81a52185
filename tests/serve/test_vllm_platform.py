"""Real vLLM behind the gateway, from the values of the demo."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any, Literal

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel
from tests.serve.conftest import Platform
from tests.serve.load import serving

pytestmark = [pytest.mark.slow, pytest.mark.vllm]

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
PROMPTS = ["The capital of France is", "日本の首都は", "def fib(n):", "Write of 🚀 and 😀:"]

BARE = """
import json, sys
from vllm import LLM, SamplingParams
llm = LLM(model=sys.argv[1], dtype="float32", max_model_len=2048, max_num_seqs=16,
          enforce_eager=True)
outputs = llm.generate(json.loads(sys.argv[2]), SamplingParams(temperature=0, max_tokens=32))
print("TEXTS" + json.dumps([output.outputs[0].text for output in outputs]))
"""


@pytest.fixture
def client(vllm: Platform) -> OpenAI:
    return OpenAI(base_url=f"{vllm.base_url}/v1", api_key=vllm.api_key, max_retries=0)


def texts(client: OpenAI) -> list[str]:
    answer = client.completions.create(model=MODEL, prompt=PROMPTS, temperature=0, max_tokens=32)
    return [choice.text for choice in answer.choices]


def test_greedy_text_is_that_of_bare_vllm(vllm: Platform, client: OpenAI) -> None:
    directory = vllm.home / "models/smollm2-135m-instruct-float32"
    offline = ["env", "HF_HUB_OFFLINE=1", "VLLM_CPU_KVCACHE_SPACE=1", "VLLM_NO_USAGE_STATS=1"]
    in_one_process = (
        "VLLM_ENABLE_V1_MULTIPROCESSING=0"  # but for its worker; each takes 10 s of CPU
    )
    done = subprocess.run(  # noqa: S603  our own interpreter
        [*offline, in_one_process, sys.executable, "-c", BARE, str(directory), json.dumps(PROMPTS)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("TEXTS")]
    ours = texts(client)
    assert ours == json.loads(line.removeprefix("TEXTS"))
    assert ours[0].startswith(" Paris")


def test_chat_streams_what_it_answers(client: OpenAI) -> None:
    messages = [{"role": "user", "content": "Say hello."}]
    asked = {"model": MODEL, "messages": messages, "temperature": 0, "max_tokens": 16}
    whole = client.chat.completions.create(**asked)  # type: ignore[call-overload]
    with client.chat.completions.create(**asked, stream=True) as chunks:  # type: ignore[call-overload]
        streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert streamed == whole.choices[0].message.content
    assert streamed


class Pet(BaseModel):
    """Nothing in it is open-ended: a small model would go on until `max_tokens`."""

    kind: Literal["cat", "dog", "bird"]
    tame: bool
    size: Literal["small", "large"]


PET_FORMAT: Any = {
    "name": "Pet",
    "schema": {**Pet.model_json_schema(), "additionalProperties": False},
    "strict": True,
}


def test_an_answer_is_parsed_into_a_model_of_the_clients(client: OpenAI) -> None:
    answer = client.chat.completions.parse(
        model=MODEL,
        messages=[{"role": "user", "content": "Invent a pet."}],
        temperature=0,
        max_tokens=100,
        response_format=Pet,
    )
    assert isinstance(answer.choices[0].message.parsed, Pet)
    assert answer.choices[0].finish_reason == "stop"


def test_a_parsed_answer_can_be_streamed(client: OpenAI) -> None:
    with client.chat.completions.stream(
        model=MODEL,
        messages=[{"role": "user", "content": "Invent a pet."}],
        temperature=0,
        max_tokens=100,
        response_format=Pet,
    ) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion()
    parsed = final.choices[0].message.parsed
    assert isinstance(parsed, Pet)
    assert Pet.model_validate_json("".join(deltas)) == parsed


def test_an_answer_fits_the_schema_that_is_asked_for(client: OpenAI) -> None:
    # The conversation of the tests above: of another one a small model may make endless blanks,
    # which JSON allows.
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Invent a pet."}],
        temperature=0,
        max_tokens=100,
        response_format={"type": "json_schema", "json_schema": PET_FORMAT},
        n=3,
    )
    for choice in answer.choices:
        assert set(json.loads(choice.message.content or "")) == {"kind", "tame", "size"}


def test_a_schema_that_is_none_is_refused(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "Hello"}],
            max_tokens=5,
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": {"type": "no such type"}},
            },
        )
    assert caught.value.code in ("invalid_value", "unsupported_parameter")


def test_tools_are_refused_where_nobody_would_parse_them(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "What time is it?"}],
            tools=[{"type": "function", "function": {"name": "clock"}}],
        )
    assert (caught.value.code, caught.value.param) == ("unsupported_parameter", "tools")


def test_vllms_own_metrics_are_there(vllm: Platform, client: OpenAI) -> None:
    client.completions.create(model=MODEL, prompt="One", max_tokens=2)
    assert vllm.sample("vllm:generation_tokens_total") > 0


async def test_b2_streams_of_every_kind_outlive_the_only_replica(vllm: Platform) -> None:
    client = AsyncOpenAI(base_url=f"{vllm.base_url}/v1", api_key=vllm.api_key, max_retries=0)
    before = vllm.sample("tera_replica_switches_total")

    async def complete(every: Callable[[], None], **fields: Any) -> list[Any]:
        stream = await client.completions.create(
            model=MODEL, temperature=0, max_tokens=60, stream=True, **fields
        )
        pieces = []
        async for chunk in stream:
            every()
            pieces += [(choice.index, choice.text) for choice in chunk.choices]
        return [(index, "".join(text for at, text in pieces if at == index)) for index in (0, 1)]

    async def answer(every: Callable[[], None]) -> list[Any]:
        stream = await client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "Invent a pet."}],
            response_format={"type": "json_schema", "json_schema": PET_FORMAT},
            temperature=0,
            max_tokens=80,
            stream=True,
        )
        text = ""
        async for chunk in stream:
            every()
            text += chunk.choices[0].delta.content or ""
        return [text]

    async def all_at_once(every: Callable[[], None] = lambda: None) -> list[list[Any]]:
        answers = await asyncio.gather(
            complete(every, prompt="Once upon a time"),
            complete(every, prompt="The capital of France is", n=2),
            complete(every, prompt="One, two, three", stop=["ten"]),
            answer(every),
        )
        return list(answers)

    undisturbed = await all_at_once()
    assert json.loads(undisturbed[-1][0])
    (victim,) = serving(vllm, "smollm2")
    events = 0

    def kill_in_the_midst() -> None:
        nonlocal events
        events += 1
        if events == 40:
            os.kill(victim, signal.SIGKILL)

    assert await all_at_once(kill_in_the_midst) == undisturbed
    assert events > 40
    assert vllm.sample("tera_replica_switches_total") > before
    assert serving(vllm, "smollm2") != [victim]
    await client.close()

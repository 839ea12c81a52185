"""The official OpenAI client, unmodified, against a whole platform."""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
import pytest_asyncio
from openai import AsyncOpenAI, OpenAI
from tests.serve.conftest import Platform, until

pytestmark = pytest.mark.slow

REQUEST_ID = re.compile(r"req_[0-9a-f]{32}")
PROMPTS = ["One", "The capital of France is", "naïve café 日本 🚀", "مرحبا"]


@pytest_asyncio.fixture
async def async_client(simulated: Platform) -> AsyncIterator[AsyncOpenAI]:
    base_url = f"{simulated.base_url}/v1"
    async with AsyncOpenAI(base_url=base_url, api_key=simulated.api_key, max_retries=0) as found:
        yield found


def completed(client: OpenAI, prompt: Any, **options: Any) -> str:
    answer = client.completions.create(
        model="sim/small", prompt=prompt, temperature=0, max_tokens=40, **options
    )
    return answer.choices[0].text


def streamed(client: OpenAI, prompt: str, **options: Any) -> str:
    with client.completions.create(
        model="sim/small", prompt=prompt, temperature=0, max_tokens=40, stream=True, **options
    ) as chunks:
        return "".join(chunk.choices[0].text for chunk in chunks)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_stream_and_answer_have_the_same_text(client: OpenAI, prompt: str) -> None:
    text = completed(client, prompt)
    assert text
    assert streamed(client, prompt) == text
    assert "\ufffd" not in text[:-1]


async def test_async_streams_run_side_by_side(client: OpenAI, async_client: AsyncOpenAI) -> None:
    async def text(prompt: str) -> str:
        chunks = await async_client.completions.create(
            model="sim/small", prompt=prompt, temperature=0, max_tokens=40, stream=True
        )
        return "".join([chunk.choices[0].text async for chunk in chunks])

    prompts = [f"{prompt} {number}" for number in range(5) for prompt in PROMPTS]
    texts = await asyncio.gather(*(text(prompt) for prompt in prompts))
    whole = await async_client.completions.create(
        model="sim/small", prompt=prompts, temperature=0, max_tokens=40
    )
    assert [choice.text for choice in whole.choices] == texts


def test_answer_has_the_openai_shape(client: OpenAI) -> None:
    answer = client.completions.create(model="sim", prompt="One two three", max_tokens=7, seed=5)
    assert re.fullmatch(r"cmpl-[0-9a-f]{32}", answer.id)
    assert (answer.object, answer.model) == ("text_completion", "sim")
    assert REQUEST_ID.fullmatch(answer._request_id or "")
    [choice] = answer.choices
    assert (choice.index, choice.finish_reason, choice.logprobs) == (0, "length", None)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 7
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 7
    assert answer.usage.prompt_tokens_details is not None


def test_usage_comes_last_in_a_stream_that_asks_for_it(client: OpenAI) -> None:
    chunks = list(
        client.completions.create(
            model="sim/small",
            prompt="One",
            max_tokens=9,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    *pieces, last = chunks
    assert {(chunk.id, chunk.created, chunk.model) for chunk in chunks} == {
        (last.id, last.created, "sim/small")
    }
    assert [piece.choices[0].finish_reason for piece in pieces].count("length") == 1
    assert all(piece.usage is None for piece in pieces)
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == 9


def test_prompts_and_samples_keep_their_places(client: OpenAI) -> None:
    answer = client.completions.create(
        model="sim/small", prompt=PROMPTS, n=2, temperature=0, max_tokens=40
    )
    assert [choice.index for choice in answer.choices] == list(range(2 * len(PROMPTS)))
    expected = [completed(client, prompt) for prompt in PROMPTS for _ in range(2)]
    assert [choice.text for choice in answer.choices] == expected


def test_token_ids_are_a_prompt(client: OpenAI) -> None:
    assert completed(client, list(b"xyz")) == completed(client, "xyz")


def test_seed_repeats_a_sampled_text(client: OpenAI) -> None:
    def sampled(seed: int) -> str:
        answer = client.completions.create(
            model="sim/small", prompt="One", seed=seed, max_tokens=40
        )
        return answer.choices[0].text

    assert sampled(1) == sampled(1)
    assert sampled(1) != sampled(2)


def test_text_ends_before_a_stop_string(client: OpenAI) -> None:
    text = completed(client, "One")
    stop = text[len(text) // 2 : len(text) // 2 + 7]  # spans tokens
    before = text[: text.index(stop)]
    assert before
    assert completed(client, "One", stop=["never to be seen", stop]) == before
    assert streamed(client, "One", stop=stop) == before


@pytest.mark.parametrize(
    ("options", "kind", "code", "param"),
    [
        pytest.param(
            {"model": "nobody/none"},
            openai.NotFoundError,
            "model_not_found",
            "model",
            id="unknown-model",
        ),
        pytest.param(
            {"model": "SIM/small"}, openai.NotFoundError, "model_not_found", "model", id="case"
        ),
        pytest.param(
            {"model": None},
            openai.BadRequestError,
            "missing_required_parameter",
            "model",
            id="no-model",
        ),
        pytest.param(
            {"max_tokens": "ten"},
            openai.BadRequestError,
            "invalid_type",
            "max_tokens",
            id="wrong-type",
        ),
        pytest.param(
            {"prompt": ["a", 5]}, openai.BadRequestError, "invalid_type", "prompt[1]", id="mixed"
        ),
        pytest.param(
            {"temperature": 2.5},
            openai.BadRequestError,
            "invalid_value",
            "temperature",
            id="out-of-range",
        ),
        pytest.param(
            {"best_of": 3}, openai.BadRequestError, "unsupported_parameter", "best_of", id="best-of"
        ),
        pytest.param(
            {"max_tokens": 2048},
            openai.BadRequestError,
            "context_length_exceeded",
            "max_tokens",
            id="too-many-tokens",
        ),
        pytest.param(
            {"prompt": "x" * 3000},
            openai.BadRequestError,
            "context_length_exceeded",
            "prompt",
            id="prompt-over-the-context",
        ),
        pytest.param(
            {"model": "sim/slow", "prompt": "FAULT"},
            openai.BadRequestError,
            "invalid_value",
            "prompt",
            id="refused-by-the-engine",
        ),
        pytest.param(
            {"prompt": "FAULT", "max_tokens": 60, "logit_bias": {"256": -100}},
            openai.InternalServerError,
            "backend_failure",
            None,
            id="engine-fails-again-and-again",
        ),
    ],
)
def test_errors_are_the_classes_that_the_client_knows(
    client: OpenAI,
    options: dict[str, Any],
    kind: type[openai.APIStatusError],
    code: str,
    param: str | None,
) -> None:
    body = {"model": "sim/small", "prompt": "One", **options}
    with pytest.raises(kind) as caught:
        client.completions.create(**body)
    error = caught.value
    assert (error.code, error.param) == (code, param)
    assert REQUEST_ID.fullmatch(error.request_id or "")
    with pytest.raises(openai.APIError) as caught_in_stream:
        list(client.completions.create(**body, stream=True))
    assert caught_in_stream.value.code == code


def test_models_are_listed_and_found(client: OpenAI) -> None:
    models = client.models.list().data
    assert [model.id for model in models] == ["sim/small", "sim/slow"]
    assert client.models.retrieve("sim/small").id == "sim/small"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("nobody/none")
    assert caught.value.code == "model_not_found"


def test_wrong_keys_are_refused(simulated: Platform, client: OpenAI) -> None:
    typo = simulated.api_key[:-1] + ("a" if simulated.api_key[-1] != "a" else "b")
    for key in (typo, "sk-other", "x" * 4000):
        with pytest.raises(openai.AuthenticationError) as caught:
            client.with_options(api_key=key).models.list()
        assert caught.value.code == "invalid_api_key"
        assert key not in caught.value.message


def test_key_works_for_its_models_until_it_is_revoked(simulated: Platform, client: OpenAI) -> None:
    made = json.loads(
        simulated.tera(
            *("keys", "create", "--tenant", "scoped", "--models", "sim/small", "--json")
        ).stdout
    )
    scoped = client.with_options(api_key=made["key"])

    def accepted() -> bool:
        try:
            scoped.models.list()
        except openai.AuthenticationError:
            return False
        return True

    until(accepted, timeout_s=5)
    assert [model.id for model in scoped.models.list().data] == ["sim/small"]
    assert completed(scoped, "One") == completed(client, "One")
    with pytest.raises(openai.NotFoundError) as hidden:
        scoped.completions.create(model="sim/slow", prompt="One")
    with pytest.raises(openai.NotFoundError) as unknown:
        scoped.completions.create(model="sim/none", prompt="One")
    assert hidden.value.message.replace("slow", "none") == unknown.value.message

    assert simulated.tera("keys", "revoke", made["key_id"]).returncode == 0
    until(lambda: not accepted(), timeout_s=5)
    assert completed(client, "One")

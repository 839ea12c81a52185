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
    text: str = answer.choices[0].text
    return text


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


def test_chat_answers_and_streams_the_same(client: OpenAI) -> None:
    asked: Any = {
        "model": "sim/small",
        "messages": [{"role": "user", "content": "naïve café 日本 🚀"}],
        "temperature": 0,
        "max_completion_tokens": 40,
    }
    whole = client.chat.completions.create(**asked)
    assert whole.id.startswith("chatcmpl-")
    assert (whole.choices[0].message.role, whole.choices[0].message.refusal) == ("assistant", None)
    with client.chat.completions.create(**asked, stream=True) as chunks:
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content


def test_chat_logprobs_are_what_the_client_knows(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model="sim/small",
        messages=[{"role": "user", "content": "Hello"}],
        temperature=0,
        max_tokens=5,
        logprobs=True,
        top_logprobs=3,
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    text = "".join(position.token for position in logprobs.content)
    assert text == answer.choices[0].message.content
    assert [len(position.top_logprobs) for position in logprobs.content] == [3] * 5


def test_the_streaming_helper_gathers_what_was_streamed(client: OpenAI) -> None:
    asked: Any = {
        "model": "sim/small",
        "messages": [{"role": "user", "content": "One"}],
        "temperature": 0,  # and no bound: the client refuses a text that was cut off
    }
    with client.chat.completions.stream(**asked, stream_options={"include_usage": True}) as stream:
        events = list(stream)
        final = stream.get_final_completion()
    whole = client.chat.completions.create(**asked)
    deltas = [event.delta for event in events if event.type == "content.delta"]
    assert "".join(deltas) == whole.choices[0].message.content
    assert [event.type for event in events].count("content.done") == 1
    assert final.choices[0].message.content == whole.choices[0].message.content
    assert final.choices[0].finish_reason == whole.choices[0].finish_reason
    assert final.usage is not None
    assert final.usage.total_tokens > 0


async def test_the_async_streaming_helper_works_too(async_client: AsyncOpenAI) -> None:
    asked: Any = {
        "model": "sim/small",
        "messages": [{"role": "user", "content": "One"}],
        "temperature": 0,  # and no bound: the client refuses a text that was cut off
    }
    async with async_client.chat.completions.stream(**asked, n=2) as stream:
        final = await stream.get_final_completion()
    whole = await async_client.chat.completions.create(**asked)
    texts = [choice.message.content for choice in final.choices]
    assert texts == [whole.choices[0].message.content] * 2


async def test_async_requests_that_are_cancelled_leave_nothing(
    simulated: Platform, async_client: AsyncOpenAI
) -> None:
    request = asyncio.create_task(
        async_client.completions.create(
            model="sim/small", prompt="One", max_tokens=1900, logit_bias={"256": -100}
        )
    )
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(1):
            await request
    await asyncio.to_thread(simulated.wait_until_idle, "small", 2)


def test_raw_responses_show_headers_and_parse(client: OpenAI) -> None:
    raw = client.completions.with_raw_response.create(model="sim/small", prompt="One", max_tokens=3)
    assert raw.status_code == 200
    assert raw.headers["content-type"] == "application/json"
    assert REQUEST_ID.fullmatch(raw.headers["x-request-id"])
    assert raw.request_id == raw.headers["x-request-id"]
    assert raw.parse().object == "text_completion"


def test_a_raw_stream_is_lines_as_they_come(client: OpenAI) -> None:
    with client.completions.with_streaming_response.create(
        model="sim/small", prompt="One", max_tokens=3, stream=True
    ) as raw:
        assert raw.headers["content-type"] == "text/event-stream; charset=utf-8"
        lines = [line for line in raw.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    assert all(line.startswith("data: {") for line in lines[:-1])


def test_a_raw_refusal_is_an_error_with_its_body(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.with_raw_response.create(model="sim/small", prompt="One", temperature=3)
    assert caught.value.type == "invalid_request_error"
    assert caught.value.body == {
        "message": caught.value.response.json()["error"]["message"],
        "type": "invalid_request_error",
        "param": "temperature",
        "code": "invalid_value",
    }


def test_fields_beyond_the_clients_own_are_passed_on(client: OpenAI) -> None:
    greedy = completed(client, "One")
    answer = client.completions.create(
        model="sim/small",
        prompt="One",
        max_tokens=40,
        extra_body={"top_k": 1, "min_p": 0.0, "no_such_field": 5},
        extra_headers={"x-of-mine": "yes"},
        extra_query={"version": "1"},
    )
    assert answer.choices[0].text == greedy
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="sim/small", prompt="One", extra_body={"top_k": -2})
    assert caught.value.param == "top_k"


@pytest.mark.parametrize(
    ("prompt", "code", "tries"),
    [
        pytest.param("FAULT for the retries", "backend_failure", 3, id="ours"),
        pytest.param("", "invalid_value", 1, id="the-clients"),
    ],
)
def test_the_client_tries_again_only_what_may_succeed(
    simulated: Platform, client: OpenAI, prompt: str, code: str, tries: int
) -> None:
    def answered() -> float:
        return simulated.sample("tera_requests_total", code=code, route="/v1/completions")

    before = answered()
    with pytest.raises(openai.APIStatusError) as caught:
        client.with_options(max_retries=2).completions.create(
            model="sim/small", prompt=prompt, max_tokens=60, logit_bias={"256": -100}
        )
    assert caught.value.response.json()["error"]["code"] == code
    assert answered() - before == tries


def test_a_client_that_waits_no_longer_frees_the_engine(
    simulated: Platform, client: OpenAI
) -> None:
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=1).completions.create(
            model="sim/small", prompt="One", max_tokens=1900, logit_bias={"256": -100}
        )
    simulated.wait_until_idle("small", replicas=2)


def test_a_stream_that_is_closed_early_frees_the_engine(
    simulated: Platform, client: OpenAI
) -> None:
    stream = client.completions.create(
        model="sim/small", prompt="One", max_tokens=1900, logit_bias={"256": -100}, stream=True
    )
    assert next(stream).choices
    stream.close()
    simulated.wait_until_idle("small", replicas=2)


def test_models_can_be_walked_through(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["sim/small", "sim/slow"]
    assert client.models.retrieve("sim").id == "sim"

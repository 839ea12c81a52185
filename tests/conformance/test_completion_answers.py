"""Rules C: what an answer of `POST /v1/completions` says."""

import json
import math
import re
import time
from functools import partial
from typing import Any

import pytest
from tests.conformance.answers import accepted, assert_refused
from tests.conformance.gateways import ABSENT, Gateway, InProcessGateway

MODEL_MEMBERS = {"id", "object", "created", "model", "choices", "usage"}


def test_c2_sixteen_tokens_are_made_by_default(text_gateway: Gateway) -> None:
    answer = accepted(text_gateway.complete(prompt="Once upon a time", max_tokens=ABSENT))
    assert answer["usage"]["completion_tokens"] <= 16
    if answer["choices"][0]["finish_reason"] == "length":
        assert answer["usage"]["completion_tokens"] == 16


def test_c2_exactly_max_tokens_are_made_and_no_more(text_gateway: Gateway) -> None:
    for max_tokens in (1, 2, 17):
        answer = accepted(text_gateway.complete(prompt="Once upon a time", max_tokens=max_tokens))
        assert answer["choices"][0]["finish_reason"] == "length"
        assert answer["usage"]["completion_tokens"] == max_tokens


@pytest.mark.parametrize("fields", [{"top_p": 0}, {"top_k": 1}, {"temperature": 0}], ids=str)
def test_c2_the_likeliest_token_can_be_asked_for_in_three_ways(
    text_gateway: Gateway, fields: dict[str, Any]
) -> None:
    greedy = partial(text_gateway.complete, max_tokens=20)
    asked = partial(text_gateway.complete, **{"temperature": 1, **fields, "max_tokens": 20})
    first, *others = map(accepted, text_gateway.together(greedy, asked, asked))
    assert [each["choices"] for each in others] == [first["choices"]] * 2


def test_c2_a_seed_repeats_a_text(text_gateway: Gateway) -> None:
    sampled = partial(text_gateway.complete, temperature=1, n=3, max_tokens=20)
    answers = text_gateway.together(*(partial(sampled, seed=seed) for seed in (5, 5, 6)))
    first, again, other = (accepted(answer)["choices"] for answer in answers)
    assert first == again != other
    assert len({choice["text"] for choice in first}) > 1


def test_c2_samples_at_temperature_zero_are_all_the_greedy_one(text_gateway: Gateway) -> None:
    [one] = accepted(text_gateway.complete(max_tokens=10))["choices"]
    answer = accepted(text_gateway.complete(max_tokens=10, n=3))
    assert [choice["text"] for choice in answer["choices"]] == [one["text"]] * 3


@pytest.mark.parametrize(
    ("prompts", "n", "allowed"),
    [
        (1, 128, True),
        (2, 64, True),
        (128, 1, True),
        (2, 65, False),
        (128, 2, False),
        (64, 3, False),
    ],
)
def test_c2_prompts_times_samples_are_bounded(
    in_process: InProcessGateway, prompts: int, n: int, allowed: bool
) -> None:
    answer = in_process.complete(prompt=["x"] * prompts, n=n, max_tokens=1)
    if allowed:
        assert len(accepted(answer)["choices"]) == 128
    else:
        assert_refused(answer, "invalid_value", "n")


@pytest.mark.parametrize("n", [1, 2])
def test_c2_best_of_is_n_only(gateway: Gateway, n: int) -> None:
    accepted(gateway.complete(n=n, best_of=n))
    for best_of in (n + 1, n - 1, 0):
        if best_of != n:
            answer = gateway.complete(n=n, best_of=best_of)
            assert_refused(answer, "unsupported_parameter", "best_of")


@pytest.mark.parametrize("stream", [False, None, ABSENT], ids=["false", "null", "absent"])
@pytest.mark.parametrize("include_usage", [True, False])
def test_c2_stream_options_without_a_stream_are_refused(
    gateway: Gateway, stream: Any, include_usage: bool
) -> None:
    options = {"include_usage": include_usage}
    for ask in (gateway.complete, gateway.chat):
        answer = ask(stream=stream, stream_options=options)
        assert_refused(answer, "invalid_value", "stream_options")


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"include_usage": 1}, "stream_options.include_usage"),
        ({"include_usage": "true"}, "stream_options.include_usage"),
        ([], "stream_options"),
        (True, "stream_options"),
    ],
    ids=str,
)
def test_c2_stream_options_have_their_types(gateway: Gateway, options: Any, param: str) -> None:
    for ask in (gateway.complete, gateway.chat):
        answer = ask(stream=True, stream_options=options)
        assert_refused(answer, "invalid_type", param)


def test_c2_the_text_ends_before_a_stop_string(text_gateway: Gateway) -> None:
    asked = {"prompt": "Once upon a time", "max_tokens": 20}
    [choice] = accepted(text_gateway.complete(**asked))["choices"]
    text = choice["text"]
    stops = [
        text[at : at + length] for at in (0, len(text) // 2, len(text) - 3) for length in (1, 3)
    ]
    answers = text_gateway.together(
        *(
            partial(text_gateway.complete, **asked, stop=["never to be seen", stop])
            for stop in stops
        )
    )
    for stop, answer in zip(stops, answers, strict=True):
        [choice] = accepted(answer)["choices"]
        assert choice["text"] == text[: text.index(stop)]
        assert choice["finish_reason"] == "stop"


def test_c2_of_two_stop_strings_the_one_that_is_complete_first_ends_the_text(
    text_gateway: Gateway,
) -> None:
    asked = {"prompt": "Once upon a time", "max_tokens": 20}
    text = accepted(text_gateway.complete(**asked))["choices"][0]["text"]
    later, sooner = text[30:34], text[10:13]
    answer = accepted(text_gateway.complete(**asked, stop=[later, sooner]))
    assert answer["choices"][0]["text"] == text[: min(text.index(later), text.index(sooner))]


def test_c2_tokens_after_a_stop_string_are_not_counted(text_gateway: Gateway) -> None:
    asked = {"prompt": "Once upon a time", "max_tokens": 20}
    text = accepted(text_gateway.complete(**asked))["choices"][0]["text"]
    answer = accepted(text_gateway.complete(**asked, stop=text[len(text) // 2 :][:5]))
    assert 0 < answer["usage"]["completion_tokens"] < 20


def test_c2_echo_begins_the_text_with_the_prompt(text_gateway: Gateway) -> None:
    [choice] = accepted(text_gateway.complete(prompt="Once upon", max_tokens=5))["choices"]
    answer = accepted(text_gateway.complete(prompt="Once upon", max_tokens=5, echo=True))
    assert answer["choices"][0]["text"] == "Once upon" + choice["text"]
    assert answer["usage"]["completion_tokens"] == 5


@pytest.mark.parametrize("prompt", ["é日本🚀e\u0301 مرحبا", "  two  spaces \n\n"])
def test_c2_echo_repeats_any_prompt(text_gateway: Gateway, prompt: str) -> None:
    answer = accepted(text_gateway.complete(prompt=[prompt, "x"], echo=True, n=2))
    found = [choice["text"].startswith(prompt) for choice in answer["choices"]]
    assert found == [True, True, False, False]


def test_c2_echo_repeats_token_ids_as_text(gateway: Gateway) -> None:
    answer = accepted(gateway.complete(prompt=list("é🚀x".encode()), echo=True))
    assert answer["choices"][0]["text"].startswith("é🚀x")


def test_c2_stop_strings_are_not_looked_for_in_an_echoed_prompt(text_gateway: Gateway) -> None:
    answer = accepted(
        text_gateway.complete(prompt="Once QXZ upon", echo=True, stop="QXZ", max_tokens=5)
    )
    assert answer["choices"][0]["text"].startswith("Once QXZ upon")
    assert answer["usage"]["completion_tokens"] == 5


def test_c2_a_bias_forces_and_forbids_a_token(text_gateway: Gateway) -> None:
    forced = accepted(text_gateway.complete(logit_bias={"65": 100}, max_tokens=4, echo=False))
    assert forced["usage"]["completion_tokens"] == 4
    twice = accepted(text_gateway.complete(logit_bias={"65": 100}, max_tokens=2))
    text = forced["choices"][0]["text"]
    assert text == text[: len(text) // 4] * 4
    assert twice["choices"][0]["text"] * 2 == text
    free = accepted(text_gateway.complete(max_tokens=1))["choices"]
    assert free[0]["text"] != text[: len(text) // 4]


@pytest.mark.parametrize("logprobs", [0, 1, 5])
@pytest.mark.parametrize("echo", [False, True])
def test_c4_logprobs_have_openais_legacy_form(
    text_gateway: Gateway, logprobs: int, echo: bool
) -> None:
    answer = accepted(
        text_gateway.complete(prompt="Once upon a time", max_tokens=8, logprobs=logprobs, echo=echo)
    )
    [choice] = answer["choices"]
    found = choice["logprobs"]
    assert set(found) == {"tokens", "token_logprobs", "top_logprobs", "text_offset"}
    prompt_tokens = answer["usage"]["prompt_tokens"] if echo else 0
    assert {len(found[name]) for name in found} == {prompt_tokens + 8}
    assert "".join(found["tokens"]) == choice["text"]
    assert found["text_offset"][0] == 0
    starts = [sum(map(len, found["tokens"][:at])) for at in range(len(found["tokens"]))]
    assert found["text_offset"] == starts
    if echo:
        assert found["token_logprobs"][0] is None
        assert found["top_logprobs"][0] is None
    for token, logprob, top in list(
        zip(found["tokens"], found["token_logprobs"], found["top_logprobs"], strict=True)
    )[1 if echo else 0 :]:
        assert math.isfinite(logprob)
        assert logprob <= 0
        assert top[token] == logprob
        assert logprobs <= len(top) + 1
        assert len(top) <= logprobs + 1


def test_c3_the_response_has_exactly_these_members(text_gateway: Gateway) -> None:
    answer = accepted(text_gateway.complete(user="somebody", seed=1, unknown=1))
    assert set(answer) == MODEL_MEMBERS
    assert re.fullmatch(r"cmpl-[0-9a-f]{32}", answer["id"])
    assert answer["object"] == "text_completion"
    assert type(answer["created"]) is int
    assert abs(answer["created"] - time.time()) < 60
    assert answer["model"] == text_gateway.model
    [choice] = answer["choices"]
    assert set(choice) == {"text", "index", "logprobs", "finish_reason"}
    assert (type(choice["text"]), choice["index"], choice["logprobs"]) == (str, 0, None)
    assert choice["finish_reason"] in ("stop", "length")
    usage = answer["usage"]
    assert set(usage) == {
        *("prompt_tokens", "completion_tokens", "total_tokens", "prompt_tokens_details")
    }
    assert set(usage["prompt_tokens_details"]) == {"cached_tokens"}


def test_c3_ids_are_new_each_time(gateway: Gateway) -> None:
    assert len({accepted(gateway.complete())["id"] for _ in range(5)}) == 5


def test_c4_sample_j_of_prompt_i_is_at_j_plus_n_times_i(text_gateway: Gateway) -> None:
    prompts, n = ["One", "Once upon a time", "1, 2, 3,"], 2
    ask = partial(text_gateway.complete, max_tokens=8)
    together, *each = text_gateway.together(
        partial(ask, prompt=prompts, n=n), *(partial(ask, prompt=prompt) for prompt in prompts)
    )
    choices = accepted(together)["choices"]
    assert [choice["index"] for choice in choices] == list(range(6))
    for i, answer in enumerate(each):
        [alone] = accepted(answer)["choices"]
        for j in range(n):
            assert choices[j + n * i]["text"] == alone["text"]


def test_c4_a_finished_text_says_stop_and_a_cut_one_length(gateway: Gateway) -> None:
    # The end of sequence is forced, or forbidden: it is this vocabulary's token 256.
    for bias, reason, tokens in ((100, "stop", 1), (-100, "length", 5)):
        answer = accepted(gateway.complete(logit_bias={"256": bias}, max_tokens=5))
        [choice] = answer["choices"]
        assert choice["finish_reason"] == reason
        assert answer["usage"]["completion_tokens"] == tokens
        assert bool(choice["text"]) == (reason == "length")


def test_c5_usage_counts_each_prompt_once_and_all_choices(text_gateway: Gateway) -> None:
    prompts = [[65, 66, 67], [68], [69] * 40]
    answer = accepted(text_gateway.complete(prompt=prompts, n=2, max_tokens=4))
    usage = answer["usage"]
    assert usage["prompt_tokens"] == 44
    assert all(choice["finish_reason"] == "length" for choice in answer["choices"])
    assert usage["completion_tokens"] == 3 * 2 * 4
    assert usage["total_tokens"] == 44 + 24
    assert 0 <= usage["prompt_tokens_details"]["cached_tokens"] <= 44


def test_c5_a_repeated_prompt_is_found_in_the_cache(in_process: InProcessGateway) -> None:
    prompt = [70] * 100
    first, second = (accepted(in_process.complete(prompt=prompt))["usage"] for _ in range(2))
    assert second["prompt_tokens_details"]["cached_tokens"] >= 64
    assert (first["prompt_tokens"], second["prompt_tokens"]) == (100, 100)


@pytest.mark.parametrize("stream", [False, True])
def test_c6_one_prompt_that_fails_cancels_the_rest(
    in_process: InProcessGateway, stream: bool
) -> None:
    answer = in_process.complete(
        prompt=["One", "FAULT", "Two"], max_tokens=400, logit_bias={"256": -100}, stream=stream
    )
    assert b"backend_failure" in answer.content
    in_process.wait_until_idle()


def test_c6_many_prompts_run_in_parallel(in_process: InProcessGateway) -> None:
    answer = in_process.complete(prompt=["x"] * 16, max_tokens=20, stream=True)
    order = [
        json.loads(line.removeprefix("data: "))["choices"][0]["index"]
        for line in answer.text.split("\n\n")
        if line.startswith("data: {")
    ]
    assert order != sorted(order)


def test_c2_an_alias_is_a_model(gateway: Gateway) -> None:
    assert accepted(gateway.complete(model="sim"))["model"] == "sim"

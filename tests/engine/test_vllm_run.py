"""H-9: what of vLLM's own words reaches a client."""

import logging

import pytest

from tera.engine.vllm_run import reason_for_client

UNTOLD = "The engine refuses these parameters."


@pytest.mark.parametrize(
    "text",
    [
        "max_tokens must be at least 1, got 0.",
        "top_k must be 0 (disable), or at least 1, got -5.",
        "The tokens generated so far do not fit the format asked for, at 3/4 of them.",
        "Invalid value <tool_call></tool_call> in a list of stop strings",
    ],
)
def test_h9_a_reason_about_the_request_is_told(text: str) -> None:
    assert reason_for_client(text) == text


@pytest.mark.parametrize(
    "text",
    [
        "[10:02:11] /project/cpp/grammar_functor.cc:123: Regex parsing error",
        "grammar_functor.cc:123: Regex parsing error",
        "Can't load tokenizer for '/models/huggingface/hub/qwen'",
        'File "/opt/venv/lib/site-packages/vllm/engine.py", line 5, in step',
        "Connection to 10.0.3.17:6379 refused",
        "Failed to reach tcp://worker-3",
        "no route to prod-redis.llm.svc.cluster.local",
        "<vllm.v1.Request object at 0x7f33aa01bc10> has ended",
        "vllm.sampling_params.SamplingParams has no such field",
        "",
        "\n",
    ],
)
def test_h9_a_reason_that_shows_the_inside_is_logged_and_not_told(
    text: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "tera")
    assert reason_for_client(text) == UNTOLD
    assert ascii(text) in caplog.text


def test_h9_only_the_first_line_is_told_bounded_and_without_vllms_parameter() -> None:
    assert reason_for_client("wrong value (parameter=seed, value=1)") == "wrong value"
    assert reason_for_client("wrong value\nTraceback (most recent call last)") == "wrong value"
    assert len(reason_for_client("x" * 100_000)) == 512

"""Penalties over resumed tokens, by the code of vLLM's own model runners."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tera.upstream.vllm_penalties import RESUMED, count_resumed_in_v1

# What vLLM and torch warn themselves of is not ours to mend.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.vllm,
    pytest.mark.filterwarnings("ignore::Warning"),
]

VOCAB_SIZE = 5000
PROMPT = [*range(100), 7, 7]
RESUMED_IDS = [*range(50, 1700), 60, 60]
"""More different ones than a `logit_bias` may name."""
GENERATED = [60, 4000, 4000]
PENALTIES: dict[str, Any] = {
    "presence_penalty": 0.7,
    "frequency_penalty": 0.3,
    "repetition_penalty": 1.2,
}


def v1_logits(requests: list[tuple[list[int], list[int], int]]) -> Any:
    """Return the logits that V1 samples from, for rows of (prompt, generated, resumed)."""
    import torch
    from vllm import SamplingParams
    from vllm.v1.sample.sampler import Sampler
    from vllm.v1.worker.gpu_input_batch import CachedRequestState, InputBatch
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    batch: Any = InputBatch(4, 4096, 4096, torch.device("cpu"), VOCAB_SIZE, [16], [256])
    runner: Any = SimpleNamespace(input_batch=batch, requests={}, sampler=Sampler())
    for number, (prompt, generated, resumed) in enumerate(requests):
        request = CachedRequestState(
            req_id=str(number),
            prompt_token_ids=prompt,
            mm_features=[],
            sampling_params=SamplingParams(
                temperature=0, extra_args={RESUMED: resumed} if resumed else None, **PENALTIES
            ),
            generator=None,
            block_ids=([],),
            num_computed_tokens=0,
            output_token_ids=generated,
        )
        runner.requests[request.req_id] = request
        batch.add_request(request)
    batch.refresh_metadata()
    seen: list[Any] = []

    def sample(logits: Any, metadata: Any) -> tuple[Any, None]:
        seen.append(logits.clone())
        return logits.argmax(-1), None

    runner.sampler.sample = sample
    runner._sample = partial(GPUModelRunner._sample, runner)
    count_resumed_in_v1(runner)
    before = batch.sampling_metadata
    logits = torch.randn(VOCAB_SIZE, generator=torch.Generator().manual_seed(1))
    runner._sample(logits.repeat(len(requests), 1), None)
    assert batch.sampling_metadata is before
    return seen[0]


def test_the_first_runner_counts_resumed_tokens_as_generated_ones() -> None:
    undisturbed, resumed, other = v1_logits(
        [
            (PROMPT, [*RESUMED_IDS, *GENERATED], 0),
            (PROMPT + RESUMED_IDS, [*GENERATED], len(RESUMED_IDS)),
            (PROMPT + RESUMED_IDS, [*GENERATED], 0),
        ]
    )
    assert resumed.equal(undisturbed)
    assert not other.equal(undisturbed)  # so the difference is seen here


def test_the_second_runner_counts_resumed_tokens_as_generated_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # In a process of its own: Triton's kernels run without a GPU only where its interpreter is
    # chosen before anything of it is imported.
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    script = Path(__file__).with_name("v2_penalties.py")
    asked = [PROMPT, RESUMED_IDS, GENERATED, VOCAB_SIZE, PENALTIES]
    process = subprocess.run(  # noqa: S603  our own file
        [sys.executable, str(script), json.dumps(asked)],
        stdout=subprocess.PIPE,
        check=True,
    )
    assert json.loads(process.stdout) == {
        "counts": True,
        "logits": True,
        "logits without": False,
        "prompt length of others": len(PROMPT + RESUMED_IDS),
    }

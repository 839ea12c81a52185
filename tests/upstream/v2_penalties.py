"""Runs the penalties of vLLM's V2 model runner on the CPU, by Triton's interpreter.

Prints whether they make of a resumed generation what they make of one that vLLM has preempted and
taken up again, which is the case that they are made for.
"""

import json
import sys
from typing import Any

import torch
import triton
import triton.language as tl
import vllm.triton_utils

vllm.triton_utils.triton, vllm.triton_utils.tl = triton, tl  # vLLM's stand-ins without a GPU

import vllm.v1.worker.gpu.buffer_utils as buffers  # noqa: E402
from vllm import SamplingParams  # noqa: E402
from vllm.v1.worker.gpu.sample.logits_processor.interface import (  # noqa: E402
    LogitsContext,
    LogitsProcRequestState,
)
from vllm.v1.worker.gpu.sample.penalties import PenaltiesState  # noqa: E402
from vllm.v1.worker.gpu.states import RequestState  # noqa: E402

from tera.upstream.vllm_penalties import RESUMED, count_resumed_in_v2  # noqa: E402

# Memory that a GPU reads too; vLLM asks for it here, but does not export the name.
buffers.is_uva_available = lambda: False  # type: ignore[attr-defined, assignment]
CPU = torch.device("cpu")


def main() -> None:
    prompt, resumed, generated, vocab_size, penalties = json.loads(sys.argv[1])
    states = RequestState(3, 4096, 4096, 1, vocab_size, CPU, use_dense_all_token_ids=True)
    config: Any = None
    state = PenaltiesState(config, LogitsProcRequestState.from_request_state(states))
    count_resumed_in_v2(state)
    rows = []
    for name, prompt_tokens, count in (
        ("preempted", len(prompt), 0),
        ("resumed", len(prompt + resumed), len(resumed)),
        ("not told", len(prompt + resumed), 0),
    ):
        states.add_request(name, prompt_tokens, prompt + resumed + generated, 0, 100)
        rows.append(states.req_id_to_index[name])
        extra_args = {RESUMED: count} if count else None
        state.add_request(rows[-1], SamplingParams(extra_args=extra_args, **penalties))
    states.apply_staged_writes()
    state.apply_staged_writes()

    logits = torch.randn(vocab_size, generator=torch.Generator().manual_seed(1))
    index = torch.tensor(rows, dtype=torch.int32)
    zeros = torch.zeros(3, dtype=torch.int32)
    context = LogitsContext(
        expanded_idx_mapping=index,
        idx_mapping=index,
        idx_mapping_np=index.numpy(),
        expanded_local_pos=zeros,
        input_ids=zeros,
        pos=zeros,
        seq_lens_upper_bound_np=zeros.numpy(),
    )
    preempted, resumed_logits, untold = state.apply(logits.repeat(3, 1), context)
    counts = state.output_bin_counts[rows]
    report = {
        "counts": counts[0].equal(counts[1]),
        "logits": preempted.equal(resumed_logits),
        "logits without": preempted.equal(untold),
        "prompt length of others": int(states.prompt_len.np[rows[1]]),
    }
    print(json.dumps(report))


main()

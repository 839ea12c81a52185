"""Converts a generation's sampling to vLLM's parameters."""

from typing import TYPE_CHECKING

from tera.generation import Generation
from tera.upstream.vllm_penalties import RESUMED

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams

_SEED_STRIDE = 0x9E3779B97F4A7C15


def sampling_params(generation: Generation) -> "SamplingParams":
    """Return vLLM's parameters for a generation.

    Raises:
        VLLMClientError: vLLM refuses them.
    """
    from vllm.sampling_params import (
        RequestOutputKind,
        SamplingParams,
        StructuredOutputsParams,
    )

    sampling = generation.sampling
    greedy = sampling.temperature <= 0 or sampling.top_p <= 0
    return SamplingParams(
        max_tokens=sampling.max_tokens,
        temperature=0.0 if greedy else sampling.temperature,
        top_p=1.0 if greedy else sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        seed=_seed(sampling.seed, generation.resumed_tokens),
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        repetition_penalty=sampling.repetition_penalty,
        logit_bias=sampling.logit_bias or None,
        logprobs=sampling.logprobs,
        prompt_logprobs=sampling.prompt_logprobs,
        ignore_eos=sampling.ignore_eos,
        structured_outputs=(
            None if sampling.structured is None else StructuredOutputsParams(**sampling.structured)
        ),
        extra_args={RESUMED: generation.resumed_tokens} if generation.resumed_tokens else None,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
        skip_clone=True,  # this object is used for this generation only
    )


def _seed(seed: int | None, resumed_tokens: int) -> int | None:
    """Return a seed that torch accepts: 63 bits, and different for each point of resumption."""
    if seed is None:
        return None
    return (seed + resumed_tokens * _SEED_STRIDE) & (2**63 - 1)

"""What every engine refuses, checked in one place so that clients see the same messages."""

from tera.errors import ContextLengthError, InvalidValueError
from tera.generation import Generation

MAX_LOGIT_BIAS_TOKENS = 1024
"""Most tokens that a `logit_bias` may name. vLLM's model runner for GPUs has no room for more, and
crashes, with everything it runs, if it gets more."""


def check_bounds(generation: Generation, context_tokens: int) -> None:
    """Refuse generations that no engine could run.

    Raises:
        ContextLengthError: the prompt fills the context.
        InvalidValueError: `logit_bias` names too many tokens.
    """
    prompt_tokens = len(generation.token_ids)
    if prompt_tokens >= context_tokens:
        raise ContextLengthError(
            f"This model's context is {context_tokens} tokens; the prompt has {prompt_tokens} "
            "and leaves no room for an answer.",
            param="prompt",
        )
    if len(generation.sampling.logit_bias or {}) > MAX_LOGIT_BIAS_TOKENS:
        raise InvalidValueError(
            f"logit_bias may name at most {MAX_LOGIT_BIAS_TOKENS} tokens.", param="logit_bias"
        )

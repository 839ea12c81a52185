"""What an engine refuses whatever its kind, so that a client meets one message and not two."""

from tera.errors import ContextLengthError, InvalidValueError
from tera.generation import Generation

MAX_LOGIT_BIAS_TOKENS = 1024
"""Most tokens that a `logit_bias` may name. vLLM's model runner for GPUs has room for no more, and
ends, with all that it runs, if it is given more."""


def check_bounds(generation: Generation, context_tokens: int) -> None:
    """Refuse what no engine could take.

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

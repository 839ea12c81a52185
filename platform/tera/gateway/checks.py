"""Checks a request against the model that it names."""

from collections.abc import Iterable

from tera.errors import ContextLengthError, InvalidValueError
from tera.gateway.render import TextModel


def check_context(context_length: int, prompt_tokens: int, max_tokens: int) -> None:
    """Check that prompt and completion fit the model's context.

    Raises:
        ContextLengthError: they do not.
    """
    if prompt_tokens + max_tokens > context_length:
        raise ContextLengthError(
            f"This model's context holds {context_length} tokens, but the request asks for "
            f"{prompt_tokens + max_tokens}: {prompt_tokens} of the prompt and {max_tokens} "
            "of max_tokens. Shorten the prompt or lower max_tokens.",
            param="max_tokens" if prompt_tokens < context_length else "prompt",
        )


def check_biases(text: TextModel, biases: Iterable[int] | None) -> None:
    """Check that all biased tokens are in the model's vocabulary.

    Raises:
        InvalidValueError: one is not.
    """
    for token_id in biases or ():
        if token_id >= text.vocab_size:
            raise InvalidValueError(
                f"Invalid 'logit_bias': the key '{token_id}' is not a token id of the model; they "
                f"go from 0 to {text.vocab_size - 1}.",
                param="logit_bias",
            )

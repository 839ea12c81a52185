"""Checks a request against the model that it names."""

from collections.abc import Iterable
from typing import Final

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


MAX_ECHOED_LOGPROBS: Final = 65_536
"""Entries for all echoed prompts of a request, in all of its choices. They make an answer of some
2 MB, which takes 20 ms to encode."""


def check_echo(prompt_tokens: int, n: int, logprobs: int) -> None:
    """Check that the log-probabilities of echoed prompts fit an answer.

    Args:
        prompt_tokens: of all prompts.
        n: answers to each prompt, all of which echo it.
        logprobs: likeliest tokens at each position, in addition to the prompt's own.

    Raises:
        InvalidValueError: they do not.
    """
    entries = prompt_tokens * n * (logprobs + 1)
    if entries > MAX_ECHOED_LOGPROBS:
        raise InvalidValueError(
            f"Invalid 'echo': prompt tokens × n × (logprobs + 1) must be at most "
            f"{MAX_ECHOED_LOGPROBS}, but {prompt_tokens} × {n} × {logprobs + 1} is {entries}.",
            param="echo",
        )


MAX_GENERATED_LOGPROBS: Final = 131_072
"""Entries for all generated tokens of a request. While a client does not read, or waits for the
whole answer, a gateway holds up to 140 bytes for each: 18 MB. Without a bound, 128 answers of 2,048
tokens with 20 likely ones each were 5.5 million: 580 MB, and 2 GB and 40 s while they were encoded.
"""


def most_told_tokens(choices: int, logprobs: int | None) -> int | None:
    """Return how long each answer may be so that its log-probabilities fit; None means any length.

    Args:
        choices: answers to all prompts.
        logprobs: likeliest tokens at each position, in addition to the drawn one.
    """
    return None if logprobs is None else MAX_GENERATED_LOGPROBS // (choices * (logprobs + 1))


def check_logprobs(max_tokens: int, choices: int, logprobs: int | None) -> None:
    """Check that the log-probabilities of generated tokens fit; see `most_told_tokens`.

    Raises:
        InvalidValueError: they do not.
    """
    if logprobs is not None and max_tokens * choices * (logprobs + 1) > MAX_GENERATED_LOGPROBS:
        raise InvalidValueError(
            f"Invalid 'logprobs': max tokens × answers × (likeliest tokens + 1) must be at most "
            f"{MAX_GENERATED_LOGPROBS}, but {max_tokens} × {choices} × {logprobs + 1} is "
            f"{max_tokens * choices * (logprobs + 1)}.",
            param="logprobs",
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

"""A client's request in the one form that the pipeline knows, independent of the API."""

from dataclasses import dataclass, field
from typing import Any

import msgspec

from tera.config.model import Capability
from tera.contract.completions import Prompt
from tera.generation import Sampling


@dataclass(frozen=True, slots=True)
class Prompts:
    """Raw prompts, each either text or token ids."""

    prompts: list[Prompt]
    paths: list[str]
    """The path of each in the client's request, for error messages."""
    echo: bool = False
    """Whether each answer begins with its prompt."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages for a model's chat template, in the form of OpenAI's chat API."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool = True
    response_format: dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None


@dataclass(frozen=True, slots=True)
class TextRequest:
    """A request for text: its prompts or conversation, the sampling, and the length."""

    model: str
    """As the client names it."""
    capability: Capability
    """What the model must offer."""
    content: Prompts | Conversation
    sampling: Sampling
    """Includes the bound of `max_tokens`, if that is given."""
    max_tokens: int | None
    """None means what the context leaves."""
    n: int = 1
    """Answers per prompt."""
    stops: list[str] = field(default_factory=list)
    user: str = ""


def of_sample(sampling: Sampling, sample: int) -> Sampling:
    """Return the sampling of one of several samples, each with its own seed, as vLLM does.

    Only the first one requests the log-probabilities of the prompt, for which an engine has to
    compute all of it, whatever it has cached.
    """
    if sample == 0:
        return sampling
    seed = sampling.seed
    if seed is not None:
        # Wrapped around, to stay a signed 64-bit number.
        seed = (seed + sample + 2**63) % 2**64 - 2**63
    return msgspec.structs.replace(sampling, seed=seed, prompt_logprobs=None)

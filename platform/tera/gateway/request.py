"""What a client wants, whichever API it came by: the one form that the pipeline knows."""

from dataclasses import dataclass, field
from typing import Any

from tera.config.model import Capability
from tera.contract.completions import Prompt
from tera.generation import Sampling


@dataclass(frozen=True, slots=True)
class Prompts:
    """Raw prompts, each of them text or token ids."""

    prompts: list[Prompt]
    paths: list[str]
    """Where each stands in the client's request, for error messages."""
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
    """A request for text: what to go on from, how to draw, and how much of it."""

    model: str
    """As the client names it."""
    capability: Capability
    """What the model has to offer for it."""
    content: Prompts | Conversation
    sampling: Sampling
    """With the bound on tokens that `max_tokens` says, if it says one."""
    max_tokens: int | None
    """None is what the context leaves."""
    n: int = 1
    """Answers to each prompt."""
    stops: list[str] = field(default_factory=list)
    user: str = ""

"""Text to token ids and back; the only place where a request is text.

A stream's text state (detokeniser, stop strings) lives here, in the gateway, and so survives
the death of the replica that generates its tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from tera.contract.chat_answers import ToolCallDelta
from tera.contract.completions import Prompt
from tera.errors import InvalidValueError
from tera.gateway.request import Conversation


class Detokenizer(Protocol):
    """Turns the ids of one completion into text, piece by piece."""

    def push(self, token_id: int) -> str:
        """Return the text that this token completes; empty in the middle of a UTF-8 character."""
        ...


@dataclass(frozen=True, slots=True)
class AnswerPiece:
    """A piece of generated text, separated into the parts of a chat answer."""

    content: str = ""
    reasoning: str = ""
    tool_calls: Sequence[ToolCallDelta] = ()


class AnswerParser(Protocol):
    """Separates a chat answer's content, reasoning and tool calls, piece by piece."""

    def push(self, text: str, token_ids: list[int], *, finished: bool) -> AnswerPiece:
        """Return what the text adds; text may be held back until its meaning is known."""
        ...


@dataclass(frozen=True, slots=True)
class RenderedChat:
    """A conversation as the model sees it."""

    token_ids: list[int]
    structured: dict[str, Any] | None = None
    """What the engine masks tokens with: a response format, or a forced tool call."""
    special_tokens: bool = False
    """Whether special tokens appear in the text, because the parser looks for them."""


class TokenText(NamedTuple):
    """One token alone."""

    text: str
    """With U+FFFD in place of an incomplete character."""
    data: bytes
    """The bytes it stands for: those of all tokens of a text join to the text's UTF-8."""


class TextModel(Protocol):
    """A model's text side in the gateway; it needs no GPU and no weights."""

    @property
    def context_length(self) -> int:
        """Prompt and completion together, in tokens."""
        ...

    @property
    def vocab_size(self) -> int:
        """Token ids are below it."""
        ...

    async def encode(self, text: str) -> list[int]:
        """Return the token ids of a raw prompt, special tokens as the model wants them.

        Raises:
            ContextLengthError: the text is too long to fit in any case, and was not encoded.
        """
        ...

    async def render_chat(self, conversation: Conversation) -> RenderedChat:
        """Return the conversation as rendered by the model's chat template.

        Raises:
            UnsupportedParameterError: the model has no chat template, or no parser for tools; or
                a part of a schema would not be enforced.
            InvalidValueError: the template refuses the conversation.
            ContextLengthError: the rendered text is too long to fit in any case.
        """
        ...

    async def check_structured(self, tenant: str, size_bytes: int, chat: RenderedChat) -> None:
        """Return if engines can compile what a rendered conversation asks for.

        Args:
            tenant: whose turn it takes.
            size_bytes: of the request.
            chat: what `render_chat` has returned.

        Raises:
            UnsupportedParameterError: a part of a schema would not be enforced.
            InvalidValueError: it is not a schema, or takes too long to compile.
            EngineOverloadedError: too many are waiting to be compiled already.
        """
        ...

    def answer_parser(
        self, conversation: Conversation, rendered: RenderedChat
    ) -> AnswerParser | None:
        """Return the parser of one new answer; None if all of it is content."""
        ...

    def detokenizer(
        self, prompt_token_ids: list[int], *, special_tokens: bool = False
    ) -> Detokenizer:
        """Return the text state of a new completion of this prompt."""
        ...

    def token_texts(self, token_ids: list[int]) -> list[TokenText]:
        """Return the text of each token by itself, for log-probabilities."""
        ...


class StopStrings:
    """Looks for stop strings in a text that arrives in pieces.

    Text is held back only while it may be the beginning of a stop string, and never longer.
    """

    def __init__(self, stops: list[str]) -> None:
        self._stops = stops
        self._longest = max(map(len, stops), default=0)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Take more text; return what may be shown and whether a stop string ended it.

        Of several stop strings, the one that is completed first wins; of those, the longest.
        """
        if not self._stops:
            return text, False
        held = self._held + text
        if text:
            # One character at a time, as if each token were one character: the result must not
            # depend on how the text was cut.
            for end in range(len(self._held) + 1, len(held) + 1):
                ended = [stop for stop in self._stops if held.endswith(stop, 0, end)]
                if ended:
                    self._held = ""
                    return held[: end - max(map(len, ended))], True
        keep = self._prefix_at_end(held)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep], False

    def flush(self) -> str:
        """Return what was held back, once the completion has ended by itself."""
        held, self._held = self._held, ""
        return held

    def _prefix_at_end(self, text: str) -> int:
        """Return the length of the longest suffix of `text` that begins a stop string."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            end = text[len(text) - length :]
            if any(len(stop) > length and stop.startswith(end) for stop in self._stops):
                return length
        return 0


async def render_prompt(
    text: TextModel, prompt: Prompt, path: str, *, echo: bool
) -> tuple[list[int], str | None]:
    """Return the token ids of a raw prompt, and its text if its answers echo it.

    Raises:
        InvalidValueError: an id is outside the vocabulary.
        ContextLengthError: the text is so long that it cannot fit.
    """
    token_ids = await _token_ids(text, prompt, path)
    return token_ids, _as_text(text, prompt) if echo else None


async def _token_ids(text: TextModel, prompt: Prompt, path: str) -> list[int]:
    if isinstance(prompt, str):
        return await text.encode(prompt)
    # There may be a million: a prompt that cannot fit anyway is not checked.
    if len(prompt) > text.context_length or 0 <= min(prompt) <= max(prompt) < text.vocab_size:
        return prompt
    for position, token_id in enumerate(prompt):
        if not 0 <= token_id < text.vocab_size:
            raise InvalidValueError(
                f"Invalid '{path}[{position}]': must be a token id from 0 to "
                f"{text.vocab_size - 1}, but {token_id} was given.",
                param=f"{path}[{position}]",
            )
    return prompt


def _as_text(text: TextModel, prompt: Prompt) -> str:
    if isinstance(prompt, str):
        return prompt
    detokenizer = text.detokenizer([])
    return "".join(map(detokenizer.push, prompt))

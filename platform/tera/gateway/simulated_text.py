"""The text side of simulated models, with a vocabulary of bytes and words."""

import codecs
from functools import cache

from pydantic import JsonValue

from tera.engine.simulated_args import SimulatedArgs
from tera.engine.simulated_vocabulary import Vocabulary
from tera.errors import UnsupportedParameterError
from tera.gateway.least_tokens import ContextBound, LeastTokens
from tera.gateway.render import RenderedChat, TokenText
from tera.gateway.request import Conversation


class SimulatedDetokenizer:
    """Decodes bytes to text, holding back an incomplete UTF-8 character."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """Return the text that this token completes."""
        if token_id == self._vocabulary.eos_id:
            return ""
        return self._decoder.decode(self._vocabulary.token_bytes(token_id))


class SimulatedTextModel:
    """The vocabulary of the simulated engine behind the `TextModel` interface."""

    def __init__(self, args: dict[str, JsonValue]) -> None:
        self._vocabulary = _vocabulary()
        self.context_length = SimulatedArgs.parse(args).profile.context_tokens
        self.vocab_size = self._vocabulary.size
        self._bound = ContextBound(self.context_length, _least_tokens())

    async def encode(self, text: str) -> list[int]:
        """Return the token ids of a raw prompt; see `TextModel`."""
        return self._encoded(text, "prompt")

    def _encoded(self, text: str, param: str) -> list[int]:
        self._bound.check(text, param)
        return self._vocabulary.encode(text)

    async def render_chat(self, conversation: Conversation) -> RenderedChat:
        """Return the conversation, each message after its role in angle brackets."""
        if conversation.tools and conversation.tool_choice != "none":
            raise UnsupportedParameterError(
                "'tools' is not supported: the model has no tool parser.", param="tools"
            )
        wanted = conversation.response_format
        if wanted is not None and wanted["type"] != "text":
            raise UnsupportedParameterError(
                "'response_format' is not supported by a simulated model.",
                param="response_format",
            )
        if conversation.reasoning_effort is not None:
            raise UnsupportedParameterError(
                "'reasoning_effort' is not supported: the model has no reasoning parser.",
                param="reasoning_effort",
            )
        turns = [
            f"<{turn['role']}> {turn.get('content') or ''}\n" for turn in conversation.messages
        ]
        return RenderedChat(self._encoded("".join([*turns, "<assistant>"]), "messages"))

    async def check_structured(self, tenant: str, size_bytes: int, chat: RenderedChat) -> None:
        """Return: rendering refuses conversations that ask for structured output."""

    def answer_parser(self, conversation: Conversation, rendered: RenderedChat) -> None:
        """Return no parser: everything is content."""

    def detokenizer(
        self, prompt_token_ids: list[int], *, special_tokens: bool = False
    ) -> SimulatedDetokenizer:
        """Return the text state of a new completion."""
        return SimulatedDetokenizer(self._vocabulary)

    def token_texts(self, token_ids: list[int]) -> list[TokenText]:
        """Return the text of each token by itself."""
        texts = [
            b"" if token_id == self._vocabulary.eos_id else self._vocabulary.token_bytes(token_id)
            for token_id in token_ids
        ]
        return [TokenText(data.decode("utf-8", "replace"), data) for data in texts]


@cache
def _vocabulary() -> Vocabulary:
    return Vocabulary()


@cache
def _least_tokens() -> LeastTokens:
    vocabulary = _vocabulary()
    others = (token_id for token_id in range(vocabulary.size) if token_id != vocabulary.eos_id)
    return LeastTokens(map(vocabulary.token_bytes, others))

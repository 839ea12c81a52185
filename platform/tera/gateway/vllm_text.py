"""The text side of vLLM's models: its renderer, detokeniser and parsers, without an engine."""

import re
from dataclasses import dataclass, fields
from functools import cache, partial
from typing import Any, Self

from pydantic import JsonValue

from tera.config.engine_args import FRONTEND_ARGS
from tera.config.model import engine_args
from tera.contract.chat_answers import FunctionCallDelta, ToolCallDelta
from tera.errors import UnsupportedParameterError
from tera.gateway.encode import TextEncoder
from tera.gateway.grammars import Grammars, Vocabulary
from tera.gateway.least_tokens import ContextBound, least_tokens
from tera.gateway.render import (
    AnswerParser,
    AnswerPiece,
    RenderedChat,
    TokenText,
)
from tera.gateway.request import Conversation
from tera.gateway.structured import Grammar, StructuredOutputs, grammar_of
from tera.gateway.text_pool import WORKERS
from tera.upstream.vllm_text import (
    VllmConversation,
    VllmDetokenizer,
    VllmParser,
    VllmText,
    byte_symbols,
)

_SENTENCEPIECE_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class VllmAnswerParser:
    """vLLM's reasoning and tool parsers, applied to one answer."""

    def __init__(self, parser: VllmParser) -> None:
        self._parser = parser

    def push(self, text: str, token_ids: list[int], *, finished: bool) -> AnswerPiece:
        """Return what the text adds."""
        delta = self._parser.push(text, token_ids, finished=finished)
        if delta is None:
            return AnswerPiece()
        return AnswerPiece(
            content=delta.content or "",
            reasoning=delta.reasoning or "",
            tool_calls=[_tool_call(call) for call in delta.tool_calls],
        )


def _tool_call(call: Any) -> ToolCallDelta:
    function = None
    if call.function is not None:
        function = FunctionCallDelta(call.function.name, call.function.arguments)
    return ToolCallDelta(call.index, call.id, call.type, function)


@dataclass(frozen=True, slots=True)
class _VllmChat(RenderedChat):
    """A rendered conversation, with what vLLM's parsers need to know about it."""

    inner: VllmConversation | None = None
    grammar: Grammar | None = None


class VllmTextModel:
    """A model's tokenizer, chat template and parsers, as vLLM loads them."""

    def __init__(self, text: VllmText, grammars: Grammars) -> None:
        self._text = text
        self._structured = StructuredOutputs(grammars, Vocabulary(text.serialised_vocabulary))
        self._tokenizer = text.tokenizer
        self._encoder = TextEncoder.of(self._tokenizer)
        self._bound = ContextBound(text.context_length, least_tokens(self._tokenizer))
        encode = None if self._encoder is None else self._encoder.encode
        text.encode_by(encode, partial(self._bound.check, param="messages"))
        self._token_texts: dict[int, TokenText] = {}
        """Cache of `token_texts`: a token takes 30 µs to decode, a whole vocabulary some 30 MB."""
        self.context_length = text.context_length
        self.vocab_size = text.vocab_size

    @staticmethod
    def prepare() -> None:
        """Import what `load` needs of vLLM, not to be called in two threads at once.

        Raises:
            StartError: Tera does not work with this version of vLLM.
        """
        VllmText.prepare()

    @classmethod
    def load(cls, model_path: str, args: dict[str, JsonValue], grammars: Grammars) -> Self:
        """Load what the gateway needs of the model at `model_path`; takes seconds.

        Args:
            model_path: directory with the model's files.
            args: the model's `engine.args`.
            grammars: compiles the grammars of structured output, for all models.

        Raises:
            ConfigError: vLLM refuses the model or its arguments.
            StartError: Tera does not work with this version of vLLM.
        """
        frontend = {name: args.get(name) for name in FRONTEND_ARGS}
        # One copy of the tokenizer per thread: making another one later would take a while.
        threads: dict[str, JsonValue] = {"renderer_num_workers": WORKERS}
        text = VllmText.load(model_path, {**threads, **engine_args(args)}, frontend)
        return cls(text, grammars)

    async def encode(self, text: str) -> list[int]:
        """Return the token ids of a raw prompt; see `TextModel`."""
        self._bound.check(text, "prompt")
        if self._encoder is not None:
            return self._encoder.encode(text, add_special_tokens=True)
        token_ids: list[int] = self._tokenizer.encode(text)
        return token_ids

    async def render_chat(self, conversation: Conversation) -> RenderedChat:
        """Return the conversation as rendered by the model's chat template; see `TextModel`."""
        self._refuse_what_is_missing(conversation)
        rendered = await self._text.render(_vllm_fields(conversation))
        structured = rendered.structured
        return _VllmChat(
            token_ids=rendered.token_ids,
            structured=structured,
            special_tokens=rendered.special_tokens,
            inner=rendered,
            grammar=None if structured is None else grammar_of(conversation, structured),
        )

    async def check_structured(self, tenant: str, size_bytes: int, chat: RenderedChat) -> None:
        """Return if engines can compile it; see `TextModel`."""
        assert isinstance(chat, _VllmChat)
        if chat.grammar is not None:
            await self._structured.check(tenant, size_bytes, chat.grammar)

    def _refuse_what_is_missing(self, conversation: Conversation) -> None:
        if conversation.tools and conversation.tool_choice != "none" and not self._text.has_tools:
            raise UnsupportedParameterError(
                "'tools' is not supported: the model has no tool parser "
                "(engine.args.tool_call_parser).",
                param="tools",
            )
        if conversation.reasoning_effort is not None and not self._text.has_reasoning:
            raise UnsupportedParameterError(
                "'reasoning_effort' is not supported: the model has no reasoning parser.",
                param="reasoning_effort",
            )

    def answer_parser(
        self, conversation: Conversation, rendered: RenderedChat
    ) -> AnswerParser | None:
        """Return the parser of one new answer; None if all of it is content."""
        assert isinstance(rendered, _VllmChat)
        assert rendered.inner is not None
        parser = self._text.parser(rendered.inner)
        return None if parser is None else VllmAnswerParser(parser)

    def detokenizer(
        self, prompt_token_ids: list[int], *, special_tokens: bool = False
    ) -> VllmDetokenizer:
        """Return the text state of a new completion of this prompt."""
        return VllmDetokenizer(self._tokenizer, prompt_token_ids, special_tokens)

    def token_texts(self, token_ids: list[int]) -> list[TokenText]:
        """Return the text of each token by itself."""
        known = self._token_texts
        new = list({token_id for token_id in token_ids if token_id not in known})
        if new:
            pieces: list[str] = self._tokenizer.convert_ids_to_tokens(new)
            for token_id, text, piece in zip(new, self._text.token_texts(new), pieces, strict=True):
                data = _piece_bytes(piece) if "\ufffd" in text else text.encode()
                known[token_id] = TokenText(text, data)
        return [known[token_id] for token_id in token_ids]


_byte_symbols = cache(byte_symbols)


def _piece_bytes(piece: str) -> bytes:
    """Return the bytes of a vocabulary entry that is not valid text by itself.

    Byte-level vocabularies have a symbol for each byte; SentencePiece writes `<0xE2>`.
    """
    if match := _SENTENCEPIECE_BYTE.fullmatch(piece):
        return bytes.fromhex(match[1])
    symbols = _byte_symbols()
    return bytes(symbols[symbol] for symbol in piece if symbol in symbols)


def _vllm_fields(conversation: Conversation) -> dict[str, Any]:
    """Return the fields of vLLM's request that its renderer and parsers read."""
    given = {field.name: getattr(conversation, field.name) for field in fields(conversation)}
    found = {name: value for name, value in given.items() if value is not None}
    # Fields that rendering does not read but vLLM validates together with the rest.
    found["max_completion_tokens"] = 1
    if "response_format" in found and found["response_format"]["type"] == "text":
        del found["response_format"]
    return found

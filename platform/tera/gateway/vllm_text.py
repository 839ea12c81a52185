"""Text of models that vLLM runs, by vLLM's own renderer, detokeniser and parsers, engine-less."""

import asyncio
import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any, Self

from pydantic import JsonValue

from tera.config.model import FRONTEND_ARGS, engine_args
from tera.contract.chat import FunctionCallDelta, ToolCallDelta
from tera.errors import ConfigError, InvalidValueError, UnsupportedParameterError
from tera.gateway.encode import TextEncoder
from tera.gateway.least_tokens import ContextBound, least_tokens
from tera.gateway.render import (
    AnswerParser,
    AnswerPiece,
    RenderedChat,
    TokenText,
)
from tera.gateway.request import Conversation

_SENTENCEPIECE_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


@dataclass(frozen=True, slots=True)
class _Decoding:
    """What vLLM's detokeniser reads of sampling parameters; stop strings are looked for here."""

    skip_special_tokens: bool
    spaces_between_special_tokens: bool = True
    stop: None = None
    min_tokens: int = 0
    include_stop_str_in_output: bool = False


@dataclass(frozen=True, slots=True)
class _Completion:
    """What vLLM's detokeniser reads of an engine request."""

    prompt_token_ids: list[int]
    sampling_params: _Decoding
    request_id: str = ""
    prompt_embeds: None = None


class VllmDetokenizer:
    """vLLM's incremental detokeniser for one completion."""

    def __init__(self, tokenizer: Any, prompt_token_ids: list[int], special_tokens: bool) -> None:
        from vllm.v1.engine.detokenizer import IncrementalDetokenizer

        completion: Any = _Completion(prompt_token_ids, _Decoding(not special_tokens))
        self._inner: Any = IncrementalDetokenizer.from_new_request(tokenizer, completion)

    def push(self, token_id: int) -> str:
        """Return the text that this token completes."""
        self._inner.update([token_id], False)
        text: str = self._inner.get_next_output_text(finished=False, delta=True)
        return text


class VllmAnswerParser:
    """vLLM's reasoning and tool parsers over one answer."""

    def __init__(self, parser: Any, vllm_request: Any, prompt_token_ids: list[int]) -> None:
        self._parser = parser
        self._request = vllm_request
        self._prompt_token_ids = prompt_token_ids

    def push(self, text: str, token_ids: list[int], *, finished: bool) -> AnswerPiece:
        """Return what the text adds."""
        delta = self._parser.parse_delta(
            delta_text=text,
            delta_token_ids=token_ids,
            request=self._request,
            prompt_token_ids=self._prompt_token_ids,
            finished=finished,
        )
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
    """A rendered conversation, with vLLM's form of the request for its parsers."""

    vllm_request: Any = None


class VllmTextModel:
    """A model's tokenizer, chat template and parsers, as vLLM loads them."""

    def __init__(self, model_config: Any, online: Any) -> None:
        self._model_config = model_config
        self._online = online
        self._tokenizer = online.renderer.get_tokenizer()
        self._encoder = TextEncoder.of(self._tokenizer)
        self._bound = ContextBound(model_config.max_model_len, least_tokens(self._tokenizer))
        online.renderer.tokenize_prompts_async = _tokenizing(
            online.renderer, self._encoder, self._bound
        )
        self._has_tools = online.parser is not None and online.parser.tool_parser_cls is not None
        self._has_reasoning = (
            online.parser is not None and online.parser.reasoning_parser_cls is not None
        )
        self.context_length: int = model_config.max_model_len
        self.vocab_size: int = max(model_config.get_vocab_size(), len(self._tokenizer))

    @classmethod
    def load(cls, model_path: str, args: dict[str, JsonValue]) -> Self:
        """Load what the gateway needs of the model at `model_path`; takes seconds.

        Raises:
            ConfigError: vLLM refuses the model or its arguments.
        """
        # vLLM costs seconds and 0.7 GB to import: only a gateway with such a model pays.
        from vllm.config import VllmConfig
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.renderers import renderer_from_config
        from vllm.renderers.online_renderer import OnlineRenderer

        frontend: dict[str, Any] = {name: args.get(name) for name in FRONTEND_ARGS}
        try:
            vllm_args: Any = engine_args(args)
            model_config = AsyncEngineArgs(model=model_path, **vllm_args).create_model_config()
            online = OnlineRenderer(
                model_config=model_config,
                renderer=renderer_from_config(VllmConfig(model_config=model_config)),
                request_logger=None,
                chat_template=frontend["chat_template"],
                chat_template_content_format="auto",
                enable_auto_tools=frontend["tool_call_parser"] is not None,
                tool_parser=frontend["tool_call_parser"],
                reasoning_parser=vllm_args.get("reasoning_parser"),
            )
        except (TypeError, ValueError, OSError, KeyError) as error:
            raise ConfigError(f"vLLM cannot load the text side of the model: {error}") from error
        return cls(model_config, online)

    async def encode(self, text: str) -> list[int]:
        """Return the token ids of a raw prompt; see `TextModel`."""
        await self._bound.check(text, "prompt")
        if self._encoder is not None:
            return await self._encoder.encode(text, add_special_tokens=True)
        token_ids: list[int] = await asyncio.to_thread(self._tokenizer.encode, text)
        return token_ids

    async def render_chat(self, conversation: Conversation) -> RenderedChat:
        """Return the conversation through the model's chat template; see `TextModel`."""
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
        from vllm.exceptions import VLLMClientError

        self._refuse_what_is_missing(conversation)
        try:
            vllm_request = ChatCompletionRequest.model_validate(_vllm_fields(conversation))
            rendered = await self._online.render_chat(vllm_request)
        except (VLLMClientError, ValueError, TypeError) as error:
            raise _refused(error) from error
        if not isinstance(rendered, tuple):
            raise InvalidValueError(
                "The model's chat template refuses this conversation.", param="messages"
            )
        _, (engine_input,) = rendered
        return _VllmChat(
            token_ids=list(engine_input["prompt_token_ids"]),
            structured=_structured(vllm_request),
            special_tokens=not vllm_request.skip_special_tokens,
            vllm_request=vllm_request,
        )

    def _refuse_what_is_missing(self, conversation: Conversation) -> None:
        if conversation.tools and conversation.tool_choice != "none" and not self._has_tools:
            raise UnsupportedParameterError(
                "'tools' is not supported: the model has no tool parser "
                "(engine.args.tool_call_parser).",
                param="tools",
            )
        if conversation.reasoning_effort is not None and not self._has_reasoning:
            raise UnsupportedParameterError(
                "'reasoning_effort' is not supported: the model has no reasoning parser.",
                param="reasoning_effort",
            )

    def answer_parser(
        self, conversation: Conversation, rendered: RenderedChat
    ) -> AnswerParser | None:
        """Return the parser of one new answer; None if all of it is content."""
        if self._online.parser is None:
            return None
        assert isinstance(rendered, _VllmChat)
        vllm_request = rendered.vllm_request
        parser = self._online.parser(
            self._tokenizer,
            vllm_request.tools,
            chat_template_kwargs=self._online.effective_chat_template_kwargs(vllm_request),
            model_config=self._model_config,
        )
        return VllmAnswerParser(parser, vllm_request, rendered.token_ids)

    def detokenizer(
        self, prompt_token_ids: list[int], *, special_tokens: bool = False
    ) -> VllmDetokenizer:
        """Return the text state of a new completion of this prompt."""
        return VllmDetokenizer(self._tokenizer, prompt_token_ids, special_tokens)

    def token_texts(self, token_ids: list[int]) -> list[TokenText]:
        """Return each token alone."""
        from vllm.tokenizers.detokenizer_utils import convert_ids_list_to_tokens

        texts: list[str] = convert_ids_list_to_tokens(self._tokenizer, token_ids)
        pieces: list[str] = self._tokenizer.convert_ids_to_tokens(token_ids)
        return [
            TokenText(text, _piece_bytes(piece) if "\ufffd" in text else text.encode())
            for text, piece in zip(texts, pieces, strict=True)
        ]


@cache
def _bytes_of_symbols() -> dict[str, int]:
    """Return the byte that each symbol of a byte-level vocabulary stands for."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    symbols: dict[int, str] = bytes_to_unicode()  # type: ignore[no-untyped-call]
    return {symbol: byte for byte, symbol in symbols.items()}


def _piece_bytes(piece: str) -> bytes:
    """Return the bytes of a vocabulary's entry that is no whole text.

    Byte-level vocabularies have a symbol for each byte, those of SentencePiece `<0xE2>`.
    """
    if match := _SENTENCEPIECE_BYTE.fullmatch(piece):
        return bytes.fromhex(match[1])
    symbols = _bytes_of_symbols()
    return bytes(symbols[symbol] for symbol in piece if symbol in symbols)


def _tokenizing(
    renderer: Any, encoder: TextEncoder | None, bound: ContextBound
) -> Callable[[Sequence[Any], Any], Awaitable[list[Any]]]:
    """Return the renderer's own step from texts to ids, by `encoder` where it can do it.

    A conversation is looked at here, rendered, since a template may leave out parts of it.
    """
    otherwise: Callable[[Sequence[Any], Any], Awaitable[list[Any]]]
    otherwise = renderer.tokenize_prompts_async

    async def tokenize(prompts: Sequence[Any], params: Any) -> list[Any]:
        for prompt in prompts:
            if "prompt" in prompt:
                await bound.check(prompt["prompt"], "messages")
        if encoder is None or not all(set(prompt) == {"prompt"} for prompt in prompts):
            return await otherwise(prompts, params)
        add_special_tokens: bool = params.add_special_tokens
        return [
            {
                **prompt,
                "prompt_token_ids": await encoder.encode(
                    prompt["prompt"], add_special_tokens=add_special_tokens
                ),
            }
            for prompt in prompts
        ]

    return tokenize


def _vllm_fields(conversation: Conversation) -> dict[str, Any]:
    """Return the fields of vLLM's request that its renderer and parsers read."""
    fields = {name: value for name, value in asdict(conversation).items() if value is not None}
    # What rendering does not read, yet vLLM checks together with the rest.
    fields["max_completion_tokens"] = 1
    if "response_format" in fields and fields["response_format"]["type"] == "text":
        del fields["response_format"]
    return fields


def _structured(vllm_request: Any) -> dict[str, Any] | None:
    """Return vLLM's structured outputs as the record of `Sampling` has them."""
    outputs = vllm_request.extract_structured_outputs()
    if outputs is None:
        return None
    kinds: Sequence[str] = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")
    found = {kind: getattr(outputs, kind) for kind in kinds}
    return {kind: value for kind, value in found.items() if value is not None} or None


def _refused(error: Exception) -> InvalidValueError | UnsupportedParameterError:
    """Return our error for vLLM's: a missing template is a matter of the model."""
    text = str(error)
    if "chat template" in text and ("not" in text or "no longer" in text):
        return UnsupportedParameterError(
            "'messages' is not supported: the model has no chat template. "
            "Use /v1/completions with a prompt.",
            param="messages",
        )
    return InvalidValueError(
        "The model's chat template refuses this conversation; check the roles and their order.",
        param="messages",
    )

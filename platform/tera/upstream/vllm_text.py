"""vLLM's renderer, detokeniser and parsers, used without an engine.

They are private parts of vLLM's own server. Everything of `vllm` that a gateway imports is imported
here, when a vllm model is loaded: it costs seconds and 0.7 GB.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol

from pydantic import JsonValue

from tera.errors import ConfigError, InvalidValueError, UnsupportedParameterError
from tera.upstream.symbols import Symbol, check
from tera.upstream.vllm_grammar import leave_check_to_gateways
from tera.upstream.xgrammar import serialised_vocabulary

_ANSWERS = "vllm.entrypoints.generate.base.protocol"
_CHAT = "vllm.entrypoints.openai.chat_completion.protocol"
_DETOKENIZER = "vllm.v1.engine.detokenizer"
_ONLINE = "vllm.renderers.online_renderer"

CHAT_FIELDS = (
    "messages",
    "tools",
    "tool_choice",
    "parallel_tool_calls",
    "chat_template_kwargs",
    "reasoning_effort",
    "response_format",
)
"""Request fields that vLLM's renderer and parsers read; a `Conversation` has the same names."""

STRUCTURED_KINDS = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")
"""Kinds of structured output, as vLLM and the records of `Sampling` name them."""

NEEDS = (
    Symbol(
        "vllm.engine.arg_utils",
        "EngineArgs.create_model_config",
        "a model is loaded for its text alone, as an engine with the same arguments would",
        call="",
    ),
    Symbol("vllm.config.vllm", "VllmConfig.model_config", "a renderer is made from it alone"),
    Symbol("vllm.config.model", "ModelConfig.max_model_len", "the context's length"),
    Symbol("vllm.config.model", "ModelConfig.get_vocab_size", "which token ids there are", call=""),
    Symbol(
        "vllm.renderers.registry",
        "renderer_from_config",
        "the renderer that fits the model's tokenizer",
        call="config",
    ),
    Symbol(
        _ONLINE,
        "OnlineRenderer",
        "chat templates, tools and parsers as vLLM's own server puts them together",
        call="model_config renderer request_logger chat_template chat_template_content_format "
        "enable_auto_tools tool_parser reasoning_parser",
    ),
    Symbol(
        _ONLINE,
        "OnlineRenderer.render_chat",
        "a conversation becomes token ids; refusals are returned instead of a tuple",
        call="request",
        awaited=True,
    ),
    Symbol(
        _ONLINE,
        "OnlineRenderer.effective_chat_template_kwargs",
        "parsers are given what the template was",
        call="request",
    ),
    Symbol(_ONLINE, "OnlineRenderer.parser", "the class of the model's parsers, or None"),
    Symbol(_ONLINE, "OnlineRenderer.renderer", "the tokenizer behind it"),
    Symbol("vllm.renderers.base", "BaseRenderer.get_tokenizer", "raw prompts are encoded", call=""),
    Symbol(
        "vllm.renderers.base",
        "BaseRenderer._executor",
        "templates are rendered in the calling thread instead of one thread for all",
    ),
    Symbol(
        "vllm.renderers.base",
        "BaseRenderer.tokenize_prompts_async",
        "ours takes its place, which encodes only what a conversation has new",
        exact="self prompts params",
        awaited=True,
    ),
    Symbol(
        "vllm.renderers.params",
        "TokenizeParams.add_special_tokens",
        "the same in the tokenizer that takes its place",
    ),
    Symbol(
        "vllm.parser.abstract_parser",
        "Parser",
        "a parser for each answer",
        call="tokenizer tools model_config chat_template_kwargs",
    ),
    Symbol("vllm.parser.abstract_parser", "Parser.tool_parser_cls", "whether a model has tools"),
    Symbol("vllm.parser.abstract_parser", "Parser.reasoning_parser_cls", "whether a model reasons"),
    Symbol(
        "vllm.parser.abstract_parser",
        "Parser.parse_delta",
        "an answer's text is told apart while it comes",
        call="delta_text delta_token_ids request prompt_token_ids finished",
    ),
    *(
        Symbol(_ANSWERS, f"{kind}.{field}", "what a parser tells")
        for kind, fields in {
            "DeltaMessage": "content reasoning tool_calls",
            "DeltaToolCall": "index id type function",
            "DeltaFunctionCall": "name arguments",
        }.items()
        for field in fields.split()
    ),
    *(
        Symbol(_CHAT, f"ChatCompletionRequest.{field}", "it would ignore a field it does not know")
        for field in (*CHAT_FIELDS, "max_completion_tokens")
    ),
    Symbol(
        _CHAT,
        "ChatCompletionRequest.extract_structured_outputs",
        "what a response format or a forced tool asks of the engine",
        call="",
    ),
    Symbol(
        _CHAT,
        "ChatCompletionRequest.skip_special_tokens",
        "some parsers need to see special tokens",
    ),
    *(
        Symbol("vllm.sampling_params", f"StructuredOutputsParams.{kind}", "it crosses the wire")
        for kind in STRUCTURED_KINDS
    ),
    Symbol(
        "vllm.exceptions", "VLLMClientError", "a refusal of the client's request is told as one"
    ),
    Symbol(
        _DETOKENIZER,
        "IncrementalDetokenizer.from_new_request",
        "text from tokens, exact across tokens that are parts of a character",
        call="tokenizer request",
    ),
    Symbol(
        _DETOKENIZER,
        "BaseIncrementalDetokenizer.update",
        "it is given each token",
        call="new_token_ids stop_terminated",
    ),
    Symbol(
        _DETOKENIZER,
        "BaseIncrementalDetokenizer.get_next_output_text",
        "it is asked for what each token completes",
        call="finished delta",
    ),
    Symbol(
        "vllm.tokenizers.detokenizer_utils",
        "convert_ids_list_to_tokens",
        "log-probabilities name tokens by their text",
        call="tokenizer token_ids",
    ),
    Symbol(
        "transformers.convert_slow_tokenizer",
        "bytes_to_unicode",
        "log-probabilities give the bytes of tokens that are no whole text",
        call="",
    ),
)
"""What this file uses. No signature shows whether a detokeniser reads more of a request than
`_Completion` has."""


class Encode(Protocol):
    """Encodes text with a tokenizer."""

    def __call__(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Return the ids of a text, with the special tokens of a raw prompt if requested."""
        ...


@dataclass(frozen=True, slots=True)
class _Decoding:
    """Sampling parameters that vLLM's detokeniser reads; the gateway finds stop strings itself."""

    skip_special_tokens: bool
    spaces_between_special_tokens: bool = True
    stop: None = None
    min_tokens: int = 0
    include_stop_str_in_output: bool = False


@dataclass(frozen=True, slots=True)
class _Completion:
    """The parts of an engine request that vLLM's detokeniser reads."""

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


class VllmParser:
    """vLLM's reasoning and tool parsers, applied to one answer."""

    def __init__(self, parser: Any, request: Any, prompt_token_ids: list[int]) -> None:
        self._parser = parser
        self._request = request
        self._prompt_token_ids = prompt_token_ids

    def push(self, text: str, token_ids: list[int], *, finished: bool) -> Any:
        """Return vLLM's `DeltaMessage` of what the text adds, or None."""
        return self._parser.parse_delta(
            delta_text=text,
            delta_token_ids=token_ids,
            request=self._request,
            prompt_token_ids=self._prompt_token_ids,
            finished=finished,
        )


@dataclass(frozen=True, slots=True)
class VllmConversation:
    """A conversation that vLLM has rendered."""

    token_ids: list[int]
    structured: dict[str, Any] | None
    """What the engine is held to, as `Sampling` has it."""
    special_tokens: bool
    """Whether its parsers want to see special tokens."""
    request: Any
    """vLLM's form of the request, for its parsers."""


class VllmText:
    """A model's tokenizer, chat template and parsers."""

    def __init__(self, model_config: Any, online: Any) -> None:
        self._model_config = model_config
        self._online = online
        # The text pool decides where rendering runs; vLLM's one thread for it would make every
        # conversation wait for the longest.
        online.renderer._executor.submit = _at_once
        self.tokenizer: Any = online.renderer.get_tokenizer()
        parser = online.parser
        self.has_tools: bool = parser is not None and parser.tool_parser_cls is not None
        self.has_reasoning: bool = parser is not None and parser.reasoning_parser_cls is not None
        self.context_length: int = model_config.max_model_len
        # Added tokens may lie beyond the model's vocabulary, padding beyond the tokenizer's.
        self.vocab_size: int = max(model_config.get_vocab_size(), len(self.tokenizer))

    @staticmethod
    def prepare() -> None:
        """Import what `load` needs, not to be called in two threads at once; takes seconds.

        Raises:
            StartError: this vLLM is not one that Tera works with.
        """
        check(NEEDS)
        leave_check_to_gateways()
        from vllm.config import VllmConfig  # noqa: F401
        from vllm.engine.arg_utils import AsyncEngineArgs  # noqa: F401
        from vllm.renderers import renderer_from_config  # noqa: F401
        from vllm.renderers.online_renderer import OnlineRenderer  # noqa: F401

    @classmethod
    def load(
        cls, model_path: str, args: Mapping[str, JsonValue], frontend: Mapping[str, Any]
    ) -> "VllmText":
        """Load the text side of the model at `model_path`; takes seconds.

        Args:
            model_path: directory with the model's files.
            args: vLLM's engine arguments.
            frontend: `chat_template` and `tool_call_parser`, each of which may be None.

        Raises:
            StartError: this vLLM is not one that Tera works with.
            ConfigError: vLLM refuses the model or its arguments.
        """
        cls.prepare()
        from vllm.config import VllmConfig
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.renderers import renderer_from_config
        from vllm.renderers.online_renderer import OnlineRenderer

        engine_args: Any = args
        try:
            model_config = AsyncEngineArgs(model=model_path, **engine_args).create_model_config()
            online = OnlineRenderer(
                model_config=model_config,
                renderer=renderer_from_config(VllmConfig(model_config=model_config)),
                request_logger=None,
                chat_template=frontend["chat_template"],
                chat_template_content_format="auto",
                enable_auto_tools=frontend["tool_call_parser"] is not None,
                tool_parser=frontend["tool_call_parser"],
                reasoning_parser=engine_args.get("reasoning_parser"),
            )
        except (TypeError, ValueError, OSError, KeyError) as error:
            raise ConfigError(f"vLLM cannot load the text side of the model: {error}") from error
        return cls(model_config, online)

    def encode_by(self, encode: Encode | None, check: Callable[[str], None]) -> None:
        """Have rendered text checked by `check`, which may refuse it, and encoded by `encode`.

        It is checked once rendered, since a template may leave out parts of a conversation. Prompts
        that are more than text, such as ones with images, are encoded by vLLM itself, and so are
        all prompts without `encode`.
        """
        renderer = self._online.renderer
        otherwise: Callable[[Sequence[Any], Any], Awaitable[list[Any]]]
        otherwise = renderer.tokenize_prompts_async

        async def tokenize(prompts: Sequence[Any], params: Any) -> list[Any]:
            for prompt in prompts:
                if "prompt" in prompt:
                    check(prompt["prompt"])
            if encode is None or not all(set(prompt) == {"prompt"} for prompt in prompts):
                return await otherwise(prompts, params)
            add_special_tokens: bool = params.add_special_tokens
            return [
                {
                    **prompt,
                    "prompt_token_ids": encode(
                        prompt["prompt"], add_special_tokens=add_special_tokens
                    ),
                }
                for prompt in prompts
            ]

        renderer.tokenize_prompts_async = tokenize

    async def render(self, fields: Mapping[str, Any]) -> VllmConversation:
        """Return a conversation as rendered by the model's chat template.

        Args:
            fields: those of vLLM's `ChatCompletionRequest`.

        Raises:
            InvalidValueError: vLLM, or the template, refuses it.
            UnsupportedParameterError: the model has no template.
        """
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
        from vllm.exceptions import VLLMClientError

        try:
            request = ChatCompletionRequest.model_validate(fields)
            rendered = await self._online.render_chat(request)
        except (VLLMClientError, ValueError, TypeError) as error:
            raise _refused(str(error)) from error
        # Some refusals are returned as an answer of vLLM's server, whose words are not ours.
        if not isinstance(rendered, tuple):
            raise _refused("")
        # One conversation is one prompt.
        _, (engine_input,) = rendered
        return VllmConversation(
            token_ids=list(engine_input["prompt_token_ids"]),
            structured=_structured(request),
            special_tokens=not request.skip_special_tokens,
            request=request,
        )

    def serialised_vocabulary(self) -> str:
        """Return the tokens as what compiles grammars knows them; takes a second."""
        return serialised_vocabulary(self._model_config, self.tokenizer)

    def parser(self, conversation: VllmConversation) -> VllmParser | None:
        """Return the parser of one new answer, or None if the model has none."""
        if self._online.parser is None:
            return None
        request = conversation.request
        parser = self._online.parser(
            self.tokenizer,
            request.tools,
            chat_template_kwargs=self._online.effective_chat_template_kwargs(request),
            model_config=self._model_config,
        )
        return VllmParser(parser, request, conversation.token_ids)

    def token_texts(self, token_ids: list[int]) -> list[str]:
        """Return the text of each token by itself."""
        from vllm.tokenizers.detokenizer_utils import convert_ids_list_to_tokens

        texts: list[str] = convert_ids_list_to_tokens(self.tokenizer, token_ids)
        return texts


def _at_once(work: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
    """Run submitted work at once, in the calling thread."""
    done: Future[Any] = Future()
    try:
        done.set_result(work(*args, **kwargs))
    except Exception as error:  # noqa: BLE001  it is raised where the future is awaited
        done.set_exception(error)
    return done


def byte_symbols() -> dict[str, int]:
    """Return the byte that each symbol of a byte-level vocabulary stands for."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    symbols: dict[int, str] = bytes_to_unicode()
    return {symbol: byte for byte, symbol in symbols.items()}


def _structured(request: Any) -> dict[str, Any] | None:
    """Return vLLM's structured outputs in the form of `Sampling`."""
    outputs = request.extract_structured_outputs()
    if outputs is None:
        return None
    # Field by field: its other fields are settings of vLLM's backends, which no client chooses.
    found = {kind: getattr(outputs, kind) for kind in STRUCTURED_KINDS}
    return {kind: value for kind, value in found.items() if value is not None} or None


def _refused(text: str) -> InvalidValueError | UnsupportedParameterError:
    """Translate vLLM's error; a missing template is the model's fault, not the conversation's."""
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

"""Text of models that vLLM runs, by vLLM's own renderer and detokeniser, without an engine."""

import asyncio
from dataclasses import dataclass
from typing import Any, Self

from pydantic import JsonValue

from tera.errors import ConfigError

INLINE_CHARACTERS = 4096
"""Longer prompts are tokenised in a thread (the tokeniser releases the GIL), so that one long
prompt does not hold up the tokens of every other stream."""


@dataclass(frozen=True, slots=True)
class _StopLess:
    """What vLLM's detokeniser reads of sampling parameters; stop strings are looked for here."""

    stop: None = None
    min_tokens: int = 0
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True


@dataclass(frozen=True, slots=True)
class _Completion:
    """What vLLM's detokeniser reads of an engine request."""

    prompt_token_ids: list[int]
    request_id: str = ""
    prompt_embeds: None = None
    sampling_params: _StopLess = _StopLess()


class VllmDetokenizer:
    """vLLM's incremental detokeniser for one completion."""

    def __init__(self, tokenizer: Any, prompt_token_ids: list[int]) -> None:
        from vllm.v1.engine.detokenizer import IncrementalDetokenizer

        self._inner: Any = IncrementalDetokenizer.from_new_request(
            tokenizer,
            _Completion(prompt_token_ids),  # type: ignore[arg-type]
        )

    def push(self, token_id: int) -> str:
        """Return the text that this token completes."""
        self._inner.update([token_id], False)
        text: str = self._inner.get_next_output_text(finished=False, delta=True)
        return text


class VllmTextModel:
    """A model's tokenizer and chat template, as vLLM loads them."""

    def __init__(self, model_config: Any, renderer: Any) -> None:
        self._tokenizer = renderer.get_tokenizer()
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

        try:
            engine_args = AsyncEngineArgs(model=model_path, **args)  # type: ignore[arg-type]
            model_config = engine_args.create_model_config()
            renderer = renderer_from_config(VllmConfig(model_config=model_config))
        except (TypeError, ValueError, OSError) as error:
            raise ConfigError(f"vLLM cannot load the text side of the model: {error}") from error
        return cls(model_config, renderer)

    async def encode(self, text: str) -> list[int]:
        """Return the token ids of a raw prompt."""
        if len(text) <= INLINE_CHARACTERS:
            return self._encode(text)
        return await asyncio.to_thread(self._encode, text)

    def _encode(self, text: str) -> list[int]:
        token_ids: list[int] = self._tokenizer.encode(text)
        return token_ids

    def detokenizer(self, prompt_token_ids: list[int]) -> VllmDetokenizer:
        """Return the text state of a new completion of this prompt."""
        return VllmDetokenizer(self._tokenizer, prompt_token_ids)

    def token_text(self, token_id: int) -> str:
        """Return one token alone as text."""
        text: str = self._tokenizer.decode([token_id])
        return text

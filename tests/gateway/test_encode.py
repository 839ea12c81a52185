"""The encoder against the tokenizer that it stands for, whatever it remembers."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tera.gateway import encode
from tera.gateway.encode import TextEncoder

SPECIAL = ["<|im_start|>", "<|im_end|>", "<|im_start|>x"]
CORPUS = ["the quick brown fox jumps over the lazy dog 1234", "naïve café ☕ 日本語 the the dog"]


def tokenizer(
    pre_tokenizer: Any = None, normalizer: Any = None, special: Sequence[Any] = SPECIAL
) -> PreTrainedTokenizerFast:
    """Return a small byte-level BPE tokenizer whose raw prompts begin with a special token."""
    inner: Any = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizer or pre_tokenizers.ByteLevel(add_prefix_space=False)
    if normalizer is not None:
        inner.normalizer = normalizer
    trainer: Any = trainers.BpeTrainer(
        vocab_size=400,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(special),
    )
    inner.train_from_iterator(CORPUS * 20, trainer)
    start = inner.token_to_id("<|im_start|>")
    inner.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", start)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<|im_start|>")  # noqa: S106


PLAIN = tokenizer()
ENCODER = TextEncoder.of(PLAIN)
pieces = st.sampled_from([*SPECIAL, "<|im_", "start|>", " ", "\n\n", "the dog", "日本", "🚀"])
texts = st.lists(pieces | st.text(max_size=40), max_size=12).map("".join)


@given(texts)
@settings(max_examples=150)
def test_ids_are_the_tokenizers_own(text: str) -> None:
    wanted = PLAIN(text, add_special_tokens=False)["input_ids"]
    assert ENCODER is not None
    for _ in range(2):  # the second time from memory
        assert ENCODER.encode(text, add_special_tokens=False) == wanted
    assert ENCODER.encode(text, add_special_tokens=True) == PLAIN.encode(text)


def test_threads_that_share_an_encoder_find_the_same_ids(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(encode, "REMEMBERED_CHARACTERS", 1000)  # so that all of it is forgotten
    texts = [f"<|im_start|>{number}{' the lazy dog' * 40}<|im_end|>" for number in range(40)]
    wanted = [PLAIN(text, add_special_tokens=False)["input_ids"] for text in texts]
    encoder = TextEncoder.of(PLAIN)
    assert encoder is not None
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(partial(encoder.encode, add_special_tokens=False), texts * 5))
    assert found == wanted * 5
    assert sum(map(len, encoder._remembered)) == encoder._remembered_characters <= 1000


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(tokenizer(pre_tokenizers.Metaspace()), id="metaspace"),
        pytest.param(tokenizer(normalizer=normalizers.Prepend("▁")), id="prepending"),
        pytest.param(tokenizer(normalizer=normalizers.NFC()), id="normalising"),
    ],
)
def test_tokenizers_of_other_kinds_are_followed_exactly(other: PreTrainedTokenizerFast) -> None:
    encoder = TextEncoder.of(other)
    assert encoder is not None
    for text in ("a<|im_end|>  the dog<|im_start|>", " the\u0301 dog <|im_end|> the"):
        wanted = other(text, add_special_tokens=False)["input_ids"]
        assert encoder.encode(text, add_special_tokens=False) == wanted


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "REMEMBERED_CHARACTERS", 1000)
    encoder = TextEncoder.of(PLAIN)
    assert encoder is not None
    for number in range(50):
        encoder.encode(f"{number} " * 40 + "<|im_end|>", add_special_tokens=False)
    assert sum(map(len, encoder._remembered)) <= 1000
    assert encoder._remembered

"""The bound on a text's tokens against the tokens, by tokenizers of every kind."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from tera.errors import ContextLengthError
from tera.gateway import least_tokens as module
from tera.gateway.least_tokens import SHORT_CHARACTERS, ContextBound, least_tokens
from tera.gateway.request import Conversation
from tera.gateway.simulated_text import SimulatedTextModel

SPECIAL = ["<|im_start|>", "<| a b |>"]
CORPUS = ["the quick brown fox jumps over the lazy dog 1234", "naïve café ☕ 日本語 " + " " * 20]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]

Changes = Callable[[Tokenizer], None]


def tokenizer(
    change: Changes = lambda _: None,
    *,
    symbols: bool = True,
    model: Any = None,
    special: list[Any] | None = None,
) -> PreTrainedTokenizerFast:
    """Return a small tokenizer of one symbol a byte, or of characters with bytes for others."""
    inner: Any = Tokenizer(model or models.BPE(byte_fallback=not symbols))
    if symbols:
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        inner.normalizer = normalizers.Replace(" ", "▁")
    change(inner)
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if symbols else [],
        special_tokens=[*(special or SPECIAL), *([] if symbols else BYTES)],
    )
    if model is None:
        inner.train_from_iterator(CORPUS * 20, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner)


def sequence(inner: Any, *before: Any) -> None:
    inner.pre_tokenizer = pre_tokenizers.Sequence([*before, inner.pre_tokenizer])


def normalized(normalizer: Any) -> Changes:
    return lambda inner: setattr(inner, "normalizer", normalizer)


def pre_tokenized(*before: Any) -> Changes:
    return lambda inner: sequence(inner, *before)


def llama(inner: Any) -> None:
    inner.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )


def metaspace(inner: Any) -> None:
    inner.normalizer = None
    inner.pre_tokenizer = pre_tokenizers.Metaspace()


KINDS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "symbols": tokenizer,
    "digits": lambda: tokenizer(pre_tokenized(pre_tokenizers.Digits(individual_digits=True))),
    "split": lambda: tokenizer(pre_tokenized(pre_tokenizers.Split(Regex(r"\d{1,3}"), "isolated"))),
    "nfc": lambda: tokenizer(normalized(normalizers.NFC())),
    "nfkc": lambda: tokenizer(normalized(normalizers.NFKC())),
    "nfd": lambda: tokenizer(normalized(normalizers.NFD())),
    "pieces": lambda: tokenizer(symbols=False),
    "llama": lambda: tokenizer(llama, symbols=False),
    "metaspace": lambda: tokenizer(metaspace, symbols=False),
}


@cache
def made(kind: str) -> PreTrainedTokenizerFast:
    return KINDS[kind]()


# Among them what normalisers make shorter, and a letter of three marks that comes apart.
pieces = st.sampled_from(
    [
        *(*SPECIAL, "the quick", "1234567890", " " * 20, "日本", "▁", "ﬃ", "\uff11"),
        *("\u212b", "\u212a", "\u1fbe\u0308\u0301", "\u2126\u0313\u0300\u0345", "e\u0301"),
        *("\u1112\u1161\u11ab", "\U0001d7d8"),
    ]
)
texts = st.lists(pieces | st.text(max_size=30), max_size=12).map("".join)


@pytest.mark.parametrize("kind", KINDS)
@given(text=texts, slice_characters=st.integers(1, 7) | st.just(65_536))
@settings(max_examples=100)
def test_no_text_has_fewer_tokens(kind: str, text: str, slice_characters: int) -> None:
    least = least_tokens(made(kind))
    assert least is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_SLICE_CHARACTERS", slice_characters)
        found = least.at_least(text)
    assert found <= len(made(kind)(text, add_special_tokens=False)["input_ids"])


def test_each_digit_counts_where_each_is_a_token() -> None:
    least = least_tokens(made("digits"))
    assert least is not None
    assert least.at_least("1234567890" * 1000) == 10_000
    # The longest token is of some twenty spaces, so these could be fewer.
    assert 10_000 // 32 <= least.at_least(" " * 10_000) <= 10_000 // 16


def test_the_search_ends_where_it_knows_enough() -> None:
    least = least_tokens(made("digits"))
    assert least is not None
    assert 100 < least.at_least("1" * 10_000_000, enough=100) < 100_000


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(
            lambda: tokenizer(normalized(normalizers.Sequence([normalizers.StripAccents()]))),
            id="accents-left-out",
        ),
        pytest.param(lambda: tokenizer(normalized(normalizers.Strip())), id="spaces-left-out"),
        pytest.param(lambda: tokenizer(normalized(normalizers.Lowercase())), id="lower-case"),
        pytest.param(
            lambda: tokenizer(normalized(normalizers.Replace(Regex(" +"), " "))), id="replaced"
        ),
        pytest.param(
            lambda: tokenizer(pre_tokenized(pre_tokenizers.WhitespaceSplit())), id="whitespace"
        ),
        pytest.param(
            lambda: tokenizer(pre_tokenized(pre_tokenizers.Split(" ", "removed"))), id="removed"
        ),
        pytest.param(
            lambda: tokenizer(special=[AddedToken("<mask>", lstrip=True)]),
            id="special-takes-spaces",
        ),
        pytest.param(
            lambda: tokenizer(
                model=models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]")  # noqa: S106
            ),
            id="unknown-words",
        ),
        pytest.param(
            lambda: tokenizer(
                lambda inner: setattr(inner, "pre_tokenizer", None), model=models.BPE()
            ),
            id="unknown-characters",
        ),
        pytest.param(object, id="no-fast-tokenizer"),
    ],
)
def test_where_a_text_may_have_any_number_of_tokens_nothing_is_said(
    other: Callable[[], Any],
) -> None:
    assert least_tokens(other()) is None


def test_of_a_model_that_nothing_is_known_of_every_text_passes() -> None:
    ContextBound(8, None).check("1" * 100_000, "prompt")


def simulated(context_tokens: int) -> SimulatedTextModel:
    return SimulatedTextModel({"profile": {"context_tokens": context_tokens}})


@pytest.fixture
def encodes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the encoding of any text fail."""

    def encode(self: Any, text: str) -> list[int]:
        raise AssertionError("this text was to be refused unread")

    monkeypatch.setattr("tera.engine.simulated_vocabulary.Vocabulary.encode", encode)


@pytest.mark.parametrize("characters", [SHORT_CHARACTERS + 1, 10_000_000])
@pytest.mark.usefixtures("encodes_nothing")
async def test_x1_a_text_that_cannot_fit_is_refused_unread(characters: int) -> None:
    model = simulated(2048)
    digits = "7" * characters
    conversation = Conversation([{"role": "user", "content": digits}])
    with pytest.raises(ContextLengthError) as refused:
        await model.encode(digits)
    assert refused.value.param == "prompt"
    assert "2048 tokens" in refused.value.message
    assert f"{characters} characters" in refused.value.message
    with pytest.raises(ContextLengthError) as refused:
        await model.render_chat(conversation)
    assert refused.value.param == "messages"


async def test_a_long_text_that_may_fit_is_encoded_as_a_short_one() -> None:
    model = simulated(100_000)
    once = await model.encode("The quick brown fox jumps. ")
    assert await model.encode("The quick brown fox jumps. " * 1000) == once * 1000

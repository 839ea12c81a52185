"""A lower bound on the number of a text's tokens, found a hundred times faster than the tokens.

Encoding ten megabytes takes half a minute and gigabytes of memory, only to find that they do not
fit.
"""

import json
import math
import unicodedata
from collections.abc import Iterable, Iterator
from typing import Any, Literal, get_args

from tera.errors import ContextLengthError
from tera.upstream.vllm_text import byte_symbols

SHORT_CHARACTERS = 4096
"""Shorter text is encoded without checking its length."""

_SLICE_CHARACTERS = 65_536
"""Characters counted at a time, which takes less than a millisecond."""

_LOST_AT_A_CUT = 16
"""Across the cut between two slices, a normaliser may compose up to four characters of up to four
bytes each, which are counted separately here."""

Form = Literal["NFC", "NFD", "NFKC", "NFKD"]
_FORMS = get_args(Form)


class LeastTokens:
    """A lower bound on the number of a text's tokens, by one vocabulary.

    Every byte of a text is in one token. If a byte counts for 1 / length of the longest token
    that has this byte, then the bytes of no token count for more than 1, and those of a text
    for no more than its tokens. So ten digits count for ten where each digit is a token, though
    the longest token of all may be a hundred spaces.

    A byte that is not a token by itself counts for nothing: the tokens may leave it out.
    """

    def __init__(self, tokens: Iterable[bytes], form: Form | None = None, space: str = " ") -> None:
        """`tokens` is the vocabulary, in the bytes of the text that the tokenizer cuts.

        Args:
            tokens: every entry that can occur in a text.
            form: the Unicode normalisation that is applied first.
            space: what replaces a space first.
        """
        self._form: Form | None = form
        self._space = space
        longest = dict.fromkeys(range(256), 0)
        alone: set[int] = set()
        for token in tokens:
            alone.update(token if len(token) == 1 else b"")
            for byte in token:
                longest[byte] = max(longest[byte], len(token))
        # Lengths are rounded up to powers of two: fewer groups to count, and sums stay exact.
        groups: dict[int, bytearray] = {}
        for byte in sorted(alone):
            length = 1 << (longest[byte] - 1).bit_length()
            groups.setdefault(length, bytearray()).append(byte)
        self._groups = [(bytes(group), 1 / length) for length, group in groups.items()]

    def at_least(self, text: str, enough: float = math.inf) -> int:
        """Return a lower bound on the tokens of `text`; counting stops once it exceeds `enough`."""
        found = 0.0
        for start in range(0, len(text), _SLICE_CHARACTERS):
            data = self._as_cut(text[start : start + _SLICE_CHARACTERS]).encode()
            for group, share in self._groups:
                found += share * (len(data) - len(data.translate(None, group)))
            if self._form is not None:
                found -= _LOST_AT_A_CUT
            if found > enough:
                break
        return max(0, math.ceil(found))

    def _as_cut(self, text: str) -> str:
        """Return a text in the form that the tokenizer cuts into tokens."""
        if self._form is not None and not text.isascii():
            text = unicodedata.normalize(self._form, text)
        return text if self._space == " " else text.replace(" ", self._space)


class ContextBound:
    """Refuses texts that cannot fit a model's context, before they are encoded."""

    def __init__(self, context_length: int, least: LeastTokens | None) -> None:
        """`least` is None if nothing is known about the model's tokens: then every text passes."""
        self._context_length = context_length
        self._least = least

    def check(self, text: str, param: str) -> None:
        """Check that `text` may fit.

        Raises:
            ContextLengthError: it certainly does not; `param` is the field that contains it.
        """
        if self._least is None or len(text) <= SHORT_CHARACTERS:
            return
        tokens = self._least.at_least(text, self._context_length)
        if tokens > self._context_length:
            raise ContextLengthError(
                f"This model's context holds {self._context_length} tokens, but the prompt alone "
                f"has more: at least {tokens}, in {len(text)} characters. Shorten the prompt.",
                param=param,
            )


def least_tokens(tokenizer: Any) -> LeastTokens | None:
    """Return the bound of a Hugging Face tokenizer, or None if its tokens may omit parts of a text.

    That is the case if a normaliser or pre-tokenizer drops something (spaces, accents), if one
    unknown token replaces a whole word, or if a special token absorbs adjacent spaces.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    state = json.loads(backend.to_str())
    added = state["added_tokens"]
    # Such special tokens absorb spaces, which then are part of no token.
    if any(token["lstrip"] or token["rstrip"] for token in added):
        return None
    parts = [*_parts(state["normalizer"]), *_parts(state["pre_tokenizer"])]
    model = state["model"]
    # Other models, such as WordPiece, have one unknown token for a whole word.
    if model["type"] != "BPE" or not all(_keeps_all(part) for part in parts):
        return None
    byte_level = any(part["type"] == "ByteLevel" for part in parts)
    if not byte_level and (not model["byte_fallback"] or model["ignore_merges"]):
        return None
    tokens = (_symbols if byte_level else _pieces)(model["vocab"])
    form = next((part["type"] for part in parts if part["type"] in _FORMS), None)
    space = next((_space(part) for part in parts if _space(part)), " ")
    # Special tokens are matched in the raw text, which is counted in the form that is cut.
    texts = [text for token in added for text in _both(token["content"], space)]
    return LeastTokens([*tokens, *map(str.encode, texts)], form, space)


def _both(text: str, space: str) -> tuple[str, str]:
    return text, text.replace(" ", space)


def _parts(stage: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """Yield the parts of a normaliser or pre-tokenizer."""
    if stage is None:
        return
    inner = stage.get("pretokenizers") or stage.get("normalizers")
    if inner is None:
        yield stage
        return
    for part in inner:
        yield from _parts(part)


def _keeps_all(part: dict[str, Any]) -> bool:
    """Return whether a part keeps every character, or replaces it with another."""
    if part["type"] in ("Split", "Punctuation"):
        return bool(part["behavior"] != "Removed")
    if part["type"] == "Replace":
        return bool(_space(part))
    return part["type"] in (*_FORMS, "ByteLevel", "Digits", "Prepend", "Metaspace")


def _space(part: dict[str, Any]) -> str:
    """Return what a part replaces each space with, if it does."""
    replacement = ""
    if part["type"] == "Metaspace":
        replacement = part["replacement"]
    if part["type"] == "Replace" and part["pattern"] == {"String": " "}:
        replacement = part["content"]
    return replacement


def _symbols(vocabulary: Iterable[str]) -> Iterator[bytes]:
    """Yield the entries of a vocabulary that has a symbol for each byte."""
    byte_of = {ord(symbol): byte for symbol, byte in byte_symbols().items()}
    for piece in vocabulary:
        # An entry with other characters is a special token, which is passed separately.
        yield piece.translate(byte_of).encode("latin-1", "replace")


def _pieces(vocabulary: Iterable[str]) -> Iterator[bytes]:
    """Yield the entries of a vocabulary of characters, in which `<0xE2>` stands for a byte."""
    bytes_named = {f"<0x{byte:02X}>": bytes([byte]) for byte in range(256)}
    for piece in vocabulary:
        yield bytes_named.get(piece) or piece.encode()

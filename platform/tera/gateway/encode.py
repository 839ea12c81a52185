"""Encodes text to token ids with a model's own tokenizer, doing only the work that is needed."""

import json
import re
from array import array
from collections import OrderedDict
from collections.abc import Iterator
from threading import Lock
from typing import Any, Self

REMEMBERED_CHARACTERS = 8 * 1024 * 1024
"""How much text is remembered with its ids; it takes at most about 50 MB together with them."""

_SHORTEST_REMEMBERED = 32
"""Shorter segments are encoded faster than they are looked up."""

# Parts of a tokenizer whose result for a piece of text depends on nothing outside it. Others, such
# as SentencePiece's `Metaspace`, treat the first piece of a text specially.
_LOCAL_PARTS = {
    *("ByteLevel", "Digits", "Split", "Punctuation", "Whitespace", "WhitespaceSplit"),
    *("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents"),
}

_PROBE = " The  naïve café\tcosts 1234€,\r\n\r\n日本語 and 🚀🏽 — don't\u00a0you?  "


class TextEncoder:
    """A fast tokenizer that skips offsets, which nobody reads, and remembers segments.

    Several threads may use it at once; it does not hold the GIL while it encodes.

    The tokenizers that `_separators` accepts encode the text between two special tokens
    independently of its surroundings. So ids are remembered per segment: when a conversation
    returns with one more message, only that message is encoded.
    """

    def __init__(self, tokenizer: Any, separators: dict[str, int]) -> None:
        """`tokenizer` is a `tokenizers.Tokenizer` that nothing else modifies.

        Args:
            tokenizer: encodes a segment.
            separators: special tokens between which segments are independent, with their ids.
        """
        self._tokenizer = tokenizer
        self._separators = {text: array("I", [token]) for text, token in separators.items()}
        # Longest first: of two that begin at the same place, tokenizers too take the longer one.
        words = sorted(map(re.escape, separators), key=len, reverse=True)
        self._separator = re.compile(f"({'|'.join(words)})") if words else None
        self._remembered: OrderedDict[str, array[int]] = OrderedDict()
        self._remembered_characters = 0
        self._remembering = Lock()

    @classmethod
    def of(cls, tokenizer: Any) -> Self | None:
        """Return the encoder of a Hugging Face tokenizer, or None if it is not a fast one.

        An encoder that does not encode a probe text exactly as its tokenizer does is not used.
        """
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None or not hasattr(backend, "encode_batch_fast"):
            return None
        state = backend.to_str()
        # A copy: padding and truncation of the original must stay as they are for other users.
        own = type(backend).from_str(state)
        own.no_padding()
        own.no_truncation()
        encoder = cls(own, _separators(json.loads(state)))
        probe = _PROBE.join(["", *tokenizer.all_special_tokens[:2], ""])
        wanted = tokenizer(probe, add_special_tokens=False)["input_ids"]
        wanted_whole = tokenizer(_PROBE, add_special_tokens=True)["input_ids"]
        segments = encoder._segments(probe)
        found = encoder._joined(encoder._encoded(segments))
        return encoder if (found, encoder._whole(_PROBE)) == (wanted, wanted_whole) else None

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Return the ids of a text.

        Args:
            text: special tokens that are spelled out in it become those tokens.
            add_special_tokens: add those the model wants around raw prompts; the output of a chat
                template already has them.
        """
        if add_special_tokens:
            return self._whole(text)
        segments = self._segments(text)
        known = [self._separators.get(part) or self._remembered.get(part) for part in segments]
        new = [part for part, ids in zip(segments, known, strict=True) if ids is None]
        encoded = iter(self._encoded(new))
        parts = [next(encoded) if ids is None else ids for ids in known]
        with self._remembering:
            self._remember(segments, parts)
        return self._joined(parts)

    def _whole(self, text: str) -> list[int]:
        (encoding,) = self._tokenizer.encode_batch_fast([text], add_special_tokens=True)
        ids: list[int] = encoding.ids
        return ids

    def _segments(self, text: str) -> list[str]:
        """Split `text` into segments and special tokens."""
        if self._separator is None:
            return [text]
        return [part for part in self._separator.split(text) if part]

    def _encoded(self, segments: list[str]) -> list["array[int]"]:
        encodings = self._tokenizer.encode_batch_fast(segments, add_special_tokens=False)
        return [array("I", encoding.ids) for encoding in encodings]

    def _joined(self, parts: list["array[int]"]) -> list[int]:
        joined = array("I")
        for part in parts:
            joined += part
        return joined.tolist()

    def _remember(self, segments: list[str], parts: list["array[int]"]) -> None:
        for segment, ids in zip(segments, parts, strict=True):
            if len(segment) < _SHORTEST_REMEMBERED:
                continue
            if segment not in self._remembered:
                self._remembered_characters += len(segment)
            self._remembered[segment] = ids
            self._remembered.move_to_end(segment)
        # The least recently used segments are first in the dictionary.
        while self._remembered_characters > REMEMBERED_CHARACTERS:
            oldest, _ = self._remembered.popitem(last=False)
            self._remembered_characters -= len(oldest)


def _separators(state: dict[str, Any]) -> dict[str, int]:
    """Return a serialised tokenizer's special tokens if they split texts into independent parts."""
    parts = {*_parts(state["normalizer"]), *_parts(state["pre_tokenizer"])}
    tokens = state["added_tokens"]
    plain = not any(
        token[flag]
        for token in tokens
        for flag in ("lstrip", "rstrip", "single_word", "normalized")
    )
    if state["model"]["type"] != "BPE" or not plain or not parts <= _LOCAL_PARTS:
        return {}
    return {token["content"]: token["id"] for token in tokens}


def _parts(stage: dict[str, Any] | None) -> Iterator[str]:
    """Yield the types that a normaliser or pre-tokenizer is made of."""
    if stage is None:
        return
    inner = stage.get("pretokenizers") or stage.get("normalizers")
    if inner is None:
        yield stage["type"]
        return
    for part in inner:
        yield from _parts(part)

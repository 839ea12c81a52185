"""Text to token ids and back; the only place where a request is text.

A stream's text state (detokeniser, stop strings) lives here, in the gateway, and so survives
the death of the replica that makes its tokens.
"""

from typing import Protocol


class Detokenizer(Protocol):
    """Turns the ids of one completion into text, piece by piece."""

    def push(self, token_id: int) -> str:
        """Return the text that this token completes; empty inside of a UTF-8 character."""
        ...


class TextModel(Protocol):
    """What the gateway knows of a model's text; it needs no GPU and no weights."""

    @property
    def context_length(self) -> int:
        """Prompt and completion together, in tokens."""
        ...

    @property
    def vocab_size(self) -> int:
        """Token ids are below it."""
        ...

    async def encode(self, text: str) -> list[int]:
        """Return the token ids of a raw prompt, special tokens as the model wants them."""
        ...

    def detokenizer(self, prompt_token_ids: list[int]) -> Detokenizer:
        """Return the text state of a new completion of this prompt."""
        ...

    def token_text(self, token_id: int) -> str:
        """Return one token alone as text, as log-probabilities name it."""
        ...


class StopStrings:
    """Looks for stop strings in a text that comes in pieces.

    Text is held back only while it may be the beginning of a stop string, and never longer.
    """

    def __init__(self, stops: list[str]) -> None:
        self._stops = stops
        self._longest = max(map(len, stops), default=0)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Take more text; return what may be shown and whether a stop string ended it.

        Of several stop strings the one that is complete first wins; of those, the longest.
        """
        if not self._stops:
            return text, False
        held = self._held + text
        if text:
            # One character at a time is how tokens of one character would come: the text must
            # not depend on how it was cut.
            for end in range(len(self._held) + 1, len(held) + 1):
                ended = [stop for stop in self._stops if held.endswith(stop, 0, end)]
                if ended:
                    self._held = ""
                    return held[: end - max(map(len, ended))], True
        keep = self._prefix_at_end(held)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep], False

    def flush(self) -> str:
        """Return what was held back, when the completion ended by itself."""
        held, self._held = self._held, ""
        return held

    def _prefix_at_end(self, text: str) -> int:
        """Return the length of the longest end of `text` that begins a stop string."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            end = text[len(text) - length :]
            if any(len(stop) > length and stop.startswith(end) for stop in self._stops):
                return length
        return 0

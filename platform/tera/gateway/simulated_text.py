"""Text of models that the simulated engine runs: its own vocabulary of bytes and words."""

import codecs
from functools import cache

from pydantic import JsonValue

from tera.engine.simulated import SimulatedArgs
from tera.engine.simulated_vocabulary import Vocabulary


class SimulatedDetokenizer:
    """Bytes to text, holding back an incomplete UTF-8 character."""

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

    async def encode(self, text: str) -> list[int]:
        """Return the token ids of a raw prompt."""
        return self._vocabulary.encode(text)

    def detokenizer(self, prompt_token_ids: list[int]) -> SimulatedDetokenizer:
        """Return the text state of a new completion."""
        return SimulatedDetokenizer(self._vocabulary)

    def token_text(self, token_id: int) -> str:
        """Return one token alone as text."""
        if token_id == self._vocabulary.eos_id:
            return ""
        return self._vocabulary.token_bytes(token_id).decode("utf-8", "replace")


@cache
def _vocabulary() -> Vocabulary:
    return Vocabulary()

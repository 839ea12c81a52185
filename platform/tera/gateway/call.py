"""One request's facts, and the pieces that its answer is made of."""

from dataclasses import dataclass, field

from tera.contract.common import Usage, usage_of
from tera.gateway.render import AnswerPiece, TokenText
from tera.generation import FinishReason
from tera.routing.dispatch import Attempts
from tera.routing.switchboard import Share
from tera.tenancy.limits import Admission, Progress


@dataclass(slots=True)
class Call:
    """One request's facts, filled in on its way; the ledger and the metrics read them."""

    request_id: str
    route: str
    arrived: float
    """Monotonic, in seconds."""
    started_s: float
    """The same moment in Unix seconds."""
    tenant: str = ""
    share: Share = field(default_factory=lambda: Share(""))
    """Of the replicas, once the tenant is known."""
    model: str = ""
    """Short name of the model, once it is known to exist."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    first_token_s: float | None = None
    """Seconds from arrival."""
    admission: Admission | None = None
    """What is left of the limits, once they were asked."""
    attempts: Attempts = field(default_factory=Attempts)

    def usage(self) -> Usage:
        """Return the counts so far as the client sees them."""
        return usage_of(self.prompt_tokens, self.completion_tokens, self.cached_tokens)

    def progress(self) -> Progress:
        """Return what is charged if the request ends now: before its first token, nothing."""
        prompt_tokens = 0 if self.first_token_s is None else self.prompt_tokens
        return Progress(prompt_tokens, self.completion_tokens)

    def tell(self, admission: Admission) -> None:
        """Take note of what is left of the limits."""
        self.admission = admission


@dataclass(frozen=True, slots=True)
class PositionLogprobs:
    """The token at one position, and the likeliest ones there, likeliest first."""

    token: TokenText
    logprob: float | None
    """None for the first token of a prompt, which nothing predicts."""
    top: list[tuple[TokenText, float]]


@dataclass(frozen=True, slots=True)
class ChoiceDelta:
    """What one choice of an answer gained by one delivery of tokens: maybe nothing to show."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    logprobs: list[PositionLogprobs] | None = None
    """One for each token that the delta stands for, when asked for."""

    @property
    def says_something(self) -> bool:
        """Whether a client has to hear of it; inside of a character there is no text yet."""
        return bool(self.text or self.logprobs) or self.finish_reason is not None


@dataclass(frozen=True, slots=True)
class ChatDelta:
    """What one choice of a chat answer gained by one delivery of tokens: maybe nothing."""

    index: int
    piece: AnswerPiece
    finish_reason: str | None = None
    logprobs: list[PositionLogprobs] | None = None

    @property
    def says_something(self) -> bool:
        """Whether a client has to hear of it."""
        said = self.piece.content or self.piece.reasoning or self.piece.tool_calls
        return bool(said or self.logprobs) or self.finish_reason is not None

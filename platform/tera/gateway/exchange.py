"""One HTTP exchange: the facts about a request that the gateway's parts share."""

from dataclasses import dataclass, field

from starlette.requests import HTTPConnection
from starlette.types import Scope, Send

from tera.contract.common import Usage, usage_of
from tera.routing.switchboard import Share
from tera.tenancy.limits import Admission, Progress

_KEY = "tera.exchange"


@dataclass(slots=True)
class Exchange:
    """The facts about one request, filled in as it is handled; ledger and metrics read them."""

    request_id: str
    route: str
    arrived: float
    """Arrival, on the monotonic clock in seconds."""
    started_s: float
    """The same moment in Unix seconds."""
    send: Send
    """Sends ASGI messages past the framework, whose layers would wrap every event once more."""
    body_is_read: bool = False
    """Whether the request was read to its end."""
    lingers: bool = False
    """Whether it was answered before that, so that its connection closes soon after the answer."""
    tenant: str = ""
    share: Share = field(default_factory=lambda: Share(""))
    """The tenant's share of the replicas, once the tenant is known."""
    model: str = ""
    """Short name of the model, once it is known to exist."""
    body_bytes: int = 0
    """Size of the request's body, once it has been read."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    taken_prompts: dict[int, int] = field(default_factory=dict)
    """Tokens of the prompts that a replica has taken, by the index of their first choice; filled
    as choices end."""
    first_token_s: float | None = None
    """Seconds from arrival."""
    admission: Admission | None = None
    """What is left of the limits, once they have been checked."""
    replica_switches: int = 0
    """How often another replica continued one of its generations."""
    status: int = 0
    """Status of the answer; 0 until it has begun."""
    code: str = ""
    """Code of the error sent to the client, if any."""

    def usage(self) -> Usage:
        """Return the counts so far as the client sees them."""
        return usage_of(self.prompt_tokens, self.completion_tokens, self.cached_tokens)

    def progress(self) -> Progress:
        """Return what is charged if the request ends now: before its first token, nothing."""
        prompt_tokens = 0 if self.first_token_s is None else self.prompt_tokens
        return Progress(prompt_tokens, self.completion_tokens)

    def abandoned(self) -> Progress:
        """Return what is charged if its client has left: also a prompt without any token yet.

        Else a client that always leaves before the first token would have prefills for nothing.
        """
        so_far = self.progress()
        taken_tokens = sum(self.taken_prompts.values())
        return Progress(max(so_far.prompt_tokens, taken_tokens), so_far.completion_tokens)

    def tell(self, admission: Admission) -> None:
        """Record what is left of the limits."""
        self.admission = admission

    def enter(self, scope: Scope) -> None:
        """Attach this exchange to an ASGI scope."""
        scope[_KEY] = self

    @classmethod
    def of(cls, request: HTTPConnection) -> "Exchange":
        """Return the exchange that a request belongs to."""
        exchange: Exchange = request.scope[_KEY]
        return exchange

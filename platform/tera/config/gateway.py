"""The gateway: its replicas, and what holds for every request."""

from pydantic import Field

from tera.config.cluster import AuthConfig, Resources
from tera.config.limits import LimitsConfig
from tera.config.model import ReplicaBounds
from tera.config.section import Section


class RequestLimits(Section):
    """Bounds on one request, whoever sends it."""

    max_body_bytes: int = Field(default=10 * 1024 * 1024, ge=1024)
    """A longer request is refused with 413."""
    deadline_seconds: float = Field(default=600, gt=0)
    """From a request's arrival at the gateway to its last token, time in queues included."""
    first_token_deadline_seconds: float = Field(default=120, gt=0)
    """From when a replica has taken a request to its first token. Time in the queue before, a cold
    start among it, is not counted."""
    retries: int = Field(default=2, ge=0)
    """Further replicas tried after one has failed."""
    keep_alive_seconds: float = Field(default=15, gt=0, le=15)
    """Longest silence on a stream before a comment line is sent."""
    drain_seconds: float = Field(default=30, gt=0)
    """How long a gateway or engine replica that is taken away goes on with the requests it has.
    Then Ray Serve ends it."""


class CorsConfig(Section):
    """Which web pages may call the API from a browser."""

    origins: tuple[str, ...] = Field(default=(), strict=False)
    """Such as https://chat.example.com; "*" is every page; none switches CORS off."""


class UsageConfig(Section):
    """The ledger of requests; editing it restarts nothing."""

    export_directory: str = ""
    """Where every gateway replica finds the same files, one for each hour, to which the ledger is
    copied as JSON Lines; empty keeps it in Redis alone."""
    retention_days: int = Field(default=35, ge=1)
    """How long Redis keeps a request's record. With an export, not before it is exported."""


class GatewayConfig(Section):
    """The replicas that speak HTTP."""

    replicas: ReplicaBounds = ReplicaBounds()
    resources: Resources = Resources()
    """Of one pod of the CPU group, which holds gateways and the models without a pool."""
    auth: AuthConfig = AuthConfig()
    limits: LimitsConfig = LimitsConfig()
    usage: UsageConfig = UsageConfig()
    cors: CorsConfig = CorsConfig()
    openapi: bool = True
    """Whether `/openapi.json` is served; it asks for a key."""
    requests: RequestLimits = RequestLimits()

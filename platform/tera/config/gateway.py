"""The gateway: its replicas, and the rules for every request."""

from pydantic import Field

from tera.config.cluster import AuthConfig, Resources
from tera.config.limits import LimitsConfig
from tera.config.model import ReplicaBounds
from tera.config.pods import RayPodConfig
from tera.config.section import Section


class RequestLimits(Section):
    """Bounds on each request, of any tenant."""

    max_body_bytes: int = Field(default=10 * 1024 * 1024, ge=1024)
    """Largest request body; a larger one is refused with status 413."""
    body_deadline_seconds: float = Field(default=120, gt=0)
    """Time from a request's arrival at the gateway to the last byte of its body; a slower request
    is refused with status 400."""
    deadline_seconds: float = Field(default=600, gt=0)
    """Time from a request's arrival at the gateway to its last token, including queueing."""
    first_token_deadline_seconds: float = Field(default=120, gt=0)
    """Time from when a replica accepts a request to its first token. Queueing before that,
    including for a cold start, is not counted."""
    retries: int = Field(default=2, ge=0)
    """How many more replicas are tried after one has failed."""
    keep_alive_seconds: float = Field(default=15, gt=0, le=15)
    """After this long without an event, a comment line is sent to keep the stream open."""
    drain_seconds: float = Field(default=30, gt=0)
    """How long a gateway or engine replica that is being removed may finish its requests. Then
    Ray Serve ends it."""


class ConnectionLimits(Section):
    """Bounds on clients' connections at each node's proxy; editing them makes a new cluster."""

    max: int = Field(default=16384, ge=100)
    """Connections in total; a gateway replica is sized for 10,000 streams. The proxy takes fewer if
    it is not allowed to open 2.5 times as many files."""
    per_source: int = Field(default=8192, ge=1)
    """Connections of one IPv4 address, or of one IPv6 /64 network. Each pod of an ingress is one
    source, and limits its own clients: lower this only if clients connect to the proxy directly."""


class CorsConfig(Section):
    """Which web pages may call the API from a browser."""

    origins: tuple[str, ...] = Field(default=(), strict=False)
    """Allowed origins, such as https://chat.example.com; "*" allows all; an empty list turns CORS
    off."""


class UsageConfig(Section):
    """The usage ledger of requests; editing this restarts nothing."""

    export_directory: str = ""
    """Directory, shared by all gateway replicas, to which the ledger is copied as JSON Lines, one
    file per hour; empty keeps it in Redis only."""
    retention_days: int = Field(default=35, ge=1)
    """How long Redis keeps a request's record. With an export, it is never removed before it is
    exported."""
    max_bytes: int = Field(default=512 * 1024 * 1024, ge=1024 * 1024)
    """The most memory of Redis that all tenants' records take. Beyond it, the oldest records of the
    tenants with the most are removed; with an export, never before they are exported."""


class GatewayConfig(Section):
    """The replicas that serve HTTP."""

    replicas: ReplicaBounds = ReplicaBounds()
    resources: Resources = Resources()
    """Resources of each pod in the CPU group, which runs the gateways and models without a pool."""
    auth: AuthConfig = AuthConfig()
    limits: LimitsConfig = LimitsConfig()
    usage: UsageConfig = UsageConfig()
    cors: CorsConfig = CorsConfig()
    openapi: bool = True
    """Whether `/openapi.json` is served; it requires a key."""
    requests: RequestLimits = RequestLimits()
    connections: ConnectionLimits = ConnectionLimits()
    pod: RayPodConfig = RayPodConfig()

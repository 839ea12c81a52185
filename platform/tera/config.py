"""The platform's configuration: every knob, its default, unit and meaning.

`values.yaml` is the file form (camelCase); `PlatformConfig` is the same tree in Python
(snake_case). This is the only module that reads the environment or configuration files.
"""

import datetime
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

import yaml
from pydantic import (
    BeforeValidator,
    Field,
    JsonValue,
    StringConstraints,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from tera.cluster_config import (
    CPU_POOL,
    AuthConfig,
    GcsFaultToleranceConfig,
    HeadConfig,
    HttpRouteConfig,
    HuggingFaceConfig,
    ImageConfig,
    IngressConfig,
    ModelCacheConfig,
    NamedReference,
    NetworkPolicyConfig,
    ObservabilityConfig,
    PdbConfig,
    PoolConfig,
    PoolDefaults,
    PoolName,
    Quantity,
    RayAuthConfig,
    Resources,
    SecretReference,
    UpgradeConfig,
)
from tera.errors import ConfigError
from tera.section import Section as Section

ModelName = Annotated[str, StringConstraints(pattern=r"^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$")]
"""A short DNS label: it becomes part of an application's and a Kubernetes object's name."""

TenantName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([a-z0-9._-]{0,62}[a-z0-9])?$")]

Capability = Literal["completions", "chat"]

Routing = Literal["prefix_affinity", "least_loaded"]

SOURCE_SCHEMES = ("hf", "s3", "gs", "pvc", "file", "demo")


class ReplicaBounds(Section):
    """How many replicas there may be; applied in place, without a restart."""

    min: int = Field(default=1, ge=0)
    """0 scales to zero when idle."""
    max: int = Field(default=1, ge=0)
    """0 keeps the entry and deploys nothing."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.max and self.min > self.max:
            raise ValueError(f"min ({self.min}) is over max ({self.max}); lower min or raise max")
        return self


class Parallelism(Section):
    """How one replica is spread over GPUs."""

    tensor: int = Field(default=1, ge=1)
    """GPUs of one worker that share every layer."""
    pipeline: int = Field(default=1, ge=1)
    """Workers that hold consecutive layers."""


class GpuSharing(Section):
    """Replicas that share a GPU, of one model or of several, and are awake in turns.

    One that sleeps has its weights in the host's memory (vLLM's sleep mode) and wakes in seconds.
    """

    replicas_per_gpu: int = Field(default=1, ge=1, le=8)
    """How many replicas of this size a GPU takes; with 1 it is each replica's own."""
    turn_seconds: float = Field(default=20, gt=0)
    """How long a replica with work stays awake while another one waits for its turn."""

    @property
    def is_shared(self) -> bool:
        """Whether a replica may have company on its GPU."""
        return self.replicas_per_gpu > 1

    @property
    def gpu_part(self) -> float:
        """Part of a GPU that one replica asks Ray for, in Ray's steps of 1/10,000."""
        return 10_000 // self.replicas_per_gpu / 10_000


class Scaling(Section):
    """Queue bounds and autoscaling of one model; applied in place, without a restart."""

    target_ongoing_requests: float = Field(default=16, gt=0)
    """Queue depth aimed at: queued and running requests per replica."""
    max_ongoing_requests: int = Field(default=64, ge=1)
    """Requests that one replica accepts at once; more wait at the gateway."""
    max_queued_requests: int = Field(default=256, ge=1)
    """Requests that one gateway replica lets wait for this model."""
    upscale_delay_seconds: float = Field(default=10, ge=0)
    """How long the load has to be over the target before replicas are added."""
    downscale_delay_seconds: float = Field(default=300, ge=0)
    """How long the load has to be below the target before replicas are removed."""
    downscale_to_zero_delay_seconds: float = Field(default=1800, ge=0)
    """How long a model has to be idle before its last replica is removed."""
    cold_start_deadline_seconds: float = Field(default=600, gt=0)
    """How long a request waits for a model that has no replica yet."""


class EngineConfig(Section):
    """Which engine a model runs on. Editing it reloads this model and no other."""

    kind: Literal["vllm", "simulated"] = "vllm"
    """`simulated` needs no GPU and makes words of no meaning, at times that `args` sets."""
    args: dict[str, JsonValue] = Field(default_factory=dict)
    """Passed to the engine as they are: vLLM's `AsyncEngineArgs`, or the simulated engine's
    `profile` and `faults`."""


class ModelConfig(Section):
    """One model that tenants can name."""

    id: str = Field(min_length=1, max_length=256)
    """What clients send as `model`."""
    aliases: tuple[str, ...] = Field(default=(), strict=False)
    """Other names that it answers to."""
    enabled: bool = True
    """False removes the model, without removing its settings."""
    source: str = ""
    """Where the weights are: hf://org/name@revision, s3://, gs://, pvc://, file:// or demo://."""
    engine: EngineConfig = EngineConfig()
    pool: str = ""
    """Entry of `gpuPools` whose workers hold it; without one it runs on CPUs."""
    replicas: ReplicaBounds = ReplicaBounds()
    parallelism: Parallelism = Parallelism()
    gpu_sharing: GpuSharing = GpuSharing()
    scaling: Scaling = Scaling()
    routing: Routing = "prefix_affinity"
    """`prefix_affinity` sends a prompt to a replica that has its beginning cached and is not too
    busy, `least_loaded` to any of the least busy ones; applied in place."""
    capabilities: tuple[Capability, ...] = Field(default=("completions", "chat"), strict=False)
    """The endpoints that it answers at."""

    @model_validator(mode="after")
    def _has_source(self) -> Self:
        scheme, separator, rest = self.source.partition("://")
        if self.source and (not separator or scheme not in SOURCE_SCHEMES or not rest):
            wanted = ", ".join(f"{scheme}://" for scheme in SOURCE_SCHEMES)
            raise ValueError(f"source {self.source!r} must begin with one of {wanted}")
        if self.engine.kind == "vllm" and not self.source:
            raise ValueError("source is missing; a vllm model needs one, such as hf://org/name")
        return self

    @model_validator(mode="after")
    def _shares_whole(self) -> Self:
        if self.gpu_sharing.is_shared and self._ranks > 1:
            raise ValueError(
                f"gpuSharing.replicasPerGpu: a replica over {self._ranks} GPUs shares none of "
                "them; set it to 1, or parallelism.tensor and .pipeline"
            )
        return self

    @property
    def _ranks(self) -> int:
        return self.parallelism.tensor * self.parallelism.pipeline

    @property
    def gpus(self) -> int:
        """GPUs that one replica is on; 0 without a pool."""
        return self._ranks if self.pool else 0

    @property
    def most_gpus(self) -> Fraction:
        """GPUs that all replicas are on at the most; a shared one counts in parts."""
        return Fraction(self.replicas.max * self.gpus, self.gpu_sharing.replicas_per_gpu)


class ModelDefaults(Section):
    """What every model inherits where it says nothing itself."""

    enabled: bool = True
    """Whether models are deployed."""
    replicas: ReplicaBounds = ReplicaBounds()
    parallelism: Parallelism = Parallelism()
    gpu_sharing: GpuSharing = GpuSharing()
    scaling: Scaling = Scaling()
    routing: Routing = "prefix_affinity"
    """How a request's replica is chosen."""


class RequestLimits(Section):
    """Bounds on one request, whoever sends it."""

    max_body_bytes: int = Field(default=10 * 1024 * 1024, ge=1024)
    """A longer request is refused with 413."""
    deadline_seconds: float = Field(default=600, gt=0)
    """From arrival to the last token."""
    first_token_deadline_seconds: float = Field(default=120, gt=0)
    """From arrival to the first token, cold start apart."""
    retries: int = Field(default=2, ge=0)
    """Further replicas tried after one has failed."""
    keep_alive_seconds: float = Field(default=15, gt=0, le=15)
    """Longest silence on a stream before a comment line is sent."""


class CorsConfig(Section):
    """Which web pages may call the API from a browser."""

    origins: tuple[str, ...] = Field(default=(), strict=False)
    """Such as https://chat.example.com; "*" is every page; none switches CORS off."""


class Limits(Section):
    """What may be used at most: 0 blocks, absent is unlimited."""

    requests_per_minute: int | None = Field(default=None, ge=0)
    """Requests that are admitted in a minute."""
    tokens_per_minute: int | None = Field(default=None, ge=0)
    """Prompt and completion tokens together."""
    concurrent_requests: int | None = Field(default=None, ge=0)
    """Requests in flight at once."""
    token_budget: int | None = Field(default=None, ge=0)
    """Prompt and completion tokens of one `budgetPeriod`."""
    budget_period: Literal["day", "month"] | None = None
    """A calendar day or month in UTC; a month unless said."""


class TenantLimits(Limits):
    """The limits of one tenant, over all of its keys."""

    weight: int | None = Field(default=None, ge=1, le=100)
    """The tenant's share in tokens while requests wait for replicas, beside those of other tenants
    that wait; 1 unless said."""
    models: dict[ModelName, Limits] = Field(default_factory=dict)
    """By a model's short name. A limit given here counts that model's requests alone, in the
    place of the tenant's own."""


class LimitsConfig(Section):
    """Limits of tenants; editing them restarts nothing."""

    default: TenantLimits = TenantLimits()
    """Where neither `tenants` nor `tera tenants set` says anything of a tenant's limit."""
    tenants: dict[TenantName, TenantLimits] = Field(default_factory=dict)
    """By tenant; each limit that is absent here is `default`'s."""
    on_redis_error: Literal["local", "closed"] = "local"
    """While Redis is away: `local` goes on with this gateway replica's share of each limit,
    `closed` refuses every request."""


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


class ExternalRedis(SecretReference):
    """A Redis or Valkey that exists already."""

    address: str = ""
    """host:port."""
    tls: bool = False
    """Whether the connection is encrypted."""


class RedisConfig(Section):
    """Where keys and limits live."""

    embedded: bool = True
    """On one machine a redis-server of our own; on a cluster one Valkey StatefulSet."""
    image: str = Field(default="valkey/valkey:8.1.4-alpine", min_length=1)
    """Of the embedded Valkey."""
    storage: Quantity = "8Gi"
    """Of the embedded Valkey's volume."""
    external: ExternalRedis = ExternalRedis()

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if not self.embedded and not self.external.address:
            raise ValueError("external.address is missing; give host:port, or set embedded: true")
        if self.embedded and self.external.address:
            raise ValueError("external.address is set; set embedded: false to use it")
        return self


class PlatformConfig(Section):
    """A whole platform."""

    models: dict[ModelName, ModelConfig] = Field(default_factory=dict)
    """What you edit day to day, by short name."""
    model_defaults: ModelDefaults = ModelDefaults()
    gpu_pools: dict[PoolName, PoolConfig] = Field(default_factory=dict)
    """Kinds of GPU workers, by short name."""
    pool_defaults: PoolDefaults = PoolDefaults()
    gateway: GatewayConfig = GatewayConfig()
    redis: RedisConfig = RedisConfig()
    image: ImageConfig = ImageConfig()
    image_pull_secrets: tuple[NamedReference, ...] = Field(default=(), strict=False)
    """Secrets that the images are pulled with."""
    ray_version: str = Field(default="2.60.0", min_length=1)
    """Must be that of the Ray in the image."""
    head: HeadConfig = HeadConfig()
    gcs_fault_tolerance: GcsFaultToleranceConfig = GcsFaultToleranceConfig()
    huggingface: HuggingFaceConfig = HuggingFaceConfig()
    model_cache: ModelCacheConfig = ModelCacheConfig()
    upgrade: UpgradeConfig = UpgradeConfig()
    ingress: IngressConfig = IngressConfig()
    http_route: HttpRouteConfig = HttpRouteConfig()
    observability: ObservabilityConfig = ObservabilityConfig()
    network_policy: NetworkPolicyConfig = NetworkPolicyConfig()
    pdb: PdbConfig = PdbConfig()
    ray_auth: RayAuthConfig = RayAuthConfig()
    global_: dict[str, JsonValue] = Field(default_factory=dict, alias="global")
    """Helm's own; the chart reads nothing of it."""

    @model_validator(mode="before")
    @classmethod
    def _inherit(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        merged = dict(values)
        for defaults, entries in (("modelDefaults", "models"), ("poolDefaults", "gpuPools")):
            inherited, own = values.get(defaults), values.get(entries)
            if isinstance(inherited, Mapping) and isinstance(own, Mapping):
                merged[entries] = {
                    name: deep_merge(inherited, entry) for name, entry in own.items()
                }
        return merged

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        faults = [
            *_shared_names(self.models),
            *_shared_orders(self.gpu_pools),
            *_misjoined_pools(self.gpu_pools),
            *_misplaced_models(self),
            *_unshared_cache(self),
            *_unread_cache(self),
        ]
        if faults:
            raise ValueError("\n".join(faults))
        return self

    def deployed_models(self) -> dict[str, ModelConfig]:
        """Return the models that get an application, by short name, in the file's order."""
        return {
            name: model
            for name, model in self.models.items()
            if model.enabled and model.replicas.max > 0
        }


def _shared_names(models: Mapping[str, ModelConfig]) -> Iterator[str]:
    owner: dict[str, str] = {}
    for name, model in models.items():
        for client_name in (model.id, *model.aliases):
            if client_name in owner:
                yield (
                    f"models.{name}: models.{owner[client_name]} answers to {client_name!r} too; "
                    "give each model its own id and aliases"
                )
            owner[client_name] = name


def _shared_orders(pools: Mapping[str, PoolConfig]) -> Iterator[str]:
    if CPU_POOL in pools:
        yield f"gpuPools.{CPU_POOL}: is the group without GPUs; give the pool another name"
    owner: dict[int, str] = {}
    for name, pool in pools.items():
        first = owner.setdefault(pool.order, name)
        if first != name:
            free = max(each.order for each in pools.values()) + 1
            yield f"gpuPools.{name}.order: {pool.order} is gpuPools.{first}'s; {free} is free"


def _misjoined_pools(pools: Mapping[str, PoolConfig]) -> Iterator[str]:
    for name, pool in pools.items():
        if not pool.joins:
            continue
        joined = pools.get(pool.joins)
        if joined is None:
            yield f"gpuPools.{name}.joins: {_no_pool(pool.joins, pools)}"
        elif joined.joins:
            yield (
                f"gpuPools.{name}.joins: the pool {pool.joins!r} joins {joined.joins!r}; "
                "name one that joins none"
            )


def _no_pool(name: str, pools: Mapping[str, PoolConfig]) -> str:
    there = ", ".join(sorted(each for each, pool in pools.items() if not pool.joins)) or "none"
    return f"there is no pool {name!r}; the pools are: {there}"


def _misplaced_models(platform: "PlatformConfig") -> Iterator[str]:
    gpus = dict.fromkeys(platform.gpu_pools, Fraction(0))
    holding = {
        name: {
            each: pool for each, pool in platform.gpu_pools.items() if name in (each, pool.joins)
        }
        for name in platform.gpu_pools
    }
    for name, model in platform.models.items():
        if not model.pool:
            continue
        pool = platform.gpu_pools.get(model.pool)
        if pool is None:
            yield f"models.{name}.pool: {_no_pool(model.pool, platform.gpu_pools)}"
            continue
        if pool.joins:
            yield (
                f"models.{name}.pool: {model.pool!r} joins the pool {pool.joins!r}; name that one, "
                "and both hold the model"
            )
            continue
        for each, held_by in holding[model.pool].items():
            if model.parallelism.tensor > held_by.gpus_per_worker:
                yield (
                    f"models.{name}.parallelism.tensor: {model.parallelism.tensor} is over the "
                    f"{held_by.gpus_per_worker} GPU(s) of a worker; lower it, or raise "
                    f"gpuPools.{each}.gpusPerWorker"
                )
        if model.enabled:
            gpus[model.pool] += model.most_gpus
    for name, wanted in ((name, math.ceil(each)) for name, each in gpus.items()):
        there_are = sum(each.max_workers * each.gpus_per_worker for each in holding[name].values())
        if wanted > there_are:
            yield (
                f"gpuPools.{name}.maxWorkers: its models may ask for {wanted} GPUs and its "
                f"workers have {there_are}; raise maxWorkers, or lower a replicas.max"
            )


def _unshared_cache(platform: "PlatformConfig") -> Iterator[str]:
    cache = platform.model_cache
    workers = sum(pool.max_workers for pool in platform.gpu_pools.values())
    if cache.enabled and cache.access_mode == "ReadWriteOnce" and workers > 1:
        yield (
            f"modelCache.accessMode: ReadWriteOnce is for one worker and the pools may have "
            f"{workers}; use ReadWriteMany"
        )


def _unread_cache(platform: "PlatformConfig") -> Iterator[str]:
    cache = platform.model_cache
    shared = cache.enabled and cache.access_mode == "ReadWriteMany"
    if platform.huggingface.offline and not shared:
        yield (
            "huggingface.offline: gateways and workers then read the model cache alone; set "
            "modelCache.enabled: true, with accessMode: ReadWriteMany"
        )


def deep_merge(defaults: Mapping[str, Any], values: Any) -> Any:
    """Return `values` over `defaults`; anything but two mappings is replaced whole."""
    if not isinstance(values, Mapping):
        return values
    merged = dict(defaults)
    for key, value in values.items():
        below = merged.get(key)
        merged[key] = deep_merge(below, value) if isinstance(below, Mapping) else value
    return merged


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML where writing a key twice is an error, not a silent choice of the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is written twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def load_platform(*paths: Path) -> PlatformConfig:
    """Read values files, each over those before it, as Helm merges them.

    Raises:
        ConfigError: one line for each fault, each beginning with the path of the value.
    """
    return parse_platform(_merged(paths))


def load_cluster_platform(*paths: Path) -> PlatformConfig:
    """Read values files as Helm does: over the chart's defaults, which are for a cluster.

    Raises:
        ConfigError: one line for each fault, each beginning with the path of the value.
    """
    return parse_platform(_merged((_values_file("values.yaml"), *paths)))


_HELM_HEADINGS: Final = ("COMPUTED VALUES", "USER-SUPPLIED VALUES")
"""First lines of what `helm get values` prints, unless it is asked for YAML."""


def _merged(paths: Iterable[Path]) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for path in paths:
        values = _read_yaml(path)
        if values is None:
            continue
        if not isinstance(values, Mapping):
            raise ConfigError(f"{path}: values: must be a map, such as models: {{}}")
        helm = {key for key in _HELM_HEADINGS if key in values and values[key] is None}
        merged = deep_merge(
            merged, {key: value for key, value in values.items() if key not in helm}
        )
    return merged


def _read_yaml(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    try:
        return yaml.load(text, Loader=_UniqueKeyLoader)  # noqa: S506  a SafeLoader
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: no valid YAML: {error}") from error


def parse_platform(values: Any) -> PlatformConfig:
    """Return the platform that parsed values describe.

    Raises:
        ConfigError: one line for each fault, each beginning with the path of the value.
    """
    try:
        return PlatformConfig.model_validate(values, by_alias=True, by_name=False)
    except ValidationError as error:
        faults = [_fault(detail["loc"], detail) for detail in error.errors()]
        raise ConfigError("\n".join(faults)) from error


def _fault(location: tuple[int | str, ...], detail: Any, *, show: bool = True) -> str:
    kind = detail["type"]
    if not location and kind == "value_error":
        return str(detail["ctx"]["error"])  # several lines, each with its path
    path = ".".join(str(part) for part in location if part != "[key]") or "values"
    if kind == "extra_forbidden":
        return f"{path}: unknown key"
    if kind == "missing":
        return f"{path}: is missing"
    message = re.sub(r"^Value error, ", "", detail["msg"])
    if kind == "value_error":
        return f"{path}: {message}"
    return f"{path}: {message} (got {detail['input']!r})" if show else f"{path}: {message}"


def _moment(value: Any) -> Any:
    """Return YAML's dates and ISO texts as a moment, in UTC unless they say otherwise."""
    if isinstance(value, str):
        try:
            value = datetime.datetime.fromisoformat(value)
        except ValueError as error:
            raise ValueError("give a date such as 2027-01-31 or 2027-01-31T12:00:00Z") from error
    if isinstance(value, datetime.date) and not isinstance(value, datetime.datetime):
        value = datetime.datetime.combine(value, datetime.time())
    if isinstance(value, datetime.datetime) and value.tzinfo is None:
        value = value.replace(tzinfo=datetime.UTC)
    return value


class KeyEntry(Section):
    """One API key that is made elsewhere, in a keys file."""

    tenant: TenantName
    key: str | None = Field(default=None, repr=False)
    """The key itself; or else `keyHash`."""
    key_hash: str | None = Field(default=None, repr=False)
    """Its HMAC-SHA-256 under the platform's pepper, in hex."""
    models: tuple[str, ...] | None = Field(default=None, strict=False)
    """The ids that clients may send as `model`; absent allows all."""
    expires: Annotated[datetime.datetime, BeforeValidator(_moment)] | None = None
    """The moment from which it is refused; absent never."""
    limits: Limits | None = None
    """Of this key alone, beside its tenant's."""

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.key is None) == (self.key_hash is None):
            raise ValueError("give one of key and keyHash")
        return self


_KEYS_FILE: Final = TypeAdapter(list[KeyEntry])


def load_keys_file(path: Path) -> tuple[KeyEntry, ...]:
    """Read a keys file: a list of `KeyEntry` in YAML.

    Raises:
        ConfigError: one line for each fault, each with the path of the value, and never with a
            value: it may be a key.
    """
    try:
        values = _read_yaml(path)
    except ConfigError as error:
        cause = error.__cause__
        if not isinstance(cause, yaml.MarkedYAMLError) or cause.problem_mark is None:
            raise
        # The parser's own words quote the line.
        line = cause.problem_mark.line + 1
        raise ConfigError(f"{path}: no valid YAML in line {line}") from None
    try:
        entries = _KEYS_FILE.validate_python(
            [] if values is None else values, by_alias=True, by_name=False
        )
    except ValidationError as error:
        faults = [_fault(detail["loc"], detail, show=False) for detail in error.errors()]
        raise ConfigError("\n".join(f"{path}: {fault}" for fault in faults)) from None
    first: dict[str | None, int] = {}
    for position, entry in enumerate(entries):
        known = first.setdefault(entry.key or entry.key_hash, position)
        if known != position:
            raise ConfigError(f"{path}: {position}: the same key as {known}")
    return tuple(entries)


def model_directory(model: ModelConfig, home: Path) -> str:
    """Return what vLLM loads for a model: a directory, or a name that it resolves itself."""
    scheme, _, rest = model.source.partition("://")
    if scheme == "demo":
        dtype = model.engine.args.get("dtype", "bfloat16")
        return str(home / "models" / f"{rest}-{dtype}")
    if scheme == "hf":
        return rest.partition("@")[0]
    # vLLM streams from object stores by their whole address.
    return model.source if scheme in ("s3", "gs") else rest


def reads_hub(models: Iterable[ModelConfig]) -> bool:
    """Return whether any of these models has weights that are not on this machine."""
    return any(
        model.engine.kind == "vllm" and not model.source.startswith(("demo://", "file://"))
        for model in models
    )


def revision_args(source: str) -> dict[str, JsonValue]:
    """Return vLLM's arguments for the revision that a source names, such as hf://org/name@v1."""
    scheme, _, rest = source.partition("://")
    revision = rest.partition("@")[2] if scheme == "hf" else ""
    return {"revision": revision, "tokenizer_revision": revision} if revision else {}


FRONTEND_ARGS = ("tool_call_parser", "chat_template")
"""Entries of a vllm model's `engine.args` that the gateway reads and the engine does not know."""


def engine_args(args: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
    """Return the entries of `engine.args` that are vLLM's engine arguments."""
    return {name: value for name, value in args.items() if name not in FRONTEND_ARGS}


def set_environment(variables: Mapping[str, str], *, keep_existing: bool = False) -> None:
    """Set variables for this process and those that it starts."""
    for name, value in variables.items():
        if not keep_existing or name not in os.environ:
            os.environ[name] = value


def default_values_file() -> Path:
    """Return the values of the demo platform, from a checkout or from an installed package."""
    return _values_file("values-local.yaml")


def _values_file(name: str) -> Path:
    here = Path(__file__).resolve().parent
    installed = here / name
    return installed if installed.exists() else here.parents[1] / "helm/tera" / name


class ServeOptions(Section):
    """Where `tera serve` listens."""

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=1, le=65535)

    @classmethod
    def from_environment(cls) -> Self:
        """Return TERA_HOST and TERA_PORT.

        Raises:
            ConfigError: TERA_PORT is no port.
        """
        port = os.environ.get("TERA_PORT", "8000")
        if not port.isdigit() or not 0 < int(port) < 65536:
            raise ConfigError(f"TERA_PORT={port!r}: give a port from 1 to 65535")
        return cls(host=os.environ.get("TERA_HOST", "127.0.0.1"), port=int(port))


class ClientOptions(Section):
    """Which platform a command asks as a client, and with which key."""

    base_url: str
    """Without /v1."""
    api_key: str = Field(default="", repr=False)
    """Empty without one."""

    @classmethod
    def from_environment(cls, base_url: str | None = None) -> Self:
        """Return `base_url` or else TERA_BASE_URL, with TERA_API_KEY.

        Without an address they are those of the platform that runs in TERA_HOME; its key is never
        for another address.

        Raises:
            ConfigError: there is no address, or one of both cannot be sent over HTTP.
        """
        address = base_url or os.environ.get("TERA_BASE_URL", "")
        found = {} if address else _local_client(Runtime.from_environment().home / "local.env")
        address = (address or found.get("TERA_BASE_URL", "")).rstrip("/").removesuffix("/v1")
        if not address:
            raise ConfigError("TERA_BASE_URL is not set, and no platform runs here.")
        if not re.match("https?://[^/]", address) or not _sendable(address):
            raise ConfigError(f"{address!r}: give an address such as https://llm.example.com")
        key = (os.environ.get("TERA_API_KEY") or found.get("TERA_API_KEY", "")).strip()
        if not _sendable(key):
            raise ConfigError("TERA_API_KEY: is no key")
        return cls(base_url=address, api_key=key)


def _local_client(file: Path) -> dict[str, str]:
    """Return what `tera serve` leaves for clients, or nothing."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    return dict(line.split("=", 1) for line in lines if "=" in line)


def _sendable(text: str) -> bool:
    """Return whether `http.client` takes a text, whose own words would repeat it."""
    return text.isascii() and not re.search(r"[\x00-\x20\x7f]", text)


class Runtime(Section):
    """What a process learns from its environment: addresses and secrets, never the platform.

    `tera serve` sets these for one machine, the chart sets them from Secrets.
    """

    redis_url: str = "redis://127.0.0.1:6379/0"
    key_pepper: str = ""
    """Server-side part of every key's hash; without it a stolen Redis dump is no use."""
    cluster_secret: str = ""
    """Shared by gateway and engine replicas; authenticates the token channel."""
    channel_host: str = ""
    """Address that engine replicas reach this process at; empty is the node's own."""
    keys_file: Path | None = None
    """API keys that are made elsewhere; gateway replicas follow its changes; see `KeyEntry`."""
    home: Path = Path(".tera")
    """State of one machine: models, embedded Redis, logs, secrets."""

    @classmethod
    def from_environment(cls) -> Self:
        """Return the settings of this process."""
        names = {"redis_url", "key_pepper", "cluster_secret", "channel_host"}
        found = {name: os.environ.get(f"TERA_{name.upper()}") for name in names}
        keys_file = os.environ.get("TERA_KEYS_FILE")
        return cls(
            **{name: value for name, value in found.items() if value is not None},
            keys_file=Path(keys_file) if keys_file else None,
            home=Path(os.environ.get("TERA_HOME", ".tera")).absolute(),
        )

    def to_environment(self) -> dict[str, str]:
        """Return the variables that `from_environment` reads back."""
        return {
            "TERA_REDIS_URL": self.redis_url,
            "TERA_KEY_PEPPER": self.key_pepper,
            "TERA_CLUSTER_SECRET": self.cluster_secret,
            "TERA_CHANNEL_HOST": self.channel_host,
            "TERA_KEYS_FILE": "" if self.keys_file is None else str(self.keys_file),
            "TERA_HOME": str(self.home),
        }

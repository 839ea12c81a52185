"""A model: its weights and engine, its replicas, and how requests are routed to them."""

from collections.abc import Mapping
from fractions import Fraction
from typing import Literal, Self

from pydantic import ConfigDict, Field, JsonValue, model_validator

from tera.config import engine_args as vllm_args
from tera.config.section import Section
from tera.config.source import ModelSource

Capability = Literal["completions", "chat"]

Routing = Literal["prefix_affinity", "least_loaded"]

CacheSharing = Literal["tenant", "model", "key"]


class ReplicaBounds(Section):
    """How many replicas there may be; applied in place, without a restart."""

    min: int = Field(default=1, ge=0)
    """Fewest replicas; 0 scales to zero when idle."""
    max: int = Field(default=1, ge=0)
    """Most replicas; 0 keeps the entry but deploys nothing."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.max and self.min > self.max:
            raise ValueError(
                f"min ({self.min}) is greater than max ({self.max}); lower min or raise max"
            )
        return self


class Parallelism(Section):
    """How one replica is spread over GPUs."""

    tensor: int = Field(default=1, ge=1)
    """GPUs of one worker that each hold a part of every layer."""
    pipeline: int = Field(default=1, ge=1)
    """Workers that each hold a run of consecutive layers."""


class GpuSharing(Section):
    """Lets replicas, of one model or of several, share a GPU and take turns being awake.

    A sleeping replica keeps its weights in host memory (vLLM's sleep mode) and wakes in seconds.
    """

    replicas_per_gpu: int = Field(default=1, ge=1, le=8)
    """How many replicas of this size fit on one GPU; 1 means that replicas share no GPU."""
    turn_seconds: float = Field(default=20, gt=0)
    """How long a replica with work stays awake while another waits for its turn."""

    @property
    def is_shared(self) -> bool:
        """Whether other replicas may be on a replica's GPU."""
        return self.replicas_per_gpu > 1

    @property
    def gpu_part(self) -> float:
        """The fraction of a GPU that a replica requests from Ray, in Ray's steps of 1/10,000."""
        return 10_000 // self.replicas_per_gpu / 10_000


class Scaling(Section):
    """Queue bounds and autoscaling of one model; applied in place, without a restart."""

    target_ongoing_requests: float = Field(default=16, gt=0)
    """Queued and running requests per replica that autoscaling aims for."""
    max_ongoing_requests: int = Field(default=64, ge=1)
    """Requests that one replica accepts at once; further ones wait at the gateway."""
    max_queued_requests: int = Field(default=256, ge=1)
    """Requests for this model that may wait in one gateway replica; further ones are refused."""
    upscale_delay_seconds: float = Field(default=10, ge=0)
    """How long the load must be above the target before replicas are added."""
    downscale_delay_seconds: float = Field(default=300, ge=0)
    """How long the load must be below the target before replicas are removed."""
    downscale_to_zero_delay_seconds: float = Field(default=1800, ge=0)
    """How long a model must be idle before its last replica is removed."""
    cold_start_deadline_seconds: float = Field(default=600, gt=0)
    """How long a request may wait in the gateway's queue for a model without a replica; separate
    from `gateway.requests.firstTokenDeadlineSeconds`."""


class EngineConfig(Section):
    """The engine a model runs on. Editing it reloads this model only."""

    model_config = ConfigDict(json_schema_extra=vllm_args.SCHEMA)

    kind: Literal["vllm", "simulated"] = "vllm"
    """`simulated` needs no GPU and generates meaningless words, at a pace set by `args`."""
    args: dict[str, JsonValue] = Field(default_factory=dict)
    """Passed to the engine unchanged: vLLM's `AsyncEngineArgs`, or the simulated engine's
    `profile` and `faults`."""

    @property
    def dtype(self) -> str:
        """The type of a vllm model's weights; vLLM itself validates it."""
        return str(self.args.get("dtype", "bfloat16"))


def engine_args(args: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
    """Return the entries of `engine.args` that are for vLLM's engine."""
    return {name: value for name, value in args.items() if name not in vllm_args.FRONTEND_ARGS}


class ModelConfig(Section):
    """One model that tenants can use."""

    id: str = Field(min_length=1, max_length=256)
    """What clients send as `model`."""
    aliases: tuple[str, ...] = Field(default=(), strict=False)
    """Other names that clients may send as `model`."""
    enabled: bool = True
    """`false` removes the model but keeps its settings."""
    source: str = ""
    """Where the weights are: hf://org/name@revision, s3://bucket/path, gs://bucket/path,
    file:///path or demo://name."""
    engine: EngineConfig = EngineConfig()
    pool: str = ""
    """The entry of `gpuPools` whose workers run the model; empty runs it on CPUs."""
    replicas: ReplicaBounds = ReplicaBounds()
    parallelism: Parallelism = Parallelism()
    gpu_sharing: GpuSharing = GpuSharing()
    scaling: Scaling = Scaling()
    routing: Routing = "prefix_affinity"
    """`prefix_affinity` sends a prompt to a replica that has its beginning cached and is not too
    busy; `least_loaded` sends it to one of the least busy replicas. Applied in place."""
    cache_sharing: CacheSharing = "tenant"
    """Who can reuse what a prompt leaves in the KV cache: all keys of the same `tenant`, only the
    same `key`, or all tenants of the `model`, for operators who own them all. Applied in place."""
    capabilities: tuple[Capability, ...] = Field(default=("completions", "chat"), strict=False)
    """The endpoints that serve the model."""

    @model_validator(mode="after")
    def _has_source(self) -> Self:
        if self.weights is None and self.engine.kind == "vllm":
            raise ValueError("source is missing; a vllm model needs one, such as hf://org/name")
        return self

    @model_validator(mode="after")
    def _shares_whole(self) -> Self:
        if self.gpu_sharing.is_shared and self._ranks > 1:
            raise ValueError(
                f"gpuSharing.replicasPerGpu: a replica on {self._ranks} GPUs cannot share "
                "them; set it to 1, or parallelism.tensor and .pipeline"
            )
        return self

    @property
    def weights(self) -> ModelSource | None:
        """Where the weights are; None for a simulated model that names none."""
        return ModelSource.parse(self.source) if self.source else None

    @property
    def needs_hub(self) -> bool:
        """Whether its weights may have to be downloaded."""
        weights = self.weights
        return self.engine.kind == "vllm" and weights is not None and weights.needs_hub

    @property
    def _ranks(self) -> int:
        return self.parallelism.tensor * self.parallelism.pipeline

    @property
    def gpus(self) -> int:
        """GPUs that one replica uses; 0 without a pool."""
        return self._ranks if self.pool else 0

    @property
    def most_gpus(self) -> Fraction:
        """GPUs that all replicas together can use; a shared GPU counts in parts."""
        return Fraction(self.replicas.max * self.gpus, self.gpu_sharing.replicas_per_gpu)


class ModelDefaults(Section):
    """Defaults for every model; a model's own settings take precedence."""

    enabled: bool = True
    """Whether models are deployed."""
    replicas: ReplicaBounds = ReplicaBounds()
    parallelism: Parallelism = Parallelism()
    gpu_sharing: GpuSharing = GpuSharing()
    scaling: Scaling = Scaling()
    routing: Routing = "prefix_affinity"
    """How a replica is chosen for a request."""
    cache_sharing: CacheSharing = "tenant"
    """Who can reuse what a prompt leaves in the KV cache."""

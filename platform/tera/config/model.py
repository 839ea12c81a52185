"""What a model is: its weights and engine, its replicas, and how requests find them."""

from collections.abc import Mapping
from fractions import Fraction
from typing import Final, Literal, Self

from pydantic import Field, JsonValue, model_validator

from tera.config.section import Section
from tera.config.source import ModelSource

Capability = Literal["completions", "chat"]

Routing = Literal["prefix_affinity", "least_loaded"]


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
    """How long a request waits in the gateway's queue for a model that has no replica yet, counted
    apart from `gateway.requests.firstTokenDeadlineSeconds`."""


class EngineConfig(Section):
    """Which engine a model runs on. Editing it reloads this model and no other."""

    kind: Literal["vllm", "simulated"] = "vllm"
    """`simulated` needs no GPU and makes words of no meaning, at times that `args` sets."""
    args: dict[str, JsonValue] = Field(default_factory=dict)
    """Passed to the engine as they are: vLLM's `AsyncEngineArgs`, or the simulated engine's
    `profile` and `faults`."""

    @property
    def dtype(self) -> str:
        """What a vllm model's weights are kept in; vLLM itself checks it."""
        return str(self.args.get("dtype", "bfloat16"))


FRONTEND_ARGS: Final = ("tool_call_parser", "chat_template")
"""Entries of a vllm model's `engine.args` that the gateway reads and the engine does not know."""


def engine_args(args: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
    """Return the entries of `engine.args` that are vLLM's engine arguments."""
    return {name: value for name, value in args.items() if name not in FRONTEND_ARGS}


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
        if self.weights is None and self.engine.kind == "vllm":
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
    def weights(self) -> ModelSource | None:
        """Where the weights are; None for a simulated model that names none."""
        return ModelSource.parse(self.source) if self.source else None

    @property
    def needs_hub(self) -> bool:
        """Whether its weights may have to come from elsewhere than this machine."""
        weights = self.weights
        return self.engine.kind == "vllm" and weights is not None and weights.needs_hub

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

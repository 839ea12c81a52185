"""The part of the configuration that only a cluster uses; `tera serve` ignores it."""

from typing import Annotated, Final, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    JsonValue,
    StringConstraints,
    WithJsonSchema,
    model_validator,
)

from tera.config import quantity
from tera.config.names import Address
from tera.config.pods import HeadPodConfig, PodConfig, RayPodConfig, Toleration
from tera.config.section import Section

Quantity = Annotated[
    str,
    StringConstraints(pattern=quantity.PATTERN),
    BeforeValidator(quantity.as_text),
    AfterValidator(quantity.canonical),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "pattern": quantity.PATTERN},
                {"type": "number", "minimum": 0, "maximum": quantity.LARGEST_NUMBER},
            ]
        }
    ),
]
"""A Kubernetes quantity: 6, "500m", 24Gi. Kept in canonical form, so that writing the same amount
differently does not count as an edit."""


class ImageConfig(Section):
    """The image of every Ray pod. Editing it starts a new cluster, which takes over when ready."""

    repository: str = "ghcr.io/tera/tera"
    """The image's name, without tag and digest."""
    tag: str = ""
    """The image's tag; empty means the chart's appVersion. "latest" is refused."""
    digest: Annotated[str, StringConstraints(pattern=r"^(sha256:[0-9a-f]{64})?$")] = ""
    """sha256:…; takes precedence over the tag."""
    pull_policy: Literal["Always", "IfNotPresent", "Never"] = "IfNotPresent"
    """As `imagePullPolicy` of a container."""

    @model_validator(mode="after")
    def _pinned(self) -> Self:
        if self.tag == "latest":
            raise ValueError('tag "latest" can change under a running cluster; give a version')
        return self


class NamedReference(Section):
    """A reference to a Kubernetes object."""

    name: str = Field(min_length=1)
    """The object's name, in the release's namespace."""


class Resources(Section):
    """A pod's requests and limits, which are the same."""

    cpu: Quantity = "2"
    """Cores."""
    memory: Quantity = "4Gi"
    """Bytes."""


_LEAST_HEAD_MEMORY: Final = "4Gi"


class HeadResources(Resources):
    """The Ray head's requests and limits, which are the same."""

    memory: Quantity = "8Gi"
    """Memory, for Ray's own state; 4Gi at least, and 8Gi where there is load."""

    @model_validator(mode="after")
    def _hold_ray(self) -> Self:
        if quantity.amount(self.memory) < quantity.amount(_LEAST_HEAD_MEMORY):
            raise ValueError(
                f"memory {self.memory} is too little for Ray's own processes; give "
                f"{_LEAST_HEAD_MEMORY} or more"
            )
        return self


class PoolResources(Resources):
    """A GPU worker's requests and limits, which are the same; GPUs are set by `gpusPerWorker`."""

    cpu: Quantity = "6"
    """Cores."""
    memory: Quantity = "24Gi"
    """Bytes, including the shared memory."""


class PoolDefaults(Section):
    """Defaults for every pool; a pool's own settings take precedence."""

    gpus_per_worker: int = Field(default=1, ge=1)
    """GPUs per pod; a model's `parallelism.tensor` cannot exceed it."""
    max_workers: int = Field(default=32, ge=1)
    """Largest number of pods in a pool; a running cluster keeps the number it was created with."""
    gpu_resource: str = Field(default="nvidia.com/gpu", min_length=1)
    """The Kubernetes resource a worker requests; with MIG for example nvidia.com/mig-1g.10gb."""
    resources: PoolResources = PoolResources()
    shm_size: Quantity = "8Gi"
    """Shared memory, through which the GPUs of a worker exchange data; counts towards memory."""
    node_selector: dict[str, str] = Field(default_factory=dict)
    """Labels that a node must have to run a pool's workers."""
    tolerations: tuple[Toleration, ...] = Field(
        default=(Toleration(key="nvidia.com/gpu", operator="Exists", effect="NoSchedule"),),
        strict=False,
    )
    """Taints that a pool's pods tolerate."""
    runtime_class_name: str = ""
    """The pods' runtime class, such as nvidia where it is not the nodes' default."""
    idle_timeout_seconds: int = Field(default=120, ge=1)
    """How long a worker without replicas is kept."""
    pod: RayPodConfig = RayPodConfig()


class PoolConfig(PoolDefaults):
    """Workers with one kind of GPU: one Ray worker group."""

    order: int = Field(ge=1)
    """The pool's position among the worker groups. It never changes; a new pool takes the next
    number."""
    joins: str = ""
    """Another pool, whose models this pool's workers run too: a spot pool can join an on-demand
    pool. Models name the pool that is joined."""
    priority: int = 0
    """Where two pools with workers of the same size can run a model, the one with the higher
    priority is scaled up first."""


class HeadConfig(Section):
    """The Ray head, which schedules and serves no requests."""

    resources: HeadResources = HeadResources()
    node_selector: dict[str, str] = Field(default_factory=dict)
    """Labels that a node must have to run the head."""
    pod: HeadPodConfig = HeadPodConfig()


class AuthConfig(Section):
    """The secrets that API keys are checked with."""

    existing_secret: str = ""
    """A Secret with `keys.yaml`, `key-pepper` and `cluster-secret`; if empty, one is created at
    install."""
    bootstrap_keys: bool = True
    """Whether a Secret created at install holds a first API key, of the tenant `admin`."""


class SecretReference(Section):
    """A value in an existing Secret."""

    existing_secret: str = ""
    """The Secret's name; empty means none."""
    secret_key: str = Field(default="password", min_length=1)
    """The key of the value in the Secret."""


class GcsFaultToleranceConfig(SecretReference):
    """Keeps the workers running while the Ray head is replaced."""

    enabled: bool = True
    """Whether Ray's state is kept in a Redis. Without it, all workers exit a minute after the head
    is gone."""
    storage: Quantity = "1Gi"
    """Size of the volume of the Valkey that is created for it; cannot change later."""
    address: Address = ""
    """host:port of a Redis of your own with durable storage, not the one that holds limits; if
    empty, a small Valkey is created."""

    @property
    def embedded(self) -> bool:
        """Whether a Valkey is created for it."""
        return self.enabled and not self.address

    @model_validator(mode="after")
    def _has_address(self) -> Self:
        if self.existing_secret and not self.address:
            raise ValueError(
                "existingSecret is that of another Redis; give its address, or leave both out"
            )
        return self


class HuggingFaceConfig(Section):
    """Access to the Hugging Face hub."""

    existing_secret: str = ""
    """The Secret that holds the token; empty downloads without a token."""
    secret_key: str = Field(default="token", min_length=1)
    """The key of the token in the Secret."""
    offline: bool = False
    """Whether gateways and workers read only from `modelCache`; the prefetch Job still downloads
    from the hub."""


class ObjectStoreConfig(Section):
    """Access to the object stores of s3:// and gs:// sources."""

    existing_secret: str = ""
    """A Secret with AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_REGION, which become
    environment variables of gateways and workers; if empty, what the nodes have access to is read.
    """


class ModelCacheConfig(Section):
    """A volume that holds weights for all workers."""

    enabled: bool = False
    """Whether workers mount the volume; otherwise each pod downloads weights for itself."""
    existing_claim: str = ""
    """Name of an existing PersistentVolumeClaim; if empty, one is created."""
    size: Quantity = "200Gi"
    """Size of the claim that is created."""
    storage_class_name: str = ""
    """Storage class of the claim that is created; empty means the cluster's default."""
    access_mode: Literal["ReadWriteMany", "ReadWriteOnce"] = "ReadWriteMany"
    """Access mode of the claim that is created; ReadWriteOnce suits a single worker only."""
    prefetch: bool = False
    """Whether a Job downloads the weights of hf:// sources when they change. Helm does not wait for
    it."""
    pod: PodConfig = PodConfig()
    """What is added to the Job's pod."""


class UpgradeConfig(Section):
    """How a new cluster takes over from the old one."""

    # Not KubeRay's incremental upgrade: it shifts clients by weights between Services of its own,
    # which they do not come in by, and does not save the GPUs of the second cluster.
    strategy: Literal["NewCluster", "None"] = "NewCluster"
    """`None` never replaces the cluster: for fleets without enough GPUs for two clusters."""


class IngressTls(Section):
    """TLS of the Ingress."""

    secret_name: str = ""
    """The certificate's Secret; empty means plain HTTP."""


class IngressConfig(Section):
    """Exposes the gateway through an ingress controller."""

    enabled: bool = False
    """Whether an Ingress is created."""
    class_name: str = ""
    """The ingress controller's class; empty means the cluster's default."""
    host: str = ""
    """The host name that clients use."""
    tls: IngressTls = IngressTls()
    annotations: dict[str, str] = Field(default_factory=dict)
    """Annotations for the ingress controller."""

    @model_validator(mode="after")
    def _has_host(self) -> Self:
        if self.enabled and not self.host:
            raise ValueError("host is missing; give the host name that clients use")
        return self


class HttpRouteConfig(Section):
    """Exposes the gateway through a Gateway of the Gateway API."""

    enabled: bool = False
    """Whether an HTTPRoute is created."""
    parent_refs: tuple[dict[str, JsonValue], ...] = Field(default=(), strict=False)
    """The Gateways the route attaches to, such as {name: public, namespace: gateways}."""
    hostnames: tuple[str, ...] = Field(default=(), strict=False)
    """Host names that clients use; an empty list means all of the Gateway's."""

    @model_validator(mode="after")
    def _has_parent(self) -> Self:
        if self.enabled and not self.parent_refs:
            raise ValueError("parentRefs is empty; name the Gateway that the route attaches to")
        return self


class TracingConfig(Section):
    """Where traces are sent."""

    otlp_endpoint: str = ""
    """OTLP endpoint, such as http://collector:4317; empty turns tracing off."""


class ObservabilityConfig(Section):
    """Objects for the Prometheus operator and Grafana, whose CRDs must be installed."""

    pod_monitor: bool = False
    """Whether Prometheus scrapes each pod's metrics."""
    rules: bool = False
    """Whether Prometheus raises alerts; they need the metrics of `podMonitor`."""
    dashboards: bool = False
    """Not implemented yet."""
    tracing: TracingConfig = TracingConfig()
    labels: dict[str, str] = Field(default_factory=dict)
    """Labels by which the operator selects these objects, such as {release: prometheus}."""

    @model_validator(mode="after")
    def _there(self) -> Self:
        if self.dashboards or self.tracing.otlp_endpoint:
            raise ValueError("dashboards and tracing are not implemented yet; leave them out")
        if self.rules and not self.pod_monitor:
            raise ValueError("rules need metrics that are not scraped; set podMonitor: true")
        return self


class EgressConfig(Section):
    """What the release's pods may connect to."""

    enabled: bool = False
    """Whether they reach only each other, DNS and `cidrs`."""
    cidrs: tuple[str, ...] = Field(default=(), strict=False)
    """Address ranges that they may connect to: the Kubernetes API, which the head needs, an
    external Redis, hubs or a proxy."""


class NetworkPolicyConfig(Section):
    """Who may connect to which pod."""

    enabled: bool = True
    """Whether only what is named here may connect to the release's pods."""
    operator_namespace: str = Field(default="kuberay-system", min_length=1)
    """Namespace of KubeRay, which submits applications to the head."""
    ingress_namespace: str = "ingress-nginx"
    """Namespace that may connect to the gateway, besides the release's own; empty allows all."""
    ingress_cidrs: tuple[str, ...] = Field(default=(), strict=False)
    """Address ranges that may connect to the gateway too, such as those of a load balancer."""
    monitoring_namespace: str = "monitoring"
    """Namespace that may scrape metrics when `observability.podMonitor` is set."""
    egress: EgressConfig = EgressConfig()


class PdbConfig(Section):
    """How many gateways, and workers of each pool, keep running while nodes are drained.

    There is no budget where no more pods than that run at the smallest numbers of replicas, since
    it would block the drain of their nodes.
    """

    enabled: bool = True
    """Whether PodDisruptionBudgets are created."""
    min_available: int = Field(default=1, ge=0)
    """Pods of each group that keep running; a number, since Kubernetes allows no percentage
    here."""


class RayAuthConfig(Section):
    """Ray's own token authentication between its processes."""

    enabled: bool = True
    """Whether KubeRay creates a token that every process of the cluster must present."""

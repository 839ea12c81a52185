"""The part of the configuration that only a cluster has; one machine reads past it."""

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, JsonValue, StringConstraints, model_validator

from tera.config import quantity
from tera.config.section import Section

Quantity = Annotated[
    str, StringConstraints(pattern=quantity.PATTERN), AfterValidator(quantity.canonical)
]
"""A Kubernetes quantity, written as text: "6", "500m", 24Gi; kept in canonical form, so that
writing the same amount in another way is no edit."""


class ImageConfig(Section):
    """The image of every Ray pod; editing it makes a new cluster, which takes over when ready."""

    repository: str = "ghcr.io/tera/tera"
    """Without tag and digest."""
    tag: str = ""
    """The chart's appVersion when empty; "latest" is refused."""
    digest: Annotated[str, StringConstraints(pattern=r"^(sha256:[0-9a-f]{64})?$")] = ""
    """sha256:…; goes before the tag."""
    pull_policy: Literal["Always", "IfNotPresent", "Never"] = "IfNotPresent"
    """As in a pod."""

    @model_validator(mode="after")
    def _pinned(self) -> Self:
        if self.tag == "latest":
            raise ValueError('tag "latest" changes under a running cluster; give a version')
        return self


class NamedReference(Section):
    """A Kubernetes object by its name."""

    name: str = Field(min_length=1)
    """Its name, in the release's namespace."""


class Resources(Section):
    """What a pod asks for and is limited to."""

    cpu: Quantity = "2"
    """Cores."""
    memory: Quantity = "4Gi"
    """Bytes."""


class HeadResources(Resources):
    """What the Ray head asks for and is limited to."""

    memory: Quantity = "8Gi"
    """Ray's own state; 8Gi at the least."""


class PoolResources(Resources):
    """What a GPU worker asks for and is limited to, GPUs apart."""

    cpu: Quantity = "6"
    """Cores."""
    memory: Quantity = "24Gi"
    """Bytes; the shared memory is a part of them."""


class Toleration(Section):
    """A taint that a pool's pods are placed in spite of."""

    key: str = ""
    """Of the taint; empty is every one."""
    operator: Literal["Exists", "Equal"] = "Equal"
    """`Exists` asks for no value."""
    value: str = ""
    """Of the taint, with `Equal`."""
    effect: Literal["", "NoSchedule", "PreferNoSchedule", "NoExecute"] = ""
    """Of the taint; empty is every one."""
    toleration_seconds: int | None = Field(default=None, ge=0)
    """With `NoExecute`, how long the pod stays; absent is for ever."""


class PoolDefaults(Section):
    """What every pool inherits where it says nothing itself."""

    gpus_per_worker: int = Field(default=1, ge=1)
    """GPUs of one pod; `parallelism.tensor` is at the most as many."""
    max_workers: int = Field(default=32, ge=1)
    """Most pods of a pool; a live cluster keeps the number that it was made with."""
    gpu_resource: str = Field(default="nvidia.com/gpu", min_length=1)
    """What a worker asks Kubernetes for; with MIG such as nvidia.com/mig-1g.10gb."""
    resources: PoolResources = PoolResources()
    shm_size: Quantity = "8Gi"
    """Shared memory, over which the GPUs of one worker exchange; counts as memory."""
    node_selector: dict[str, str] = Field(default_factory=dict)
    """Labels that a pool's nodes have."""
    tolerations: tuple[Toleration, ...] = Field(
        default=(Toleration(key="nvidia.com/gpu", operator="Exists", effect="NoSchedule"),),
        strict=False,
    )
    """Taints that a pool's pods are placed in spite of."""
    runtime_class_name: str = ""
    """Such as nvidia, where it is not the nodes' default."""
    idle_timeout_seconds: int = Field(default=120, ge=1)
    """How long a worker without a replica is kept."""


class PoolConfig(PoolDefaults):
    """Workers of one kind of GPU: one Ray worker group."""

    order: int = Field(ge=1)
    """Its place among the groups, for ever; a new pool takes the next number."""
    joins: str = ""
    """Pool whose models its workers hold too, such as spot workers those of an on-demand pool. A
    model names the pool that is joined."""
    priority: int = 0
    """Of two pools that hold a model, with workers of one size, the one with the higher number is
    asked first."""


class HeadConfig(Section):
    """The Ray head: schedules, and answers no request."""

    resources: HeadResources = HeadResources()
    node_selector: dict[str, str] = Field(default_factory=dict)
    """Labels of the node that it runs on."""


class AuthConfig(Section):
    """The secrets that keys are checked with."""

    existing_secret: str = ""
    """A Secret with `keys.yaml`, `key-pepper` and `cluster-secret`; made once when empty."""
    bootstrap_keys: bool = True
    """Whether a Secret that is made holds a first API key, of the tenant `admin`."""


class SecretReference(Section):
    """A value in a Secret that exists already."""

    existing_secret: str = ""
    """The Secret's name; empty is none."""
    secret_key: str = Field(default="password", min_length=1)
    """The value's key in it."""


class GcsFaultToleranceConfig(SecretReference):
    """Lets the Ray head be replaced without a restart of the workers."""

    enabled: bool = False
    """Whether Ray's state is kept in a Redis."""
    address: str = ""
    """host:port of a Redis with durable storage, and not the one that limits live in."""

    @model_validator(mode="after")
    def _has_address(self) -> Self:
        if self.enabled and not self.address:
            raise ValueError("address is missing; give host:port of a durable Redis")
        return self


class HuggingFaceConfig(Section):
    """The token that weights are fetched with."""

    existing_secret: str = ""
    """The Secret's name; empty fetches without a token."""
    secret_key: str = Field(default="token", min_length=1)
    """The token's key in it."""
    offline: bool = False
    """Whether gateways and workers read `modelCache` alone; the prefetch Job still asks the hub."""


class ModelCacheConfig(Section):
    """A volume that all workers keep weights on."""

    enabled: bool = False
    """Whether workers mount one; else each fetches weights into its own pod."""
    existing_claim: str = ""
    """A claim is made when empty."""
    size: Quantity = "200Gi"
    """Of the claim that is made."""
    storage_class_name: str = ""
    """Of the claim that is made; empty is the cluster's default."""
    access_mode: Literal["ReadWriteMany", "ReadWriteOnce"] = "ReadWriteMany"
    """ReadWriteOnce is for one worker."""
    prefetch: bool = False
    """Whether a Job fetches the weights of hf:// sources after an install or upgrade."""


class UpgradeConfig(Section):
    """How a new cluster takes over from the old one."""

    strategy: Literal["NewCluster", "NewClusterWithIncrementalUpgrade", "None"] = "NewCluster"
    """None replaces nothing: for a fleet without GPUs for two clusters."""
    gateway_class_name: str = ""
    """Of the Gateway API; an incremental upgrade needs it."""

    @model_validator(mode="after")
    def _has_class(self) -> Self:
        if self.strategy == "NewClusterWithIncrementalUpgrade" and not self.gateway_class_name:
            raise ValueError("gatewayClassName is missing; an incremental upgrade needs one")
        return self


class IngressTls(Section):
    """TLS of the Ingress."""

    secret_name: str = ""
    """The certificate's Secret; empty is plain HTTP."""


class IngressConfig(Section):
    """Reaches the gateway from outside, through an ingress controller."""

    enabled: bool = False
    """Whether there is an Ingress."""
    class_name: str = ""
    """Of the ingress controller; empty is the cluster's default."""
    host: str = ""
    """The name that clients call."""
    tls: IngressTls = IngressTls()
    annotations: dict[str, str] = Field(default_factory=dict)
    """For the ingress controller."""

    @model_validator(mode="after")
    def _has_host(self) -> Self:
        if self.enabled and not self.host:
            raise ValueError("host is missing; give the name that clients call")
        return self


class HttpRouteConfig(Section):
    """Reaches the gateway from outside, through a Gateway of the Gateway API."""

    enabled: bool = False
    """Whether there is an HTTPRoute."""
    parent_refs: tuple[dict[str, JsonValue], ...] = Field(default=(), strict=False)
    """As HTTPRoute has them, such as {name: public, namespace: gateways}."""
    hostnames: tuple[str, ...] = Field(default=(), strict=False)
    """Names that clients call; none is every one of the Gateway's."""

    @model_validator(mode="after")
    def _has_parent(self) -> Self:
        if self.enabled and not self.parent_refs:
            raise ValueError("parentRefs is empty; name the Gateway that the route belongs to")
        return self


class TracingConfig(Section):
    """Where traces go."""

    otlp_endpoint: str = ""
    """Such as http://collector:4317; empty switches tracing off."""


class ObservabilityConfig(Section):
    """Objects of the Prometheus operator and Grafana, whose CRDs must be there."""

    pod_monitor: bool = False
    """Whether Prometheus reads each pod's metrics."""
    rules: bool = False
    """Whether Prometheus raises alerts; of the metrics that `podMonitor` has it read."""
    dashboards: bool = False
    """Not there yet."""
    tracing: TracingConfig = TracingConfig()
    labels: dict[str, str] = Field(default_factory=dict)
    """By which the operator selects these objects, such as {release: prometheus}."""

    @model_validator(mode="after")
    def _there(self) -> Self:
        if self.dashboards or self.tracing.otlp_endpoint:
            raise ValueError("dashboards and tracing are not there yet; leave them out")
        if self.rules and not self.pod_monitor:
            raise ValueError("rules alert on metrics that nobody reads; set podMonitor: true")
        return self


class NetworkPolicyConfig(Section):
    """Who reaches which pod."""

    enabled: bool = True
    """Whether nobody but those named here reaches a pod of the release."""
    operator_namespace: str = Field(default="kuberay-system", min_length=1)
    """Where KubeRay runs; it submits applications to the head."""
    ingress_namespace: str = "ingress-nginx"
    """From which the gateway's port is reached, besides this namespace; empty is everywhere."""
    monitoring_namespace: str = "monitoring"
    """From which metrics are read when `observability.podMonitor` is set."""


class PdbConfig(Section):
    """How many gateways, and workers of each pool, a node drain leaves."""

    enabled: bool = True
    """Whether there are PodDisruptionBudgets."""
    min_available: int = Field(default=1, ge=0)
    """Pods of each group that stay; a number, since Kubernetes takes no percentage here."""


class RayAuthConfig(Section):
    """Ray's own token authentication between its processes."""

    enabled: bool = True
    """Whether KubeRay makes a token that each process of the cluster has to show."""

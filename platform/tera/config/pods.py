"""What an operator sets for the pods of one place: Kubernetes' own shapes under its own names."""

from typing import Annotated, Final, Literal, Self

from pydantic import Field, JsonValue, StringConstraints, model_validator

from tera.config.section import Section

_CHART_LABELS: Final = ("app.kubernetes.io/", "ray.io/", "tera/")
"""By which the chart's and KubeRay's selectors find pods."""
_KUBERAY_VARIABLES: Final = {"RAY_REDIS_ADDRESS", "REDIS_PASSWORD", "REDIS_USERNAME"}
"""KubeRay refuses a RayService that sets them beside its own options."""

VariableName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
Shapes = Annotated[tuple[dict[str, JsonValue], ...], Field(strict=False)]
"""Objects of Kubernetes', which Kubernetes checks."""


class Toleration(Section):
    """A taint that a pool's pods tolerate."""

    key: str = ""
    """The taint's key; empty matches every key."""
    operator: Literal["Exists", "Equal"] = "Equal"
    """`Exists` matches any value."""
    value: str = ""
    """The taint's value, with `Equal`."""
    effect: Literal["", "NoSchedule", "PreferNoSchedule", "NoExecute"] = ""
    """The taint's effect; empty matches every effect."""
    toleration_seconds: int | None = Field(default=None, ge=0)
    """With `NoExecute`, how long the pod stays; absent means for ever."""


class SecretVariable(Section):
    """The value of a variable, in an existing Secret."""

    secret_name: str = Field(min_length=1)
    """The Secret's name, in the release's namespace."""
    secret_key: str = Field(min_length=1)
    """The key of the value in the Secret."""


class PodConfig(Section):
    """What is added to the pods that the chart makes in this place."""

    env: dict[VariableName, str | SecretVariable] = Field(default_factory=dict)
    """Variables of the main container: text, or {secretName, secretKey}."""
    env_from: Shapes = ()
    """Secrets and ConfigMaps with variables of the main container, as `envFrom`."""
    labels: dict[str, str] = Field(default_factory=dict)
    """Labels, besides the chart's own."""
    annotations: dict[str, str] = Field(default_factory=dict)
    """Annotations."""
    priority_class_name: str = ""
    """The pods' priority class."""
    node_selector: dict[str, str] = Field(default_factory=dict)
    """Labels that a node must have, besides those that the chart asks for."""
    tolerations: tuple[Toleration, ...] = Field(default=(), strict=False)
    """Taints that the pods tolerate, besides those that the chart names."""
    affinity: dict[str, JsonValue] = Field(default_factory=dict)
    """As `affinity` of a pod."""
    topology_spread_constraints: Shapes = ()
    """As `topologySpreadConstraints` of a pod, in place of the chart's."""
    volumes: Shapes = ()
    """Further volumes."""
    volume_mounts: Shapes = ()
    """Where the main container mounts them."""
    init_containers: Shapes = ()
    """Containers that run before the others."""
    sidecars: Shapes = ()
    """Containers that run beside the main one."""
    security_context: dict[str, JsonValue] = Field(default_factory=dict)
    """As `securityContext` of a pod, in place of the chart's; on OpenShift without `runAsUser` and
    `fsGroup`, which it chooses."""

    @model_validator(mode="after")
    def _leave_what_others_set(self) -> Self:
        for label in self.labels:
            if label.startswith(_CHART_LABELS):
                raise ValueError(f"labels {label} is set by the chart or KubeRay; take another")
        for name in self.env:
            if name in _KUBERAY_VARIABLES:
                raise ValueError(f"env {name} is set by KubeRay; see gcsFaultTolerance")
        return self


class ServiceAccountConfig(Section):
    """The service account of pods."""

    name: str = ""
    """An existing service account; if empty, the chart's own is used, or KubeRay's for the head."""
    annotations: dict[str, str] = Field(default_factory=dict)
    """Annotations of the chart's own, such as eks.amazonaws.com/role-arn."""

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if self.name and self.annotations:
            raise ValueError(
                "annotations are for the chart's own account; annotate yours, or name none"
            )
        return self


class RayPodConfig(PodConfig):
    """What is added to the pods of Ray in this place."""

    service_account: ServiceAccountConfig = ServiceAccountConfig()


class HeadPodConfig(RayPodConfig):
    """What is added to the head's pod."""

    @model_validator(mode="after")
    def _annotates_no_account(self) -> Self:
        if self.service_account.annotations:
            raise ValueError(
                "serviceAccount.annotations: KubeRay makes the head's account; name one of your own"
            )
        return self


class GlobalConfig(Section, extra="allow"):
    """What Helm hands to a chart and its parents alike; keys of others are left alone."""

    image_registry: str = ""
    """A registry that all images are pulled from, in place of their own, such as
    registry.example.com/mirror."""
    image_pull_secrets: tuple[dict[str, JsonValue], ...] = Field(default=(), strict=False)
    """Secrets for pulling images, besides `imagePullSecrets`."""


class CaBundle(Section):
    """A file with the certificates of authorities."""

    config_map: str = ""
    """The ConfigMap's name; empty means the image's own certificates."""
    key: str = Field(default="ca.crt", min_length=1)
    """The key of the file in the ConfigMap. It replaces the image's certificates, so it needs
    public ones too where those are used."""


class ProxyConfig(Section):
    """The proxy through which pods reach what is outside of the cluster."""

    http: str = ""
    """For http:// addresses."""
    https: str = ""
    """For https:// addresses, such as http://proxy.example.com:3128."""
    no_proxy: str = "localhost,127.0.0.1,.svc,.cluster.local"
    """Hosts that are reached without it."""


class TrustConfig(Section):
    """How gateways, workers and the prefetch Job reach hubs and registries."""

    ca_bundle: CaBundle = CaBundle()
    proxy: ProxyConfig = ProxyConfig()

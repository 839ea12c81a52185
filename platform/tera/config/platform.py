"""A whole platform: `values.yaml` is its file form, `PlatformConfig` the same tree in Python."""

import math
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Any, Self

from pydantic import Field, model_validator

from tera.config import quantity
from tera.config.cluster import (
    GcsFaultToleranceConfig,
    HeadConfig,
    HttpRouteConfig,
    HuggingFaceConfig,
    ImageConfig,
    IngressConfig,
    ModelCacheConfig,
    NamedReference,
    NetworkPolicyConfig,
    ObjectStoreConfig,
    ObservabilityConfig,
    PdbConfig,
    PoolConfig,
    PoolDefaults,
    RayAuthConfig,
    UpgradeConfig,
)
from tera.config.engine_args import argument_faults
from tera.config.gateway import GatewayConfig
from tera.config.merge import deep_merge
from tera.config.model import ModelConfig, ModelDefaults
from tera.config.names import CPU_POOL, ModelName, PoolName
from tera.config.pods import GlobalConfig, TrustConfig
from tera.config.redis import RedisConfig
from tera.config.section import Section
from tera.config.vllm_arguments import VLLM_ARGUMENTS


class PlatformConfig(Section):
    """A whole platform."""

    models: dict[ModelName, ModelConfig] = Field(default_factory=dict)
    """The models, by short name."""
    model_defaults: ModelDefaults = ModelDefaults()
    gpu_pools: dict[PoolName, PoolConfig] = Field(default_factory=dict)
    """The kinds of GPU workers, by short name."""
    pool_defaults: PoolDefaults = PoolDefaults()
    gateway: GatewayConfig = GatewayConfig()
    redis: RedisConfig = RedisConfig()
    image: ImageConfig = ImageConfig()
    image_pull_secrets: tuple[NamedReference, ...] = Field(default=(), strict=False)
    """Secrets for pulling the images."""
    ray_version: str = Field(default="2.60.0", min_length=1)
    """Must be the version of Ray in the image."""
    head: HeadConfig = HeadConfig()
    gcs_fault_tolerance: GcsFaultToleranceConfig = GcsFaultToleranceConfig()
    huggingface: HuggingFaceConfig = HuggingFaceConfig()
    object_store: ObjectStoreConfig = ObjectStoreConfig()
    model_cache: ModelCacheConfig = ModelCacheConfig()
    upgrade: UpgradeConfig = UpgradeConfig()
    ingress: IngressConfig = IngressConfig()
    http_route: HttpRouteConfig = HttpRouteConfig()
    observability: ObservabilityConfig = ObservabilityConfig()
    network_policy: NetworkPolicyConfig = NetworkPolicyConfig()
    pdb: PdbConfig = PdbConfig()
    ray_auth: RayAuthConfig = RayAuthConfig()
    trust: TrustConfig = TrustConfig()
    global_: GlobalConfig = Field(default=GlobalConfig(), alias="global")

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
            *_wrong_arguments(self.models),
            *_limits_of_no_model(self),
            *_shared_orders(self.gpu_pools),
            *_misjoined_pools(self.gpu_pools),
            *_misplaced_models(self),
            *_undersized_pools(self.gpu_pools),
            *_unshared_cache(self),
            *_unread_cache(self),
        ]
        if faults:
            raise ValueError("\n".join(faults))
        return self

    def deployed_models(self) -> dict[str, ModelConfig]:
        """Return the models that are deployed, by short name, in the file's order."""
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


def _wrong_arguments(models: Mapping[str, ModelConfig]) -> Iterator[str]:
    for name, model in models.items():
        if model.engine.kind == "vllm":
            path = f"models.{name}.engine.args"
            yield from argument_faults(model.engine.args, VLLM_ARGUMENTS, path)


def _limits_of_no_model(platform: PlatformConfig) -> Iterator[str]:
    limits = platform.gateway.limits
    there = ", ".join(sorted(platform.models)) or "none"
    for path, tenant in (
        ("default", limits.default),
        *((f"tenants.{name}", tenant) for name, tenant in limits.tenants.items()),
    ):
        for name in tenant.models:
            if name not in platform.models:
                yield (
                    f"gateway.limits.{path}.models.{name}: there is no model {name!r}; "
                    f"the models are: {there}"
                )


def _shared_orders(pools: Mapping[str, PoolConfig]) -> Iterator[str]:
    if CPU_POOL in pools:
        yield f"gpuPools.{CPU_POOL}: is the group of the CPU pods; give the pool another name"
    owner: dict[int, str] = {}
    for name, pool in pools.items():
        first = owner.setdefault(pool.order, name)
        if first != name:
            free = max(each.order for each in pools.values()) + 1
            yield (
                f"gpuPools.{name}.order: {pool.order} is taken by gpuPools.{first}; {free} is free"
            )


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


def _misplaced_models(platform: PlatformConfig) -> Iterator[str]:
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
                "and both run the model"
            )
            continue
        for each, held_by in holding[model.pool].items():
            if model.parallelism.tensor > held_by.gpus_per_worker:
                yield (
                    f"models.{name}.parallelism.tensor: {model.parallelism.tensor} exceeds the "
                    f"{held_by.gpus_per_worker} GPU(s) of a worker; lower it, or raise "
                    f"gpuPools.{each}.gpusPerWorker"
                )
        if model.enabled:
            gpus[model.pool] += model.most_gpus
    for name, wanted in ((name, math.ceil(each)) for name, each in gpus.items()):
        there_are = sum(each.max_workers * each.gpus_per_worker for each in holding[name].values())
        if wanted > there_are:
            yield (
                f"gpuPools.{name}.maxWorkers: its models may need {wanted} GPUs but its "
                f"workers have {there_are}; raise maxWorkers, or lower a replicas.max"
            )


def _undersized_pools(pools: Mapping[str, PoolConfig]) -> Iterator[str]:
    for name, pool in pools.items():
        resources = pool.resources
        if quantity.amount(pool.shm_size) > quantity.amount(resources.memory):
            yield (
                f"gpuPools.{name}.shmSize: {pool.shm_size} exceeds resources.memory "
                f"({resources.memory}), of which it is a part; lower it, or raise resources.memory"
            )
        if quantity.amount(resources.cpu) < pool.gpus_per_worker:
            # Every replica takes a core of Ray's, so that a GPU without one would stay idle.
            yield (
                f"gpuPools.{name}.resources.cpu: {resources.cpu} is less than one for each of "
                f"{pool.gpus_per_worker} GPUs; raise it, or lower gpusPerWorker"
            )


def _unshared_cache(platform: PlatformConfig) -> Iterator[str]:
    cache = platform.model_cache
    workers = sum(pool.max_workers for pool in platform.gpu_pools.values())
    if cache.enabled and cache.access_mode == "ReadWriteOnce" and workers > 1:
        yield (
            f"modelCache.accessMode: ReadWriteOnce is for one worker and the pools may have "
            f"{workers}; use ReadWriteMany"
        )
    elif (
        cache.enabled
        and cache.access_mode == "ReadWriteOnce"
        and platform.upgrade.strategy == "NewCluster"
    ):
        yield (
            "modelCache.accessMode: ReadWriteOnce is for one worker and a new cluster starts a "
            "second one; use ReadWriteMany, or set upgrade.strategy: None"
        )


def _unread_cache(platform: PlatformConfig) -> Iterator[str]:
    cache = platform.model_cache
    shared = cache.enabled and cache.access_mode == "ReadWriteMany"
    if platform.huggingface.offline and not shared:
        yield (
            "huggingface.offline: gateways and workers then read only the model cache; set "
            "modelCache.enabled: true, with accessMode: ReadWriteMany"
        )

# ruff: noqa: E501  a table reads best with a case a line
"""Values that Python and the chart refuse alike, each with the path that the message begins with."""

from typing import Any

import pytest


def cluster(**values: Any) -> dict[str, Any]:
    """Return values with one pool and one model on it, changed as told."""
    return {
        "models": {"one": model()},
        "gpuPools": {"l4": {"order": 1, "gpusPerWorker": 2, "maxWorkers": 4}},
        **values,
    }


def model(**values: Any) -> dict[str, Any]:
    return {"id": "org/one", "source": "hf://org/one", "pool": "l4", **values}


def models(**values: Any) -> dict[str, Any]:
    return cluster(models={"one": model(**values)})


def spot(joins: str = "l4", **values: Any) -> dict[str, Any]:
    """Return values where a second pool holds the models of the first too."""
    return cluster(
        gpuPools={
            "l4": {"order": 1, "gpusPerWorker": 2, "maxWorkers": 4},
            "spot": {"order": 2, "gpusPerWorker": 2, "maxWorkers": 2, "joins": joins},
        },
        **values,
    )


CROSS_FIELD = [
    pytest.param(models(pool="a100"), "models.one.pool: there is no pool 'a100'; the pools are: l4", id="no pool"),
    pytest.param(
        models(parallelism={"tensor": 3}), "models.one.parallelism.tensor: 3 exceeds the 2 GPU(s)", id="tensor"
    ),
    pytest.param(
        models(replicas={"max": 5}, parallelism={"tensor": 2}),
        "gpuPools.l4.maxWorkers: its models may need 10 GPUs but its workers have 8",
        id="too many replicas",
    ),
    pytest.param(
        models(replicas={"max": 3}, parallelism={"tensor": 2, "pipeline": 2}),
        "gpuPools.l4.maxWorkers: its models may need 12 GPUs but its workers have 8",
        id="too many pipeline stages",
    ),
    pytest.param(
        models(replicas={"max": 25}, gpuSharing={"replicasPerGpu": 3}),
        "gpuPools.l4.maxWorkers: its models may need 9 GPUs but its workers have 8",
        id="too many on shared GPUs",
    ),
    pytest.param(
        models(parallelism={"tensor": 2}, gpuSharing={"replicasPerGpu": 2}),
        "models.one: gpuSharing.replicasPerGpu: a replica on 2 GPUs cannot share them",
        id="shares several GPUs",
    ),
    pytest.param(
        cluster(models={"one": model(), "two": model()}), "models.two: models.one answers to 'org/one' too", id="one id"
    ),
    pytest.param(
        cluster(models={"one": model(aliases=["x"]), "two": model(id="y", aliases=["x"])}),
        "models.two: models.one answers to 'x' too",
        id="one alias",
    ),
    pytest.param(
        cluster(gpuPools={"l4": {"order": 1}, "t4": {"order": 1}}),
        "gpuPools.t4.order: 1 is taken by gpuPools.l4; 2 is free",
        id="one order",
    ),
    pytest.param(
        cluster(gpuPools={"l4": {"order": 1}, "cpu": {"order": 2}}), "gpuPools.cpu: is the group of the CPU pods", id="cpu"
    ),
    pytest.param(
        spot("a100"), "gpuPools.spot.joins: there is no pool 'a100'; the pools are: l4", id="joins no pool"
    ),
    pytest.param(
        spot("spot"), "gpuPools.spot.joins: the pool 'spot' joins 'spot'; name one that joins none", id="joins itself"
    ),
    pytest.param(
        cluster(gpuPools={"l4": {"order": 1}, "a": {"order": 2, "joins": "l4"}, "b": {"order": 3, "joins": "a"}}),
        "gpuPools.b.joins: the pool 'a' joins 'l4'; name one that joins none",
        id="joins a pool that joins",
    ),
    pytest.param(
        spot(models={"one": model(pool="spot")}),
        "models.one.pool: 'spot' joins the pool 'l4'; name that one, and both run the model",
        id="pool that joins",
    ),
    pytest.param(
        spot(models={"one": model(pool="a100")}),
        "models.one.pool: there is no pool 'a100'; the pools are: l4",
        id="no pool, beside one that joins",
    ),
    pytest.param(
        cluster(
            models={"one": model(parallelism={"tensor": 2})},
            gpuPools={"l4": {"order": 1, "gpusPerWorker": 2}, "spot": {"order": 2, "joins": "l4"}},
        ),
        "models.one.parallelism.tensor: 2 exceeds the 1 GPU(s) of a worker; lower it, or raise gpuPools.spot.gpusPerWorker",
        id="tensor over a pool that joins",
    ),
    pytest.param(
        spot(models={"one": model(replicas={"max": 13})}),
        "gpuPools.l4.maxWorkers: its models may need 13 GPUs but its workers have 12",
        id="too many replicas of both pools",
    ),
    pytest.param(
        cluster(huggingface={"offline": True}),
        "huggingface.offline: gateways and workers then read only the model cache; set modelCache.enabled: true",
        id="offline without a cache",
    ),
    pytest.param(
        cluster(
            gpuPools={"l4": {"order": 1, "maxWorkers": 1}},
            modelCache={"enabled": True, "accessMode": "ReadWriteOnce"},
            huggingface={"offline": True},
        ),
        "huggingface.offline: gateways and workers then read only the model cache",
        id="offline with a cache that gateways do not mount",
    ),
    pytest.param(
        cluster(modelCache={"enabled": True, "accessMode": "ReadWriteOnce"}),
        "modelCache.accessMode: ReadWriteOnce is for one worker and the pools may have 4",
        id="cache of one worker",
    ),
    pytest.param(
        cluster(
            gpuPools={"l4": {"order": 1, "maxWorkers": 1}},
            modelCache={"enabled": True, "accessMode": "ReadWriteOnce"},
        ),
        "modelCache.accessMode: ReadWriteOnce is for one worker and a new cluster starts a second one",
        id="cache of one cluster",
    ),
    pytest.param(
        cluster(gpuPools={"l4": {"order": 1, "maxWorkers": 4, "shmSize": "25Gi"}}),
        "gpuPools.l4.shmSize: 25Gi exceeds resources.memory (24Gi), of which it is a part",
        id="shared memory over memory",
    ),
    pytest.param(
        cluster(gpuPools={"l4": {"order": 1, "gpusPerWorker": 8}}),
        "gpuPools.l4.resources.cpu: 6 is less than one for each of 8 GPUs",
        id="GPUs without a core",
    ),
    pytest.param(
        cluster(head={"resources": {"memory": "1Gi"}}),
        "head.resources: memory 1Gi is too little for Ray's own processes; give 4Gi or more",
        id="small head",
    ),
    pytest.param(
        cluster(gateway={"limits": {"default": {"models": {"noe": {"requestsPerMinute": 1}}}}}),
        "gateway.limits.default.models.noe: there is no model 'noe'; the models are: one",
        id="limit of no model",
    ),
    pytest.param(
        cluster(gateway={"limits": {"tenants": {"acme": {"models": {"noe": {}}}}}}),
        "gateway.limits.tenants.acme.models.noe: there is no model 'noe'; the models are: one",
        id="a tenant's limit of no model",
    ),
    pytest.param(
        cluster(gateway={"pod": {"labels": {"ray.io/serve": "x"}}}),
        "gateway.pod: labels ray.io/serve is set by the chart or KubeRay; take another",
        id="label of KubeRay",
    ),
    pytest.param(
        cluster(head={"pod": {"env": {"REDIS_PASSWORD": "x"}}}),
        "head.pod: env REDIS_PASSWORD is set by KubeRay; see gcsFaultTolerance",
        id="variable of KubeRay",
    ),
    pytest.param(
        cluster(gateway={"pod": {"serviceAccount": {"name": "a", "annotations": {"b": "c"}}}}),
        "gateway.pod.serviceAccount: annotations are for the chart's own account",
        id="annotations of another's account",
    ),
    pytest.param(
        cluster(head={"pod": {"serviceAccount": {"annotations": {"b": "c"}}}}),
        "head.pod: serviceAccount.annotations: KubeRay makes the head's account",
        id="annotations of the head's account",
    ),
    pytest.param(models(replicas={"min": 3, "max": 2}), "models.one.replicas: min (3) is greater than max (2)", id="min over max"),
    pytest.param(models(source="ftp://x"), "models.one: source 'ftp://x' must begin with", id="scheme"),
    pytest.param(
        models(source="pvc://claim/x"),
        "models.one: source 'pvc://claim/x' is not supported; mount the claim with modelCache.existing",
        id="claim",
    ),
    pytest.param(
        models(source="oci://registry/x"),
        "models.one: source 'oci://registry/x' is not supported; build the model into the image",
        id="image",
    ),
    pytest.param(
        models(source="file://models/x"),
        "models.one: source 'file://models/x' is not an absolute path; write file:///models/",
        id="relative path",
    ),
    pytest.param(
        models(source="hf://org/name/file"),
        "models.one: source 'hf://org/name/file' does not name a repository; write hf://org/name",
        id="no repository",
    ),
    pytest.param(
        cluster(observability={"dashboards": True}), "observability: dashboards and tracing", id="not there yet"
    ),
    pytest.param(
        cluster(observability={"rules": True}), "observability: rules need metrics that are not scraped", id="rules without metrics"
    ),
    pytest.param(models(source=""), "models.one: source is missing", id="no source"),
    pytest.param(
        models(engine={"args": {"tensor_parallel_size": 2}}),
        "models.one.engine.args.tensor_parallel_size: set parallelism.tensor instead",
        id="argument that is set elsewhere",
    ),
    pytest.param(
        cluster(gateway={"replicas": {"min": 9, "max": 8}}), "gateway.replicas: min (9) is greater than max (8)", id="gateways"
    ),
    pytest.param(cluster(image={"tag": "latest"}), 'image: tag "latest"', id="latest"),
    pytest.param(cluster(ingress={"enabled": True}), "ingress: host is missing", id="ingress without host"),
    pytest.param(cluster(httpRoute={"enabled": True}), "httpRoute: parentRefs is empty", id="route without parent"),
    pytest.param(cluster(redis={"embedded": False}), "redis: external.address is missing", id="no Redis"),
    pytest.param(
        cluster(redis={"external": {"address": "redis:6379"}}), "redis: external.address is set", id="two Redis"
    ),
    pytest.param(
        cluster(gcsFaultTolerance={"existingSecret": "x"}), "gcsFaultTolerance: existingSecret is that of another Redis", id="password of no GCS Redis"
    ),
]  # fmt: skip

CLUSTER_ONLY = [
    pytest.param(models(pool=""), "models.one.pool: is missing", id="vllm without pool"),
    pytest.param(
        models(source="demo://x"), "models.one.source: demo:// is for one machine", id="demo model"
    ),
]

SHAPE = [
    pytest.param(cluster(redis={"pod": {"enV": {}}}), "redis.pod.enV", id="unknown part of a pod"),
    pytest.param(cluster(redis={"pod": {"env": {"A": 1}}}), "redis.pod.env.A", id="variable no text"),
    pytest.param(cluster(modelCache={"pod": {"serviceAccount": {}}}), "modelCache.pod.serviceAccount", id="account of the Job"),
    pytest.param(models(loraAdapters={}), "models.one.loraAdapters", id="adapters are not there yet"),
    pytest.param(models(engine={"kind": "speech"}), "models.one.engine.kind", id="speech is not there yet"),
    pytest.param(models(replicas={"mni": 1}), "models.one.replicas.mni", id="unknown key"),
    pytest.param(
        models(engine={"args": {"max_model_length": 9}}), "models.one.engine.args.max_model_length", id="unknown argument"
    ),
    pytest.param(
        models(engine={"kind": "vllm", "args": {"max_model_length": 9}}),
        "models.one.engine.args.max_model_length",
        id="unknown argument of a named kind",
    ),
    pytest.param(
        cluster(redis={"embedded": False, "external": {"address": "redis://redis:6379"}}),
        "redis.external.address",
        id="URL for an address",
    ),
    pytest.param(
        cluster(gcsFaultTolerance={"enabled": True, "address": "redis://redis:6379"}),
        "gcsFaultTolerance.address",
        id="URL for an address of the GCS' Redis",
    ),
    pytest.param(models(replicas={"min": -1}), "models.one.replicas.min", id="negative"),
    pytest.param(models(replicas={"max": "3"}), "models.one.replicas.max", id="text for a number"),
    pytest.param(models(replicas={"max": 2.5}), "models.one.replicas.max", id="fraction"),
    pytest.param(cluster(modles={}), "modles", id="unknown part"),
    pytest.param(cluster(gpuPools={"l4": {}}), "gpuPools.l4.order", id="pool without order"),
    pytest.param(cluster(gpuPools={"l4": {"order": 0}}), "gpuPools.l4.order", id="order zero"),
    pytest.param(cluster(gpuPools={"L4": {"order": 1}}), "gpuPools", id="name of a pool"),
    pytest.param(cluster(gpuPools={"l4": {"order": 1, "priority": "high"}}), "gpuPools.l4.priority", id="priority no number"),
    pytest.param(cluster(poolDefaults={"joins": "l4"}), "poolDefaults.joins", id="all pools join"),
    pytest.param(cluster(pdb={"minAvailable": "50%"}), "pdb.minAvailable", id="percentage"),
    pytest.param(cluster(image={"digest": "abc"}), "image.digest", id="digest"),
    pytest.param(cluster(upgrade={"strategy": "NewClusterWithIncrementalUpgrade"}), "upgrade.strategy", id="incremental upgrade"),
    pytest.param(cluster(head={"resources": {"cpu": True}}), "head.resources.cpu", id="quantity no text"),
    pytest.param(cluster(head={"resources": {"cpu": -2}}), "head.resources.cpu", id="quantity below zero"),
    pytest.param(cluster(head={"resources": {"memory": "8ki"}}), "head.resources.memory", id="quantity's suffix"),
    pytest.param(cluster(head={"resources": {"memory": "8e9"}}), "head.resources.memory", id="quantity's exponent"),
    pytest.param(cluster(modelCache={"accessMode": "RWX"}), "modelCache.accessMode", id="access mode"),
]  # fmt: skip

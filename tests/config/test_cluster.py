from typing import Any

import pytest
from tests.chart.refusals import CROSS_FIELD, SHAPE, cluster, model, models, spot

from tera.config.platform import PlatformConfig
from tera.errors import ConfigError


def refused(values: Any) -> list[str]:
    with pytest.raises(ConfigError) as raised:
        PlatformConfig.parse(values)
    return raised.value.message.splitlines()


@pytest.mark.parametrize(("values", "beginning"), [*CROSS_FIELD, *SHAPE])
def test_refusal_begins_with_the_path_of_the_value(values: Any, beginning: str) -> None:
    lines = refused(values)
    assert any(line.startswith(beginning) for line in lines), lines


def test_all_faults_between_parts_are_told_at_once() -> None:
    lines = refused(cluster(models={"one": model(pool="a"), "two": model(pool="b")}))
    assert [line.split(":")[0] for line in lines] == [
        "models.two",
        "models.one.pool",
        "models.two.pool",
    ]


def test_pool_inherits_key_by_key() -> None:
    pools = {"l4": {"order": 1, "resources": {"cpu": "12"}}}
    defaults = {"resources": {"cpu": "4", "memory": "32Gi"}, "maxWorkers": 3}
    pool = PlatformConfig.parse(cluster(gpuPools=pools, poolDefaults=defaults)).gpu_pools["l4"]
    assert (pool.resources.cpu, pool.resources.memory, pool.max_workers) == ("12", "32Gi", 3)


def test_disabled_model_asks_for_no_gpu() -> None:
    PlatformConfig.parse(models(enabled=False, replicas={"max": 99}))


def test_workers_of_both_pools_count_for_the_models_of_one() -> None:
    wanted = {"one": model(replicas={"max": 6}, parallelism={"tensor": 2})}
    platform = PlatformConfig.parse(spot(models=wanted))
    assert platform.gpu_pools["spot"].joins == "l4"
    with pytest.raises(ConfigError, match="its workers have 8"):
        PlatformConfig.parse(cluster(models=wanted))


def test_replicas_that_share_gpus_count_in_parts() -> None:
    shared = {"replicas": {"max": 3}, "gpuSharing": {"replicasPerGpu": 2}}
    names = [f"m{number}" for number in range(5)]
    # 7.5 GPUs of the 8 that there are; in whole ones for each model it would be 10.
    PlatformConfig.parse(cluster(models={name: model(id=name, **shared) for name in names}))


@pytest.mark.parametrize(
    ("parallelism", "gpus"),
    [
        pytest.param({}, 1, id="one"),
        pytest.param({"tensor": 2}, 2, id="tensor"),
        pytest.param({"tensor": 2, "pipeline": 2}, 4, id="both"),
    ],
)
def test_gpus_of_a_replica(parallelism: dict[str, int], gpus: int) -> None:
    assert PlatformConfig.parse(models(parallelism=parallelism)).models["one"].gpus == gpus

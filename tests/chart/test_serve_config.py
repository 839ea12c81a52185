import copy
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.chart.charts import CHART, VALUES_FILES, platform_of, serve_config_of, values_file
from tests.chart.refusals import cluster, model

from tera.config.engine_args import SET_ELSEWHERE
from tera.config.platform import PlatformConfig
from tera.config.values_file import load_cluster_platform
from tera.config.vllm_arguments import VLLM_ARGUMENTS
from tera.manifest import cluster_serve_config, serve_config

Object = dict[str, Any]


def by_name(config: Object) -> Object:
    """Return a Serve config whose applications are found by name: their order means nothing."""
    return {**config, "applications": {each["name"]: each for each in config["applications"]}}


@pytest.mark.parametrize("name", VALUES_FILES)
def test_chart_makes_of_its_values_files_what_python_makes(name: str) -> None:
    values = values_file(name)
    assert by_name(serve_config_of(values)) == by_name(cluster_serve_config(platform_of(values)))


@pytest.mark.parametrize("name", VALUES_FILES)
def test_command_line_reads_values_as_helm_does(name: str) -> None:
    platform = load_cluster_platform(CHART / f"values-{name}.yaml")
    assert platform == platform_of(values_file(name))


@pytest.mark.parametrize("name", VALUES_FILES)
def test_one_machine_reads_past_what_only_a_cluster_has(name: str) -> None:
    values = values_file(name)
    for each in values["models"].values():
        each["engine"] = {"kind": "simulated"}
    for application in serve_config(PlatformConfig.parse(values))["applications"]:
        (deployment,) = application["deployments"]
        assert deployment["ray_actor_options"] == {"num_cpus": 1}
        assert "placement_group_bundles" not in deployment


def test_chart_defaults_are_python_defaults_but_for_what_a_cluster_wants() -> None:
    ours, python = platform_of({}).model_dump(), PlatformConfig().model_dump()
    for platform in (ours, python):
        del platform["gateway"]["replicas"]
        del platform["gateway"]["limits"]["default"]
    assert ours == python


NAMES = st.from_regex(r"\A[a-z][-a-z0-9]{0,8}[a-z0-9]\Z")
NUMBERS = st.integers(1, 10**9)
SECONDS = st.one_of(st.integers(0, 10**6), st.floats(0.25, 10**6, width=32))
TEXTS = st.text("abcXYZ019 :{}[]'\"\\|#&*!%@`<>,-_\n\té→", max_size=12)


def optional(**parts: st.SearchStrategy[Any]) -> st.SearchStrategy[Object]:
    return st.fixed_dictionaries({}, optional=parts)


REPLICAS = st.tuples(st.integers(0, 3), st.integers(0, 3)).map(
    lambda bounds: {"min": min(bounds), "max": max(bounds)}
)
SCALING = optional(
    targetOngoingRequests=st.floats(0.5, 1000, width=32),
    maxOngoingRequests=NUMBERS,
    maxQueuedRequests=NUMBERS,
    upscaleDelaySeconds=SECONDS,
    downscaleDelaySeconds=SECONDS,
    downscaleToZeroDelaySeconds=SECONDS,
    coldStartDeadlineSeconds=NUMBERS,
)
ARGUMENTS = st.recursive(
    st.one_of(st.booleans(), st.integers(-(2**31), 2**31), TEXTS),
    lambda below: st.one_of(st.lists(below, max_size=2), st.dictionaries(NAMES, below, max_size=2)),
    max_leaves=4,
)
ARGS = st.dictionaries(st.from_regex(r"\A[a-z_]{1,12}\Z"), ARGUMENTS, max_size=3)
VLLM_ARGS = st.dictionaries(
    st.sampled_from(sorted(VLLM_ARGUMENTS - SET_ELSEWHERE.keys())), ARGUMENTS, max_size=3
)
LIMITS = optional(
    requestsPerMinute=st.integers(0, 10**9),
    tokensPerMinute=st.integers(0, 10**9),
    concurrentRequests=st.integers(0, 10**4),
    tokenBudget=st.integers(0, 10**12),
    budgetPeriod=st.sampled_from(["day", "month"]),
)


BIG = {"order": 1, "gpusPerWorker": 4}
POOL = {"big": {**BIG, "maxWorkers": 99}}
POOL_WITH_SPOT = {
    "big": {**BIG, "maxWorkers": 1},
    "spot": {**BIG, "order": 2, "maxWorkers": 98, "joins": "big", "priority": 10},
}


@st.composite
def values(draw: st.DrawFn) -> Object:
    """Return values that both accept."""
    models = {}
    for number, name in enumerate(draw(st.lists(NAMES, unique=True, max_size=3))):
        shared = {
            "id": f"org/{number}{draw(TEXTS)}",
            **draw(
                optional(
                    aliases=st.tuples(TEXTS.map(f"alias {number} ".__add__)).map(list),
                    enabled=st.booleans(),
                    replicas=REPLICAS,
                    scaling=SCALING,
                    capabilities=st.sampled_from([["chat"], ["completions"], []]),
                )
            ),
        }
        if draw(st.booleans()):
            parallelism = optional(tensor=st.integers(1, 4), pipeline=st.integers(1, 3))
            sharing = {"gpuSharing": optional(replicasPerGpu=st.integers(1, 8))}
            spread = st.fixed_dictionaries({"parallelism": parallelism})
            models[name] = {
                **shared,
                "engine": {"args": draw(VLLM_ARGS)},
                "source": "hf://org/name",
                "pool": "big",
                **draw(spread | st.fixed_dictionaries(sharing)),
            }
        else:
            models[name] = {**shared, "engine": {"kind": "simulated", "args": draw(ARGS)}}
    of_models = st.dictionaries(st.sampled_from(sorted(models)), LIMITS) if models else st.just({})
    return {
        "models": models,
        "modelDefaults": draw(optional(enabled=st.booleans(), replicas=REPLICAS, scaling=SCALING)),
        "gpuPools": draw(st.sampled_from([POOL, POOL_WITH_SPOT])),
        "gateway": draw(
            optional(
                replicas=REPLICAS,
                limits=optional(
                    default=LIMITS,
                    tenants=st.dictionaries(
                        NAMES,
                        st.tuples(LIMITS, of_models).map(
                            lambda both: {**both[0], "models": both[1]}
                        ),
                        max_size=2,
                    ),
                    onRedisError=st.sampled_from(["local", "closed"]),
                ),
                openapi=st.booleans(),
                cors=optional(origins=st.lists(TEXTS, max_size=2)),
            )
        ),
    }


@given(values())
@settings(max_examples=25, deadline=None)
def test_chart_makes_of_any_values_what_python_makes(made: Object) -> None:
    assert by_name(serve_config_of(made)) == by_name(cluster_serve_config(platform_of(made)))


def test_limit_that_is_null_is_none() -> None:
    made = cluster(gateway={"limits": {"default": {"tokensPerMinute": None}}})
    (deployment,) = by_name(serve_config_of(made))["applications"]["gateway"]["deployments"]
    limits = deployment["user_config"]["gateway"]["limits"]
    assert limits["default"] == {"requestsPerMinute": 60, "concurrentRequests": 32, "models": {}}


def test_whole_numbers_stay_whole() -> None:
    (deployment,) = by_name(serve_config_of(cluster()))["applications"]["gateway"]["deployments"]
    body = deployment["user_config"]["gateway"]["requests"]["maxBodyBytes"]
    assert (body, type(body)) == (10485760, int)


def application(made: Object, name: str) -> str:
    """Return an application as the text that Serve compares."""
    return json.dumps(by_name(serve_config_of(made))["applications"][name])


def test_another_model_leaves_the_first_byte_for_byte() -> None:
    more = cluster(models={"one": model(), "another": model(id="org/another")})
    assert application(cluster(), "model-one") == application(more, "model-one")


def test_edit_of_replicas_changes_that_number_only() -> None:
    before = serve_config_of(cluster(models={"one": model(replicas={"min": 1, "max": 2})}))
    after = serve_config_of(cluster(models={"one": model(replicas={"min": 1, "max": 3})}))
    edited = copy.deepcopy(before)
    engine, gateway = (by_name(edited)["applications"][name] for name in ("model-one", "gateway"))
    engine["deployments"][0]["autoscaling_config"]["max_replicas"] = 3
    # The gateway's catalog has it as well; Serve hands that over in place.
    gateway["deployments"][0]["user_config"]["models"]["one"]["replicas"]["max"] = 3
    assert edited == after

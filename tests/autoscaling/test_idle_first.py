"""Which replicas go, of Serve's own scheduler and by Serve's own record of what replicas report."""

import logging
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.serve._private.autoscaling_metrics_codec import decode_handle_flat, encode
from ray.serve._private.autoscaling_state import DeploymentAutoscalingState
from ray.serve._private.cluster_node_info_cache import DefaultClusterNodeInfoCache
from ray.serve._private.common import (
    RUNNING_REQUESTS_KEY,
    DeploymentHandleSource,
    DeploymentID,
    HandleMetricReport,
    ReplicaID,
    ReplicaMetricReport,
    TimeStampedValue,
)
from ray.serve._private.config import DeploymentConfig, ReplicaConfig
from ray.serve._private.deployment_info import DeploymentInfo
from ray.serve._private.deployment_scheduler import (
    DeploymentDownscaleRequest,
    DeploymentScheduler,
    SpreadDeploymentSchedulingPolicy,
)
from ray.serve.config import AutoscalingConfig

from tera.autoscaling.idle_first import idle_first
from tera.config.platform import PlatformConfig
from tera.manifest import serve_config
from tera.upstream import ray_controller
from tera.upstream.ray_controller import busy_replicas, choose_by

ENGINES = DeploymentID("Engine", "model-demo")
OTHERS = DeploymentID("Engine", "model-other")


def replica(name: str, deployment: DeploymentID = ENGINES) -> ReplicaID:
    return ReplicaID(name, deployment)


@given(st.data())
def test_idle_ones_go_first_and_each_kind_in_its_order(data: st.DataObject) -> None:
    order = data.draw(st.lists(st.integers(0, 99), min_size=1, max_size=30, unique=True))
    busy = data.draw(st.sets(st.sampled_from([*order, 100])))
    count = data.draw(st.integers(1, len(order) + 1))
    chosen = idle_first(lambda number: set(order[:number]), count, busy)
    assert chosen == set(sorted(order, key=busy.__contains__)[:count])


def scheduler(kind: type[DeploymentScheduler], **nodes: str) -> DeploymentScheduler:
    """Return one that has replicas of one letter on nodes, the oldest first."""
    found = kind(DefaultClusterNodeInfoCache(None), "head", lambda _: None)
    for deployment in (ENGINES, OTHERS):
        found.on_deployment_created(deployment, SpreadDeploymentSchedulingPolicy())
    for age in range(max(map(len, nodes.values()))):
        for node, names in nodes.items():
            for name in names[age : age + 1]:
                found.on_replica_running(replica(name), node)
    return found


def stopped(found: DeploymentScheduler, count: int, **gangs: Any) -> str:
    taken = found.schedule({}, {ENGINES: DeploymentDownscaleRequest(ENGINES, count, **gangs)})
    return "".join(sorted(each.unique_id for each in taken[ENGINES]))


@pytest.fixture
def kind() -> type[DeploymentScheduler]:
    """Serve's, one of its own for each test, so that none changes it for another."""
    return type("OfThisTest", (DeploymentScheduler,), {})


@pytest.mark.parametrize(
    ("nodes", "busy", "count", "expected"),
    [
        pytest.param({"head": "abcd"}, "", 2, "cd", id="nobody is busy: the newest"),
        pytest.param({"head": "abcd"}, "abcd", 2, "cd", id="all are busy: the newest"),
        pytest.param({"head": "abcd"}, "a", 2, "cd", id="those that would stay are busy"),
        pytest.param({"head": "abcd"}, "d", 1, "c", id="the newest is busy"),
        pytest.param({"head": "abcd"}, "bcd", 1, "a", id="the oldest alone is idle"),
        pytest.param({"head": "abcd"}, "bcd", 3, "acd", id="more go than are idle"),
        pytest.param({"head": "ab", "far": "cd", "near": "e"}, "", 2, "de", id="by nodes"),
        pytest.param({"head": "ab", "far": "cd", "near": "e"}, "e", 2, "cd", id="busy on its node"),
        pytest.param(
            {"head": "ab", "far": "cd", "near": "e"}, "cde", 1, "b", id="idle on the head"
        ),
    ],
)
def test_serves_scheduler_takes(
    kind: type[DeploymentScheduler], nodes: dict[str, str], busy: str, count: int, expected: str
) -> None:
    choose_by(idle_first, kind, lambda _: {replica(name) for name in busy})
    assert stopped(scheduler(kind, **nodes), count) == expected


def test_what_has_not_started_goes_before_all_that_run(kind: type[DeploymentScheduler]) -> None:
    choose_by(idle_first, kind, lambda _: {replica("b")})
    found = scheduler(kind, head="ab")
    found._on_replica_launching(replica("c"))
    assert [stopped(found, count) for count in (1, 2, 3)] == ["c", "ac", "abc"]


def test_a_busy_one_that_a_new_controller_does_not_know_yet_stays(
    kind: type[DeploymentScheduler],
) -> None:
    choose_by(idle_first, kind, lambda _: {replica("c")})
    found = scheduler(kind, head="ab")
    found.on_replica_recovering(replica("c"))
    assert stopped(found, 1) == "b"


def test_gangs_go_as_serve_says(kind: type[DeploymentScheduler]) -> None:
    choose_by(idle_first, kind, lambda _: {replica("c"), replica("d")})
    gangs = {"old": {replica("a"), replica("b")}, "new": {replica("c"), replica("d")}}
    by_replica = {each: gang for gang, members in gangs.items() for each in members}
    named = {"gang_id_by_replica": by_replica, "replicas_by_gang_id": gangs, "gang_size": 2}
    assert stopped(scheduler(kind, head="abcd"), 2, **named) == "cd"


@pytest.fixture
def complaints(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What is logged, which Serve's logger keeps to itself once Serve is set up."""
    found: list[str] = []

    def keep(record: logging.LogRecord) -> bool:
        found.append(record.getMessage())
        return True

    log = logging.Logger("tera.test")
    log.addFilter(keep)
    monkeypatch.setattr(ray_controller, "log", log)
    ray_controller._complain.cache_clear()
    yield found
    ray_controller._complain.cache_clear()


def test_serves_choice_stays_where_serve_is_not_as_expected(
    kind: type[DeploymentScheduler], complaints: list[str]
) -> None:
    def broken(_: DeploymentID) -> set[ReplicaID]:
        raise AttributeError("raw_metrics")

    choose_by(idle_first, kind, broken)
    found = scheduler(kind, head="abcd")
    assert [stopped(found, 1), stopped(found, 2)] == ["d", "cd"]
    assert len(complaints) == 1


def series(counts: Sequence[float], until_s: float) -> list[TimeStampedValue]:
    return [
        TimeStampedValue(until_s - 0.4 * age, count)
        for age, count in reversed(list(enumerate(reversed(counts))))
    ]


def told(
    state: DeploymentAutoscalingState, now: float, queued: float = 0, **counts: Sequence[float]
) -> None:
    """Report to a deployment's state what waits at a gateway and what each replica ran, and runs.

    A gateway counts what it calls by Serve too, which is nothing that Serve should scale by.
    """
    for name, running in counts.items():
        points = {RUNNING_REQUESTS_KEY: series(running, now)} if running else {}
        state.record_request_metrics_for_replica(ReplicaMetricReport(replica(name), points, now))
    report = HandleMetricReport(
        deployment_id=ENGINES,
        handle_id="gateway",
        actor_id="gateway",
        handle_source=DeploymentHandleSource.REPLICA,
        queued_requests=series([queued], now),
        metrics={RUNNING_REQUESTS_KEY: {replica("a").to_full_id_str(): series([1], now)}},
        timestamp=now,
    )
    state.record_columnar_metrics_for_handle(decode_handle_flat(encode(report)))


def busy(state: DeploymentAutoscalingState) -> str:
    found = busy_replicas(state.get_autoscaling_context(0))
    return "".join(sorted(each.unique_id for each in found))


def test_busy_is_what_ran_something_at_its_last_report() -> None:
    state = autoscaled(ours=True)
    state.update_running_replica_ids([replica(name) for name in "abcde"])
    now = time.time()
    assert busy(state) == ""
    told(state, now, a=[0, 1], b=[3, 0], c=[0, 0], d=[])
    assert busy(state) == "a"
    told(state, now + 1, a=[1, 0], b=[0, 0], c=[0, 4])
    assert busy(state) == "c"


def autoscaled(*, ours: bool) -> DeploymentAutoscalingState:
    """Return Serve's state of a deployment with our config, with our policy or with Serve's."""
    model = {
        "id": "org/demo",
        "engine": {"kind": "simulated"},
        "replicas": {"min": 0, "max": 9},
        "scaling": {
            "targetOngoingRequests": 2,
            "upscaleDelaySeconds": 10,
            "downscaleDelaySeconds": 60,
            "downscaleToZeroDelaySeconds": 300,
        },
    }
    made = serve_config(PlatformConfig.parse({"models": {"demo": model}}))
    config = dict(made["applications"][0]["deployments"][0]["autoscaling_config"])
    if not ours:
        del config["policy"]
    autoscaling = AutoscalingConfig(**config)
    assert autoscaling.policy.is_default_policy_function() is not ours
    state = DeploymentAutoscalingState(ENGINES)
    replica_config = ReplicaConfig.create(lambda: None)
    deployment = DeploymentConfig(autoscaling_config=autoscaling)
    state.register(DeploymentInfo(deployment, replica_config, 0, "job"), 0)
    return state


@pytest.fixture
def _serves_own(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Serve's own scheduler as no policy has changed it, also afterwards."""
    own = DeploymentScheduler._get_replicas_to_stop
    ray_controller._contexts.cache_clear()
    monkeypatch.setattr(DeploymentScheduler, "_get_replicas_to_stop", own)
    yield
    ray_controller._contexts.cache_clear()


# Replicas that run, what they run and what waits; long enough apart for each delay to pass or not.
COURSE = [
    ("", [], 0, 0.0),
    ("", [], 1, 1.0),
    ("a", [1], 0, 2.0),
    ("a", [9], 3, 1.0),
    ("a", [9], 3, 11.0),
    ("abc", [2, 2, 1], 0, 1.0),
    ("abc", [0, 1, 0], 0, 1.0),
    ("abc", [0, 1, 0], 0, 61.0),
    ("b", [0], 0, 61.0),
    ("b", [0], 0, 301.0),
]


@pytest.mark.usefixtures("_serves_own")
def test_it_scales_as_serves_own_policy_does(monkeypatch: pytest.MonkeyPatch) -> None:
    states = [autoscaled(ours=ours) for ours in (True, False)]
    targets = [0, 0]
    seen = []
    now = time.time()
    for names, counts, queued, passed_s in COURSE:
        now += passed_s
        monkeypatch.setattr(time, "time", lambda now=now: now)
        running = {name: [count] for name, count in zip(names, counts, strict=True)}
        for number, state in enumerate(states):
            state.update_running_replica_ids([replica(name) for name in names])
            told(state, now, queued, **running)
            targets[number] = state.get_decision_num_replicas(targets[number])
        seen.append(tuple(targets))
    assert all(ours == serves for ours, serves in seen)
    # It went up, down, and to nothing.
    changes = [after[0] - before[0] for before, after in pairwise(seen)]
    assert max(changes) > 0 > min(changes)
    assert seen[-1] == (0, 0) != seen[-2]


@pytest.mark.usefixtures("_serves_own")
def test_naming_the_policy_is_all_that_a_controller_needs(complaints: list[str]) -> None:
    state = autoscaled(ours=True)
    found = scheduler(DeploymentScheduler, head="abcd")
    state.update_running_replica_ids([replica(name) for name in "abcd"])
    told(state, time.time(), a=[0], b=[0], c=[1], d=[2])
    assert stopped(found, 1) == "d"
    state.get_decision_num_replicas(4)
    assert [stopped(found, count) for count in (1, 2, 3)] == ["b", "ab", "abd"]
    assert complaints == []


@pytest.mark.usefixtures("_serves_own")
def test_a_context_that_is_not_as_expected_scales_all_the_same(
    complaints: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    state = autoscaled(ours=True)
    state.update_running_replica_ids([replica("a")])
    found = scheduler(DeploymentScheduler, head="ab")
    monkeypatch.setattr(state, "_get_raw_custom_metrics", lambda: {RUNNING_REQUESTS_KEY: None})
    assert [state.get_decision_num_replicas(1) for _ in range(2)] == [1, 1]
    assert [stopped(found, 1), stopped(found, 1)] == ["b", "b"]
    assert len(complaints) == 1

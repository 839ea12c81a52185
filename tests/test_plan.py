# ruff: noqa: E501  a table reads best with a case a line
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.plans import VALUES, Object, model, only, platform, pool, without

from tera.config.merge import deep_merge
from tera.config.platform import PlatformConfig
from tera.errors import ConfigError
from tera.plan import plan

ALL = ("model-one", "model-two", "gateway")


IN_PLACE = [
    pytest.param(model(replicas={"max": 4}), "models.one.replicas.max", id="replicas.max"),
    pytest.param(model(replicas={"min": 0}), "models.one.replicas.min", id="replicas.min"),
    pytest.param(
        model(scaling={"upscaleDelaySeconds": 1}),
        "models.one.scaling.upscaleDelaySeconds",
        id="scaling",
    ),
    pytest.param(
        model(scaling={"maxOngoingRequests": 9}),
        "models.one.scaling.maxOngoingRequests",
        id="ongoing requests",
    ),
    pytest.param(
        model(scaling={"maxQueuedRequests": 9}), "models.one.scaling.maxQueuedRequests", id="queue"
    ),
    pytest.param(model(aliases=["default"]), "models.one.aliases", id="aliases"),
    pytest.param(model(id="org/another"), "models.one.id", id="id"),
    pytest.param(model(capabilities=["chat"]), "models.one.capabilities", id="capabilities"),
    pytest.param(model(routing="least_loaded"), "models.one.routing", id="routing"),
    pytest.param(model(cacheSharing="key"), "models.one.cacheSharing", id="cache sharing"),
    pytest.param(
        {"gateway": {"limits": {"default": {"requestsPerMinute": 5}}}},
        "gateway.limits.default.requestsPerMinute",
        id="limits",
    ),
    pytest.param(
        {"gateway": {"limits": {"tenants": {"acme": {}}}}},
        "gateway.limits.tenants.acme",
        id="a tenant",
    ),
    pytest.param({"gateway": {"replicas": {"max": 9}}}, "gateway.replicas.max", id="gateways"),
    pytest.param({"gateway": {"cors": {"origins": ["*"]}}}, "gateway.cors.origins", id="cors"),
    pytest.param(
        {"gateway": {"requests": {"retries": 0}}}, "gateway.requests.retries", id="requests"
    ),
    pytest.param(
        {"gateway": {"usage": {"retentionDays": 3}}}, "gateway.usage.retentionDays", id="usage"
    ),
]


@pytest.mark.parametrize("on_cluster", [True, False])
@pytest.mark.parametrize(("edit", "path"), IN_PLACE)
def test_edit_is_applied_in_place(edit: Object, path: str, on_cluster: bool) -> None:
    found = plan(platform(), platform(edit), on_cluster=on_cluster)
    change = only(found)
    assert (change.effect, change.paths, found.restarts) == ("in_place", (path,), ())


RELOADING = [
    pytest.param(
        model(engine={"args": {"max_model_len": 9}}),
        "models.one.engine.args.max_model_len",
        id="engine.args",
    ),
    pytest.param(model(engine={"kind": "simulated"}), "models.one.engine.kind", id="engine.kind"),
    pytest.param(model(source="hf://org/one@v2"), "models.one.source", id="source"),
    pytest.param(
        model(parallelism={"tensor": 2}), "models.one.parallelism.tensor", id="parallelism"
    ),
]


@pytest.mark.parametrize("on_cluster", [True, False])
@pytest.mark.parametrize(("edit", "path"), RELOADING)
def test_edit_reloads_its_model_alone(edit: Object, path: str, on_cluster: bool) -> None:
    found = plan(platform(), platform(edit), on_cluster=on_cluster)
    change = only(found)
    assert (change.effect, change.paths, found.restarts) == ("reloads", (path,), ("model-one",))


@pytest.mark.parametrize("on_cluster", [True, False])
def test_yes_is_another_argument_than_one(on_cluster: bool) -> None:
    old, new = (platform(model(engine={"args": {"seed": seed}})) for seed in (1, True))
    assert plan(old, new, on_cluster=on_cluster).restarts == ("model-one",)


def test_another_pool_reloads_the_model_where_there_are_pools() -> None:
    moved = platform(model(pool="h100"))
    assert plan(platform(), moved).restarts == ("model-one",)
    assert plan(platform(), moved, on_cluster=False).restarts == ()


@pytest.mark.parametrize("on_cluster", [True, False])
@pytest.mark.parametrize(
    ("old", "new", "path", "effect"),
    [
        pytest.param(without("models", "one"), platform(), "models.one", "application_added", id="added"),
        pytest.param(platform(), platform({"models": {"off": {"enabled": True}}}), "models.off.enabled", "application_added", id="enabled"),
        pytest.param(platform(model(replicas={"min": 0, "max": 0})), platform(model(replicas={"min": 0})), "models.one.replicas.max", "application_added", id="max from 0"),
        pytest.param(platform(), without("models", "two"), "models.two", "application_removed", id="removed"),
        pytest.param(platform(), platform(model(enabled=False)), "models.one.enabled", "application_removed", id="disabled"),
        pytest.param(platform(), platform({"models": {"off": {"aliases": ["x"]}}}), "models.off.aliases", "nothing", id="not deployed"),
    ],
)  # fmt: skip
def test_model_comes_and_goes_alone(
    old: PlatformConfig, new: PlatformConfig, path: str, effect: str, on_cluster: bool
) -> None:
    found = plan(old, new, on_cluster=on_cluster)
    change = only(found)
    assert (change.effect, change.paths, found.restarts) == (effect, (path,), ())


CLUSTER = [
    pytest.param(
        {"gpuPools": {"a100": {"order": 4}}}, "gpuPools.a100", "group_appended", id="new pool"
    ),
    pytest.param(
        {"gpuPools": {"a100": {"order": 2}}},
        "gpuPools.a100",
        "cluster_replaced",
        id="pool in the middle",
    ),
    pytest.param(pool(order=4), "gpuPools.l4.order", "cluster_replaced", id="pools reordered"),
    pytest.param(pool(order=2), "gpuPools.l4.order", "nothing", id="pools in the same order"),
    pytest.param(pool(maxWorkers=40), "gpuPools.l4.maxWorkers", "not_taken", id="maxWorkers"),
    pytest.param(pool(tolerations=[]), "gpuPools.l4.tolerations", "not_taken", id="tolerations"),
    pytest.param(
        pool(resources={"cpu": "7"}),
        "gpuPools.l4.resources.cpu",
        "cluster_replaced",
        id="a pool's pods",
    ),
    pytest.param(
        pool(idleTimeoutSeconds=1),
        "gpuPools.l4.idleTimeoutSeconds",
        "cluster_replaced",
        id="a pool's group",
    ),
    pytest.param(
        {"gpuPools": {"spot": {"order": 5, "joins": "l4", "priority": 10, "gpusPerWorker": 2}}},
        "gpuPools.spot",
        "group_appended",
        id="new pool that joins another",
    ),
    pytest.param(
        pool(priority=1), "gpuPools.l4.priority", "cluster_replaced", id="priority of a pool"
    ),
    pytest.param({"image": {"tag": "1.2.3"}}, "image.tag", "cluster_replaced", id="image"),
    pytest.param({"rayVersion": "2.61.0"}, "rayVersion", "cluster_replaced", id="rayVersion"),
    pytest.param(
        {"head": {"resources": {"cpu": "4"}}}, "head.resources.cpu", "cluster_replaced", id="head"
    ),
    pytest.param(
        {"gateway": {"resources": {"cpu": "4"}}},
        "gateway.resources.cpu",
        "cluster_replaced",
        id="gateways' pods",
    ),
    pytest.param(
        {"gateway": {"auth": {"existingSecret": "x"}}},
        "gateway.auth.existingSecret",
        "cluster_replaced",
        id="keys",
    ),
    pytest.param(
        {"gateway": {"auth": {"bootstrapKeys": False}}},
        "gateway.auth.bootstrapKeys",
        "nothing",
        id="first key",
    ),
    pytest.param(
        {"huggingface": {"existingSecret": "x"}},
        "huggingface.existingSecret",
        "cluster_replaced",
        id="huggingface",
    ),
    pytest.param(
        {"huggingface": {"offline": True}},
        "huggingface.offline",
        "cluster_replaced",
        id="no way to the hub",
    ),
    pytest.param(
        {"huggingface": {"secretKey": "x"}},
        "huggingface.secretKey",
        "nothing",
        id="key of no Secret",
    ),
    pytest.param(
        {"objectStore": {"existingSecret": "x"}},
        "objectStore.existingSecret",
        "cluster_replaced",
        id="object store",
    ),
    pytest.param(
        {"modelCache": {"existingClaim": "x"}},
        "modelCache.existingClaim",
        "cluster_replaced",
        id="model cache",
    ),
    pytest.param(
        {"modelCache": {"size": "300Gi"}}, "modelCache.size", "objects", id="size of the cache"
    ),
    pytest.param(
        {"modelCache": {"storageClassName": "x"}},
        "modelCache.storageClassName",
        "not_taken",
        id="class of the cache",
    ),
    pytest.param(
        {"redis": {"image": "valkey/valkey:9"}}, "redis.image", "redis_restarts", id="Valkey"
    ),
    pytest.param({"redis": {"storage": "9Gi"}}, "redis.storage", "not_taken", id="Valkey's volume"),
    pytest.param(
        {"gcsFaultTolerance": {"storage": "2Gi"}},
        "gcsFaultTolerance.storage",
        "not_taken",
        id="volume of the head's state",
    ),
    pytest.param(
        {"gcsFaultTolerance": {"enabled": False}},
        "gcsFaultTolerance.enabled",
        "cluster_replaced",
        id="head's state",
    ),
    pytest.param(
        {"rayAuth": {"enabled": False}}, "rayAuth.enabled", "cluster_replaced", id="Ray's tokens"
    ),
    pytest.param({"upgrade": {"strategy": "None"}}, "upgrade.strategy", "in_place", id="upgrade"),
    pytest.param({"pdb": {"enabled": False}}, "pdb.enabled", "objects", id="disruption budgets"),
    pytest.param(
        {"networkPolicy": {"ingressNamespace": ""}},
        "networkPolicy.ingressNamespace",
        "objects",
        id="network policy",
    ),
    pytest.param(
        {"observability": {"podMonitor": True}}, "observability.podMonitor", "objects", id="metrics"
    ),
    pytest.param({"ingress": {"className": "x"}}, "ingress.className", "nothing", id="no ingress"),
    pytest.param({"global": {"x": 1}}, "global.x", "nothing", id="global"),
]


@pytest.mark.parametrize(("edit", "path", "effect"), CLUSTER)
def test_edit_of_the_cluster(edit: Object, path: str, effect: str) -> None:
    found = plan(platform(), platform(edit))
    change = only(found)
    assert (change.effect, change.paths) == (effect, (path,))
    restarts = {"cluster_replaced": ALL, "redis_restarts": ("redis",)}
    assert found.restarts == restarts.get(effect, ())


@pytest.mark.parametrize(("edit", "path", "effect"), CLUSTER)
def test_one_machine_has_no_cluster_to_change(edit: Object, path: str, effect: str) -> None:
    change = only(plan(platform(), platform(edit), on_cluster=False))
    assert (change.effect, change.paths) == ("nothing", (path,))


JOINING: Object = {"gpuPools": {"spot": {"order": 5, "joins": "l4", "gpusPerWorker": 2}}}


def test_pool_that_joins_another_than_before_makes_a_new_cluster() -> None:
    elsewhere = deep_merge(JOINING, {"gpuPools": {"spot": {"joins": "h100"}}})
    change = only(plan(platform(JOINING), platform(elsewhere)))
    assert (change.effect, change.paths) == ("cluster_replaced", ("gpuPools.spot.joins",))


def test_pool_that_is_removed_makes_a_new_cluster() -> None:
    old = platform(model(pool="h100"))
    new = PlatformConfig.parse(
        {**VALUES, **platform_form(old, "models"), "gpuPools": {"h100": {"order": 3}}}
    )
    change = only(plan(old, new))
    assert (change.effect, change.paths) == ("cluster_replaced", ("gpuPools.l4",))
    assert "cannot be applied to a running cluster" in change.note


def platform_form(whole: PlatformConfig, section: str) -> Object:
    values = whole.model_dump(mode="json", by_alias=True)
    return {section: values[section]}


def test_what_a_running_cluster_keeps_comes_with_the_next_one() -> None:
    image = {"image": {"tag": "1.2.3"}}
    found = plan(
        platform(), platform(image, pool(maxWorkers=40), {"gpuPools": {"a100": {"order": 4}}})
    )
    assert {change.effect for change in found.changes} == {"cluster_replaced"}
    assert found.restarts == ALL


def test_without_a_strategy_the_running_cluster_stays() -> None:
    never = {"upgrade": {"strategy": "None"}}
    new = platform(never, {"image": {"tag": "1.2.3"}}, model(replicas={"max": 2}))
    found = plan(platform(never), new)
    assert {change.paths: change.effect for change in found.changes} == {
        ("models.one.replicas.max",): "in_place",
        ("image.tag",): "not_taken",
    }
    assert found.restarts == ()


def test_several_edits_at_once_are_told_apart() -> None:
    new = platform(
        model(replicas={"max": 2}, engine={"args": {"seed": 1, "dtype": "float16"}}),
        {
            "models": {
                "two": {"aliases": ["b"]},
                "three": {"id": "c", "engine": {"kind": "simulated"}},
            }
        },
        {"gateway": {"limits": {"onRedisError": "closed"}}},
        pool(maxWorkers=40),
    )
    found = plan(platform(), new)
    assert [(change.part, change.effect, change.paths) for change in found.changes] == [
        ("models.one", "reloads", ("models.one.engine.args.seed", "models.one.engine.args.dtype")),
        ("models.one", "in_place", ("models.one.replicas.max",)),
        ("models.two", "in_place", ("models.two.aliases",)),
        ("models.three", "application_added", ("models.three",)),
        ("gateway", "in_place", ("gateway.limits.onRedisError",)),
        ("gpuPools.l4", "not_taken", ("gpuPools.l4.maxWorkers",)),
    ]
    assert found.restarts == ("model-one",)


def test_defaults_are_edits_of_what_inherits_them() -> None:
    found = plan(platform(), platform({"modelDefaults": {"replicas": {"max": 2}}}))
    effects = {path: change.effect for change in found.changes for path in change.paths}
    assert effects == {
        "modelDefaults.replicas.max": "nothing",
        "models.one.replicas.max": "in_place",
        "models.two.replicas.max": "in_place",
        "models.off.replicas.max": "nothing",
    }


def test_bounds_on_connections_are_for_proxies_that_start_anew() -> None:
    old, new = platform(), platform({"gateway": {"connections": {"perSource": 100}}})
    for on_cluster, effect in ((True, "cluster_replaced"), (False, "not_taken")):
        change = only(plan(old, new, on_cluster=on_cluster))
        assert (change.effect, change.paths) == (effect, ("gateway.connections.perSource",))


def test_one_machine_keeps_the_redis_that_it_was_started_with() -> None:
    elsewhere = {"redis": {"embedded": False, "external": {"address": "redis:6379"}}}
    change = only(plan(platform(), platform(elsewhere), on_cluster=False))
    assert (change.effect, change.paths) == (
        "not_taken",
        ("redis.embedded", "redis.external.address"),
    )
    assert only(plan(platform(), platform(elsewhere))).effect == "cluster_replaced"


def test_one_machine_that_asks_no_hub_does_not_begin_to() -> None:
    local = PlatformConfig.parse({"models": {"a": {"id": "a", "source": "demo://a"}}})
    hub = {
        "models": {"a": {"id": "a", "source": "demo://a"}, "b": {"id": "b", "source": "hf://b/b"}}
    }
    change = only(plan(local, PlatformConfig.parse(hub), on_cluster=False))
    assert (change.effect, change.paths) == ("not_taken", ("models.b",))
    moved = PlatformConfig.parse({"models": {"a": {"id": "a", "source": "hf://b/b"}}})
    assert only(plan(local, moved, on_cluster=False)).effect == "not_taken"


REPLICAS = st.tuples(st.integers(0, 3), st.integers(1, 3)).map(
    lambda bounds: {"min": min(bounds), "max": max(bounds)}
)


SCALING = st.fixed_dictionaries(
    {},
    optional={
        "targetOngoingRequests": st.floats(0.5, 99),
        "maxOngoingRequests": st.integers(1, 99),
        "maxQueuedRequests": st.integers(1, 99),
        "downscaleDelaySeconds": st.integers(0, 99),
        "coldStartDeadlineSeconds": st.integers(1, 99),
    },
)


LIMITS = st.fixed_dictionaries(
    {}, optional={"requestsPerMinute": st.integers(0, 9), "tokenBudget": st.integers(0, 9)}
)


NUMBERS = st.fixed_dictionaries(
    {
        "models": st.fixed_dictionaries(
            {name: st.fixed_dictionaries({}, optional={"replicas": REPLICAS, "scaling": SCALING}) for name in ("one", "two")}
        ),
        "gateway": st.fixed_dictionaries(
            {}, optional={"replicas": REPLICAS, "limits": st.fixed_dictionaries({"default": LIMITS})}
        ),
    }
)  # fmt: skip


def fits(edits: list[Object]) -> bool:
    try:
        platform(*edits)
    except ConfigError:
        return False
    return True


EDITS = st.lists(
    st.one_of(
        NUMBERS,
        *(st.just(case.values[0]) for case in [*IN_PLACE, *RELOADING, *CLUSTER]),
    ),
    max_size=4,
).filter(fits)


@given(EDITS)
@settings(deadline=None)
def test_no_edit_is_no_plan(edits: list[Object]) -> None:
    for on_cluster in (True, False):
        assert plan(platform(*edits), platform(*edits), on_cluster=on_cluster).changes == ()


@given(NUMBERS, NUMBERS)
@settings(deadline=None)
def test_edit_of_numbers_restarts_nothing(before: Object, after: Object) -> None:
    for on_cluster in (True, False):
        found = plan(platform(before), platform(after), on_cluster=on_cluster)
        assert {change.effect for change in found.changes} <= {"in_place"}
        assert found.restarts == ()


@given(EDITS, EDITS)
@settings(deadline=None)
def test_every_edit_is_in_the_plan_once(before: list[Object], after: list[Object]) -> None:
    old, new = platform(*before), platform(*after)
    found = plan(old, new)
    paths = [path for change in found.changes for path in change.paths]
    assert len(set(paths)) == len(paths)
    assert bool(paths) == (old != new)

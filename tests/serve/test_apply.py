"""Edits of a running platform's values: what `tera plan` says restarts does, and nothing else."""

import json
from functools import partial
from typing import Any

import psutil
import pytest
import yaml
from tests.serve.conftest import Platform, until

pytestmark = pytest.mark.slow

Object = dict[str, Any]
Pids = dict[str, set[int]]


def model(name: str, **values: Any) -> Object:
    return {"id": f"sim/{name}", "engine": {"kind": "simulated"}, **values}


BASE: Object = {"models": {name: model(name) for name in ("one", "two")}}


def edited(**models: Object | None) -> Object:
    """Return the base with models changed, added, or left out by None."""
    merged = {**BASE["models"], **models}
    return {"models": {name: values for name, values in merged.items() if values is not None}}


SCALED = {"replicas": {"min": 2, "max": 3}, "scaling": {"maxOngoingRequests": 9}}
SEEDED = {"engine": {"kind": "simulated", "args": {"profile": {"decode_step_s": 0.002}}}}
LIMITED = {
    "gateway": {"limits": {"default": {"requestsPerMinute": 500}}, "cors": {"origins": ["*"]}}
}

# Each from the one before it.
EDITS: list[tuple[str, Object, list[str]]] = [
    (
        "replicas, scaling, id, aliases, limits and CORS",
        {**edited(one=model("renamed", aliases=["default"], **SCALED)), **LIMITED},
        [],
    ),
    (
        "engine.args beside fewer replicas",
        edited(one=model("one", **SEEDED), two=model("two", **SCALED)),
        ["model-one"],
    ),
    (
        "a model added and one removed",
        edited(one=None, two=model("two", **SCALED), three=model("three")),
        [],
    ),
    (
        "all at once",
        {**edited(one=model("one"), two=model("two", **SEEDED), three=None), **LIMITED},
        ["model-two"],
    ),
]


def pids(platform: Platform) -> Pids:
    """Return the process ids of each application's replicas, of those that stay."""
    status = platform.status()
    found = {f"model-{each['name']}": each["replicas"] for each in status["models"]}
    found["gateway"] = status["gateway"]
    return {
        name: {replica["pid"] for replica in replicas if not replica.get("draining")}
        for name, replicas in found.items()
    }


def settled(platform: Platform, values: Object) -> Pids:
    """Return the process ids once there are as many replicas as the values want."""
    wanted = {
        f"model-{name}": each.get("replicas", {}).get("min", 1)
        for name, each in values["models"].items()
    }
    found: Pids = {}

    def as_wanted() -> bool:
        found.clear()
        found.update(pids(platform))
        counts = {name: len(each) for name, each in found.items() if None not in each}
        # Serve takes replicas away when it sees no load for a while; not here to be waited for.
        return counts.keys() == {*wanted, "gateway"} and all(
            counts[name] >= least for name, least in wanted.items()
        )

    until(as_wanted, timeout_s=90)
    return found


def restarted(before: Pids, after: Pids) -> set[str]:
    """Return the applications that no process has outlived."""
    return {name for name in before.keys() & after.keys() if not before[name] & after[name]}


def ended(pids: set[int]) -> bool:
    return not any(map(psutil.pid_exists, pids))


def write(platform: Platform, values: Object) -> str:
    file = platform.home.parent / "edited.yaml"
    file.write_text(yaml.safe_dump(values, sort_keys=False))
    return str(file)


def planned(platform: Platform, file: str) -> Object:
    done = platform.tera("plan", "-f", file, "--json")
    assert done.returncode == 0, done.stderr
    found: Object = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def platform(operated: Platform) -> Platform:
    operated.become(yaml.safe_dump(BASE))
    return operated


def test_edit_restarts_what_the_plan_says_and_nothing_else(platform: Platform) -> None:
    before = settled(platform, BASE)
    for name, values, expected in EDITS:
        file = write(platform, values)
        found = planned(platform, file)
        assert found["target"] == "machine"
        assert found["changes"], name
        assert found["restarts"] == expected, name
        applied = platform.tera("apply", "-f", file)
        assert applied.returncode == 0, applied.stderr

        after = settled(platform, values)
        assert restarted(before, after) == set(expected), (name, before, after)
        # Whoever stays in the plan stays whole: replicas come beside others or go, none is swapped.
        for application in (before.keys() & after.keys()) - set(expected):
            old, new = before[application], after[application]
            assert old <= new or new <= old, (name, application, old, new)
        for gone in before.keys() - after.keys():
            until(partial(ended, before[gone]), timeout_s=60)
        assert planned(platform, file)["changes"] == [], name
        before = after

        with platform.http() as http:
            served = [each["id"] for each in http.get("/v1/models").json()["data"]]
            assert served == [each["id"] for each in values["models"].values()], name
            for each in served:
                asked = {"model": each, "prompt": "Once", "max_tokens": 3}
                assert http.post("/v1/completions", json=asked).status_code == 200, (name, each)


def cached_tokens(platform: Platform, key: str, prompt: str) -> int:
    asked = {"model": "sim/one", "prompt": prompt, "max_tokens": 1}
    with platform.http(key) as http:
        usage = http.post("/v1/completions", json=asked).raise_for_status().json()["usage"]
    found: int = usage["prompt_tokens_details"]["cached_tokens"]
    return found


def test_b8_an_edit_says_who_shares_the_prefix_cache_and_restarts_nothing(
    platform: Platform,
) -> None:
    made = platform.tera("keys", "create", "--tenant", "stranger", "--json")
    stranger = json.loads(made.stdout)["key"]
    before: Pids = {}  # the edits before this one are another test's
    for sharing, shared in (("key", False), ("model", True), ("tenant", False)):
        values = edited(one=model("one", cacheSharing=sharing))
        applied = platform.tera("apply", "-f", write(platform, values))
        assert applied.returncode == 0, applied.stderr
        after = settled(platform, values)
        assert restarted(before, after) == set()
        before = after
        secret = f"{sharing}: {'Once upon a time ' * 20}"
        assert cached_tokens(platform, platform.api_key, secret) == 0
        assert cached_tokens(platform, platform.api_key, secret) > 0
        assert (cached_tokens(platform, stranger, secret) > 0) is shared


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        pytest.param(
            edited(one=model("one", replica=2)), "models.one.replica: unknown key", id="unknown key"
        ),
        pytest.param(
            edited(one=model("two")), "models.two: models.one answers to 'sim/two' too", id="id"
        ),
        pytest.param(
            {**BASE, "redis": {"embedded": False, "external": {"address": "redis:6379"}}},
            "redis.embedded: stop `tera serve`",
            id="Redis",
        ),
        pytest.param(
            edited(three={"id": "hub/three", "source": "hf://hub/three"}),
            "models.three: it started without a model from a hub",
            id="hub",
        ),
    ],
)
def test_values_that_it_cannot_take_change_nothing(
    platform: Platform, values: Object, complaint: str
) -> None:
    before = pids(platform)
    refused = platform.tera("apply", "-f", write(platform, values))
    assert refused.returncode == 2
    assert complaint in refused.stderr
    assert refused.stdout == ""
    assert pids(platform) == before

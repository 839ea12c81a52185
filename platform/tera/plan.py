"""Predicts what an edit of the values does.

Whether an application restarts is found by comparing what `manifest` renders from both values. For
everything else the chart renders, there is a table here, which a test checks against the chart.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from tera.config.names import GATEWAY_APPLICATION, application_name
from tera.config.platform import PlatformConfig
from tera.manifest import applications

Effect = Literal[
    "in_place",
    "reloads",
    "application_added",
    "application_removed",
    "group_appended",
    "cluster_replaced",
    "redis_restarts",
    "objects",
    "not_taken",
    "nothing",
]

Path = tuple[str, ...]

# What Serve applies in place; an application that differs elsewhere is rolled. Of the autoscaling
# section these are the numbers, not the policy.
_IN_PLACE: Final = {
    "max_ongoing_requests",
    "user_config",
    "health_check_period_s",
    "health_check_timeout_s",
    "graceful_shutdown_timeout_s",
}

REDIS: Final = "redis"
"""Stands in `restarts` for the Valkeys of the chart, which are not applications."""

_REFUSED: Final = "Kubernetes refuses it, and with it the whole upgrade: create a new volume"
_MUTED: Final = "kuberay#4568: a running cluster keeps what it has; the next new one gets it"
_RESTART: Final = "stop `tera serve` and start it with these values"
_OFFLINE: Final = f"it started without a model from a hub, so its processes use none: {_RESTART}"
_REMADE: Final = "it cannot be applied to a running cluster; a new one must take over"
_WAITS: Final = (
    "upgrade.strategy is None: the running cluster stays as it is until its RayCluster is deleted"
)

# Effects of what is neither a model, a pool nor the gateway's own; the longest path that matches
# applies.
_CLUSTER_EFFECTS: Final[dict[Path, tuple[Effect, str]]] = {
    ("image",): ("cluster_replaced", ""),
    ("imagePullSecrets",): ("cluster_replaced", ""),
    ("rayVersion",): ("cluster_replaced", ""),
    ("rayAuth",): ("cluster_replaced", ""),
    ("head",): ("cluster_replaced", ""),
    ("head", "pod", "tolerations"): ("not_taken", _MUTED),
    ("trust",): ("cluster_replaced", ""),
    ("global", "imageRegistry"): ("cluster_replaced", ""),
    ("global", "imagePullSecrets"): ("cluster_replaced", ""),
    ("gateway", "resources"): ("cluster_replaced", ""),
    ("gateway", "connections"): ("cluster_replaced", ""),
    ("gateway", "pod"): ("cluster_replaced", ""),
    ("gateway", "pod", "tolerations"): ("not_taken", _MUTED),
    ("gateway", "pod", "serviceAccount", "annotations"): ("objects", ""),
    ("gateway", "auth", "existingSecret"): ("cluster_replaced", ""),
    ("gateway", "auth"): ("nothing", "the first key is made when the release is installed"),
    ("redis",): ("cluster_replaced", ""),
    ("redis", "image"): ("redis_restarts", ""),
    ("redis", "pod"): ("redis_restarts", ""),
    ("redis", "storage"): ("objects", ""),
    ("gcsFaultTolerance",): ("cluster_replaced", ""),
    ("gcsFaultTolerance", "storage"): ("objects", ""),
    ("huggingface",): ("cluster_replaced", ""),
    ("objectStore",): ("cluster_replaced", ""),
    ("modelCache",): ("cluster_replaced", ""),
    ("modelCache", "size"): ("objects", "if the storage class lets a volume grow"),
    ("modelCache", "storageClassName"): ("objects", ""),
    ("modelCache", "prefetch"): ("objects", ""),
    ("modelCache", "pod"): ("objects", ""),
    ("upgrade",): ("in_place", "for the next new cluster"),
    ("ingress",): ("objects", ""),
    ("httpRoute",): ("objects", ""),
    ("networkPolicy",): ("objects", ""),
    ("pdb",): ("objects", ""),
    ("observability",): ("objects", ""),
    ("modelDefaults",): ("nothing", "by itself; what inherits it is listed"),
    ("poolDefaults",): ("nothing", "by itself; what inherits it is listed"),
}
_FIXED: Final = {
    ("redis", "storage"),
    ("gcsFaultTolerance", "storage"),
    ("modelCache", "storageClassName"),
    ("modelCache", "accessMode"),
}
"""Settings of volumes that cannot change once the release has created them."""

_MACHINE_EFFECTS: Final[dict[Path, tuple[Effect, str]]] = {
    ("gateway", "connections"): ("not_taken", _RESTART),
    ("modelDefaults",): _CLUSTER_EFFECTS["modelDefaults",],
    ("redis", "embedded"): ("not_taken", _RESTART),
    ("redis", "external", "address"): ("not_taken", _RESTART),
    ("redis", "external", "tls"): ("not_taken", _RESTART),
}
_NOT_THROUGH_SERVE: Final = ("resources", "auth", "connections", "pod")
"""Sections of `gateway` that Serve does not get."""
_MUTED_FIELDS: Final = ("maxWorkers", "tolerations")
"""Fields of a pool that KubeRay ignores when it compares clusters."""


@dataclass(frozen=True)
class Change:
    """Edits of one part of the platform that have the same effect."""

    part: str
    """The application, pool or section, by its path."""
    paths: tuple[str, ...]
    effect: Effect
    restarts: tuple[str, ...] = ()
    """Names of applications that run before the edit, and `redis`."""
    note: str = ""


@dataclass(frozen=True)
class Plan:
    """What an edit does, part by part."""

    on_cluster: bool
    changes: tuple[Change, ...] = ()

    @property
    def restarts(self) -> tuple[str, ...]:
        """Everything that restarts, without duplicates."""
        return tuple(dict.fromkeys(name for each in self.changes for name in each.restarts))

    @property
    def replaces_cluster(self) -> bool:
        """Whether a new cluster takes over from the running one."""
        return any(each.effect == "cluster_replaced" for each in self.changes)


@dataclass(frozen=True)
class _Edit:
    """Two platforms side by side."""

    old: PlatformConfig
    new: PlatformConfig
    on_cluster: bool
    paths: tuple[Path, ...]
    """Paths of all values that differ."""

    def below(self, *prefix: str) -> list[Path]:
        return [path for path in self.paths if path[: len(prefix)] == prefix]


def plan(old: PlatformConfig, new: PlatformConfig, *, on_cluster: bool = True) -> Plan:
    """Return what changing a running platform from `old` to `new` does.

    On a cluster the change is made by `helm upgrade`, on one machine by `tera apply`.
    """
    paths = tuple(_differences(old.file_form(), new.file_form()))
    edit = _Edit(old, new, on_cluster, paths)
    changes = [*_models(edit), *_gateway(edit)]
    if on_cluster:
        changes += _settled([*_pools(edit), *_sections(edit)], edit)
    else:
        changes += _sections(edit)
    return Plan(on_cluster, tuple(changes))


def _differences(old: Any, new: Any, at: Path = ()) -> Iterator[Path]:
    """Yield the path of each value that differs, or exists on one side only."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in {**old, **new}:
            if key not in old or key not in new:
                yield (*at, key)
            else:
                yield from _differences(old[key], new[key], (*at, key))
    elif _text(old) != _text(new):
        yield at


def _text(value: Any) -> str:
    """Return a value as text, as Serve compares it: True is not 1, and key order is ignored."""
    return json.dumps(value, sort_keys=True)


def _change(
    part: str,
    paths: list[Path],
    effect: Effect,
    restarts: tuple[str, ...] = (),
    note: str = "",
) -> Change:
    return Change(part, tuple(".".join(path) for path in paths), effect, restarts, note)


def _models(edit: _Edit) -> Iterator[Change]:
    before, after = edit.old.deployed_models(), edit.new.deployed_models()
    for name in {**edit.old.models, **edit.new.models}:
        paths, part = edit.below("models", name), f"models.{name}"
        if not paths:
            continue
        if name in before and name in after:
            yield from _deployed_model(edit, name, paths)
        elif name in after and _lacks_hub(edit, name):
            yield _change(part, paths, "not_taken", note=_OFFLINE)
        elif name in after:
            yield _change(part, paths, "application_added")
        elif name in before:
            yield _change(part, paths, "application_removed")
        else:
            yield _change(part, paths, "nothing", note="it is not deployed")


def _deployed_model(edit: _Edit, name: str, paths: list[Path]) -> Iterator[Change]:
    old, new = edit.old.models[name], edit.new.models[name]

    def rolls(field_name: str) -> bool:
        variant = old.model_copy(update={field_name: getattr(new, field_name)})
        models = {**edit.old.models, name: variant}
        return bool(_rolled(edit, edit.old.model_copy(update={"models": models})))

    aliases = {info.alias or key: key for key, info in type(old).model_fields.items()}
    rolling = {alias for alias in dict.fromkeys(path[2] for path in paths) if rolls(aliases[alias])}
    part = f"models.{name}"
    if rolling:
        reloading = [path for path in paths if path[2] in rolling]
        if _lacks_hub(edit, name):
            yield _change(part, reloading, "not_taken", note=_OFFLINE)
        else:
            yield _change(part, reloading, "reloads", (application_name(name),))
    in_place = [path for path in paths if path[2] not in rolling]
    if in_place:
        yield _change(part, in_place, "in_place")


def _lacks_hub(edit: _Edit, name: str) -> bool:
    """Return whether a model needs the hub but this machine's processes run offline."""
    return (
        not edit.on_cluster
        and edit.new.models[name].needs_hub
        and not any(model.needs_hub for model in edit.old.deployed_models().values())
    )


def _rolled(edit: _Edit, changed: PlatformConfig) -> tuple[str, ...]:
    """Return the applications that Serve restarts to apply `changed`."""
    before, after = (applications(each, on_cluster=edit.on_cluster) for each in (edit.old, changed))
    return tuple(
        name
        for name, application in before.items()
        if name in after and _rolling_part(application) != _rolling_part(after[name])
    )


def _rolling_part(application: Mapping[str, Any]) -> str:
    part = {
        **application,
        "deployments": [
            {
                **{key: value for key, value in each.items() if key not in _IN_PLACE},
                "autoscaling_config": each["autoscaling_config"].get("policy"),
            }
            for each in application["deployments"]
        ],
    }
    return _text(part)


def _gateway(edit: _Edit) -> Iterator[Change]:
    paths = [path for path in edit.below("gateway") if path[1] not in _NOT_THROUGH_SERVE]
    if not paths:
        return
    changed = edit.old.model_copy(update={"gateway": edit.new.gateway})
    rolled = _rolled(edit, changed)
    yield _change("gateway", paths, "reloads" if rolled else "in_place", rolled)


def _pools(edit: _Edit) -> Iterator[Change]:
    before, after = (
        sorted(platform.gpu_pools, key=lambda name: platform.gpu_pools[name].order)
        for platform in (edit.old, edit.new)
    )
    # KubeRay accepts new groups after the existing ones; any other change makes a new cluster.
    grown = after[: len(before)] == before
    for name in {**edit.old.gpu_pools, **edit.new.gpu_pools}:
        paths, part = edit.below("gpuPools", name), f"gpuPools.{name}"
        if not paths:
            continue
        if name not in before and grown:
            yield _change(part, paths, "group_appended")
            continue
        if name not in before or name not in after:
            yield _change(part, paths, "cluster_replaced", note=_REMADE)
            continue
        kinds: dict[tuple[Effect, str], list[Path]] = {}
        for path in paths:
            kinds.setdefault(_pool_effect(path[2:], grown), []).append(path)
        for (effect, note), alike in kinds.items():
            yield _change(part, alike, effect, note=note)


def _pool_effect(path: Path, grown: bool) -> tuple[Effect, str]:
    if path[0] in _MUTED_FIELDS or path[:2] == ("pod", "tolerations"):
        return "not_taken", _MUTED
    if path[:3] == ("pod", "serviceAccount", "annotations"):
        return "objects", ""
    if path[0] == "order":
        return ("nothing", "the order stays") if grown else ("cluster_replaced", _REMADE)
    return "cluster_replaced", ""


def _sections(edit: _Edit) -> Iterator[Change]:
    """Yield the changes of everything that is no model or pool and does not go through Serve."""
    heard = set(
        _differences(_heard(edit.old.file_form(), edit), _heard(edit.new.file_form(), edit))
        if edit.on_cluster
        else edit.paths
    )
    effects = _CLUSTER_EFFECTS if edit.on_cluster else _MACHINE_EFFECTS
    kinds: dict[tuple[str, Effect, str], list[Path]] = {}
    for path in edit.paths:
        if path[0] == "models" or (path[0] == "gpuPools" and edit.on_cluster):
            continue
        if path[0] == "gateway" and path[1] not in _NOT_THROUGH_SERVE:
            continue
        effect, note = (
            _effect_of(path, effects, edit)
            if any(path[: len(each)] == each for each in heard)
            else ("nothing", "")
        )
        kinds.setdefault((path[0], effect, note), []).append(path)
    for (part, effect, note), alike in kinds.items():
        restarts = (REDIS,) if effect == "redis_restarts" else ()
        yield _change(part, alike, effect, restarts, note)


def _effect_of(
    path: Path, effects: Mapping[Path, tuple[Effect, str]], edit: _Edit
) -> tuple[Effect, str]:
    fitting = [prefix for prefix in effects if path[: len(prefix)] == prefix]
    if not fitting:
        return "nothing", "" if edit.on_cluster else "only a cluster has it"
    if edit.on_cluster and path in _FIXED and _volume_stays(path[0], edit):
        return "not_taken", _REFUSED
    return effects[max(fitting, key=len)]


def _volume_stays(section: str, edit: _Edit) -> bool:
    """Return whether the release has the section's volume both before and after."""
    sides = (edit.old, edit.new)
    if section == "redis":
        return all(each.redis.embedded for each in sides)
    if section == "gcsFaultTolerance":
        return all(each.gcs_fault_tolerance.embedded for each in sides)
    caches = [each.model_cache for each in sides]
    return all(cache.enabled and not cache.existing_claim for cache in caches)


def _heard(values: dict[str, Any], edit: _Edit) -> dict[str, Any]:
    """Return values without those that the chart ignores because of other values."""
    for section in (
        "gcsFaultTolerance",
        "modelCache",
        "ingress",
        "httpRoute",
        "networkPolicy",
        "pdb",
    ):
        if not values[section]["enabled"]:
            values[section] = {"enabled": False}
    _drop_unread_of_redis(values)
    if values["image"]["digest"]:
        del values["image"]["tag"]
    if values["modelCache"].get("existingClaim"):
        del values["modelCache"]["size"], values["modelCache"]["storageClassName"]
    if not values["observability"]["podMonitor"]:
        values["networkPolicy"].pop("monitoringNamespace", None)
    return values


def _drop_unread_of_redis(values: dict[str, Any]) -> None:
    redis, gcs = values["redis"], values["gcsFaultTolerance"]
    for unread in ("external",) if redis["embedded"] else ("storage",):
        del redis[unread]
    if not redis["embedded"] and (not gcs["enabled"] or gcs["address"]):
        del redis["image"]
    if gcs.get("address"):
        del gcs["storage"]
    for reference in (
        values["huggingface"],
        gcs,
        redis.get("external", {}),
    ):
        if not reference.get("existingSecret"):
            reference.pop("secretKey", None)


def _settled(changes: list[Change], edit: _Edit) -> list[Change]:
    """Return a cluster's changes, adjusted for how they affect each other.

    A new cluster gets all the new values; without one, changes that need it do not happen.
    """
    if not any(each.effect == "cluster_replaced" for each in changes):
        return changes
    if edit.new.upgrade.strategy == "None":
        return [
            _with(each, "not_taken", note=_WAITS)
            if each.effect in ("cluster_replaced", "group_appended")
            else each
            for each in changes
        ]
    running = (
        *(application_name(name) for name in edit.old.deployed_models()),
        GATEWAY_APPLICATION,
    )
    return [
        _with(each, "cluster_replaced", running, "" if each.note == _MUTED else each.note)
        if each.effect in ("cluster_replaced", "group_appended") or each.note == _MUTED
        else each
        for each in changes
    ]


def _with(change: Change, effect: Effect, restarts: tuple[str, ...] = (), note: str = "") -> Change:
    return Change(change.part, change.paths, effect, restarts, note)

"""Values and edits of them, for plans."""

from typing import Any

from tera.config.merge import deep_merge
from tera.config.platform import PlatformConfig
from tera.plan import Change, Plan

Object = dict[str, Any]


VALUES: Object = {
    "models": {
        "one": {"id": "org/one", "source": "hf://org/one", "pool": "l4"},
        "two": {"id": "org/two", "source": "hf://org/two", "pool": "h100"},
        "off": {
            "id": "org/off",
            "enabled": False,
            "engine": {"kind": "simulated"},
        },
    },
    "gpuPools": {"l4": {"order": 1, "gpusPerWorker": 2}, "h100": {"order": 3}},
    "modelCache": {"enabled": True},
}


def platform(*edits: Object) -> PlatformConfig:
    values: Object = VALUES
    for edit in edits:
        values = deep_merge(values, edit)
    return PlatformConfig.parse(values)


def without(section: str, name: str) -> PlatformConfig:
    """Return the platform without one of its models or pools."""
    rest = {key: value for key, value in VALUES[section].items() if key != name}
    return PlatformConfig.parse({**VALUES, section: rest})


def model(**values: Any) -> Object:
    return {"models": {"one": values}}


def pool(**values: Any) -> Object:
    return {"gpuPools": {"l4": values}}


def only(found: Plan) -> Change:
    (change,) = found.changes
    return change

"""Merges values the way Helm does."""

from collections.abc import Mapping
from typing import Any


def deep_merge(defaults: Mapping[str, Any], values: Any) -> Any:
    """Return `defaults` overridden by `values`; only mappings merge, anything else is replaced."""
    if not isinstance(values, Mapping):
        return values
    merged = dict(defaults)
    for key, value in values.items():
        below = merged.get(key)
        merged[key] = deep_merge(below, value) if isinstance(below, Mapping) else value
    return merged

"""How values go over others, as Helm has it."""

from collections.abc import Mapping
from typing import Any


def deep_merge(defaults: Mapping[str, Any], values: Any) -> Any:
    """Return `values` over `defaults`; anything but two mappings is replaced whole."""
    if not isinstance(values, Mapping):
        return values
    merged = dict(defaults)
    for key, value in values.items():
        below = merged.get(key)
        merged[key] = deep_merge(below, value) if isinstance(below, Mapping) else value
    return merged

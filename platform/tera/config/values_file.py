"""Reads values files, as Helm does: each over those before it, and over the chart's defaults."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from tera.config.merge import deep_merge
from tera.config.platform import PlatformConfig
from tera.config.yaml_file import read_yaml
from tera.errors import ConfigError

_HELM_HEADINGS: Final = ("COMPUTED VALUES", "USER-SUPPLIED VALUES")
"""First lines of what `helm get values` prints, unless it is asked for YAML."""


def load_platform(*paths: Path) -> PlatformConfig:
    """Read values files, each over those before it, as Helm merges them.

    Raises:
        ConfigError: one line for each fault, each beginning with the path of the value.
    """
    return PlatformConfig.parse(_merged(paths))


def load_cluster_platform(*paths: Path) -> PlatformConfig:
    """Read values files as Helm does: over the chart's defaults, which are for a cluster.

    Raises:
        ConfigError: one line for each fault, each beginning with the path of the value.
    """
    return PlatformConfig.parse(_merged((_values_file("values.yaml"), *paths)))


def default_values_file() -> Path:
    """Return the values of the demo platform, from a checkout or from an installed package."""
    return _values_file("values-local.yaml")


def _values_file(name: str) -> Path:
    package = Path(__file__).resolve().parents[1]
    installed = package / name
    return installed if installed.exists() else package.parents[1] / "helm/tera" / name


def _merged(paths: Iterable[Path]) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for path in paths:
        values = read_yaml(path)
        if values is None:
            continue
        if not isinstance(values, Mapping):
            raise ConfigError(f"{path}: values: must be a map, such as models: {{}}")
        helm = {key for key in _HELM_HEADINGS if key in values and values[key] is None}
        merged = deep_merge(
            merged, {key: value for key, value in values.items() if key not in helm}
        )
    return merged

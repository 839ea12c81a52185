"""Reads values files as Helm does: later files override earlier ones and the chart's defaults."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from tera.config.merge import deep_merge
from tera.config.platform import PlatformConfig
from tera.config.yaml_file import read_yaml
from tera.errors import ConfigError

_HELM_HEADINGS: Final = ("COMPUTED VALUES", "USER-SUPPLIED VALUES")
"""First lines of the output of `helm get values`, unless `--output yaml` is given."""


def load_platform(*paths: Path) -> PlatformConfig:
    """Read values files and merge them as Helm does: later files override earlier ones.

    Raises:
        ConfigError: one line per fault, each beginning with the path of the value.
    """
    return PlatformConfig.parse(_merged(paths))


def load_cluster_platform(*paths: Path) -> PlatformConfig:
    """Read values files as Helm does for a cluster: on top of the chart's defaults.

    Raises:
        ConfigError: one line per fault, each beginning with the path of the value.
    """
    return PlatformConfig.parse(_merged((_values_file("values.yaml"), *paths)))


def default_values_file() -> Path:
    """Return the demo platform's values file, from a checkout or an installed package."""
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

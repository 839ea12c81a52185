"""`tera config`: check and render a values file."""

import sys

import typer
import yaml

from tera.cli.console import ValuesFiles, out, reported
from tera.cli.reference import configuration_page
from tera.config.values_file import load_cluster_platform, load_platform
from tera.manifest import cluster_serve_config, values_schema

group = typer.Typer(no_args_is_help=True, help="Check and render a values file.")


@group.command()
def check(file: ValuesFiles) -> None:
    """Check a values file and report every fault in it."""
    with reported():
        platform = load_platform(*file)
    names = ", ".join(map(str, file))
    out.print(f"{names}: valid; {len(platform.deployed_models())} model(s) to deploy")


@group.command()
def render(file: ValuesFiles) -> None:
    """Print the Ray Serve config that a cluster gets from a values file and the chart's defaults.

    `tera serve` uses neither the chart's defaults nor GPU pools, so its config differs.
    """
    with reported():
        config = cluster_serve_config(load_cluster_platform(*file))
    sys.stdout.write(yaml.dump(config, Dumper=_PlainDumper, sort_keys=False))


@group.command()
def schema() -> None:
    """Print the JSON Schema of a values file: the chart's values.schema.json."""
    sys.stdout.write(values_schema())


@group.command()
def docs() -> None:
    """Print every value with its type, default and meaning: docs/configuration.md."""
    sys.stdout.write(configuration_page())


class _PlainDumper(yaml.SafeDumper):
    """YAML without anchors: equal bundles are written out each time, for people to read."""

    def ignore_aliases(self, data: object) -> bool:
        return True

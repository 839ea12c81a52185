"""`tera config`: a values file, checked and rendered."""

import sys
from pathlib import Path
from typing import Annotated

import typer
import yaml

from tera.cli.console import out, reported
from tera.config import load_platform
from tera.manifest import serve_config

group = typer.Typer(no_args_is_help=True, help="Check and render a values file.")

File = Annotated[Path, typer.Option("-f", "--file")]


@group.command()
def check(file: File) -> None:
    """Say whether a values file is right, and where it is not."""
    with reported():
        platform = load_platform(file)
    out.print(f"{file}: fine; {len(platform.deployed_models())} model(s) to deploy")


@group.command()
def render(file: File) -> None:
    """Print the Ray Serve config of a values file."""
    with reported():
        platform = load_platform(file)
    sys.stdout.write(yaml.safe_dump(serve_config(platform), sort_keys=False))

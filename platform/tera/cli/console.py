"""What all commands share: printing, reporting errors and parsing durations."""

import json
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from tera.errors import ConfigError, TeraError

out = Console(soft_wrap=True)
err = Console(stderr=True, soft_wrap=True)

ValuesFiles = Annotated[
    list[Path],
    typer.Option("-f", "--file", help="A values.yaml. Repeat it to merge several; later ones win."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]

_LENGTH = re.compile(r"(\d+)([smhd])")
_UNIT_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}


@contextmanager
def reported() -> Iterator[None]:
    """Print a `TeraError` without a traceback, and exit with the code that fits it."""
    try:
        yield
    except TeraError as error:
        for line in error.message.splitlines():
            err.print("[red]error:[/] ", end="")
            err.print(line, markup=False, highlight=False)
        raise typer.Exit(2 if isinstance(error, ConfigError) else 1) from error


def seconds(option: str, length: str) -> float:
    """Return the seconds of a duration such as 30d, 12h, 15m or 60s.

    Raises:
        ConfigError: `length` is not such a duration.
    """
    match = _LENGTH.fullmatch(length)
    if match is None:
        raise ConfigError(f"{option} {length!r}: give a number and s, m, h or d, such as 30d")
    return int(match[1]) * _UNIT_S[match[2]]


def date(at_s: float | None) -> str:
    """Return a Unix time as people read it, in the local time zone; a dash for None."""
    return "–" if at_s is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(at_s))


def print_json(value: object) -> None:
    """Print a value as indented JSON, past Rich, which would wrap and colour it."""
    sys.stdout.write(json.dumps(value, indent=2) + "\n")

"""`tera plan` and `tera apply`: show what an edit of the values restarts, and apply it."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.markup import escape
from rich.table import Column, Table

from tera.cli.console import Json, ValuesFiles, out, print_json, reported
from tera.config.environment import Runtime
from tera.config.values_file import load_cluster_platform, load_platform
from tera.errors import ConfigError
from tera.local.state import LocalState
from tera.manifest import cluster_serve_config
from tera.plan import Change, Effect, Plan
from tera.plan import plan as planned

_WORDS: Final[dict[Effect, str]] = {
    "in_place": "applied in place",
    "reloads": "this model alone reloads",
    "application_added": "an application is added",
    "application_removed": "its application is removed",
    "group_appended": "a worker group is appended",
    "cluster_replaced": "a new cluster takes over",
    "redis_restarts": "Redis restarts; until it is back, limits work as in an outage",
    "objects": "other Kubernetes objects change",
    "not_taken": "not applied",
    "nothing": "nothing",
}

Against = Annotated[
    list[Path] | None,
    typer.Option(help="The values before the edit; default: those of the platform here."),
]


def plan(file: ValuesFiles, against: Against = None, as_json: Json = False) -> None:
    """Say what an edit of the values would restart."""
    with reported():
        found = _against_files(file, against) if against else _against_running(file)
    if as_json:
        print_json(_json(found))
    else:
        _show(found)


def apply(file: ValuesFiles) -> None:
    """Apply edited values to the platform on this machine, and wait until they are in force."""
    from tera.local.apply import apply as run
    from tera.local.apply import check_plan
    from tera.local.console import StageConsole

    with reported():
        new = load_platform(*file)
        home = Runtime.from_environment().home
        found = planned(LocalState.read(home).platform, new, on_cluster=False)
        check_plan(found)
        _show(found)
        if found.changes:
            asyncio.run(run(new, home, StageConsole(out)))


def _against_running(files: Sequence[Path]) -> Plan:
    new = load_platform(*files)
    try:
        old = LocalState.read(Runtime.from_environment().home).platform
    except ConfigError as error:
        raise ConfigError(
            f"{error.message} Or give the values before the edit with --against."
        ) from error
    return planned(old, new, on_cluster=False)


def _against_files(files: Sequence[Path], against: Sequence[Path]) -> Plan:
    """Plan for a cluster, or for one machine if the old values are not valid on a cluster."""
    try:
        old = load_cluster_platform(*against)
    except ConfigError as error:
        lines = error.message.splitlines()
        raise ConfigError("\n".join(f"--against: {line}" for line in lines)) from error
    try:
        cluster_serve_config(old)
    except ConfigError:  # the old values are for one machine, and so are the new ones
        return planned(load_platform(*against), load_platform(*files), on_cluster=False)
    new = load_cluster_platform(*files)
    cluster_serve_config(new)
    return planned(old, new)


def _json(found: Plan) -> dict[str, Any]:
    return {
        "target": "cluster" if found.on_cluster else "machine",
        "changes": [
            {
                "part": change.part,
                "paths": list(change.paths),
                "effect": change.effect,
                "restarts": list(change.restarts),
                "note": change.note,
            }
            for change in found.changes
        ],
        "restarts": list(found.restarts),
    }


def _show(found: Plan) -> None:
    if not found.changes:
        out.print("No value differs: nothing changes.")
        return
    # A narrow terminal must not cut a path.
    table = Table(Column("edit", overflow="fold"), "effect", "restarts")
    for change in found.changes:
        effect = _WORDS[change.effect] + (f" ({change.note})" if change.note else "")
        table.add_row(escape("\n".join(change.paths)), effect, _restarts(change))
    out.print(table)
    out.print(_sum(found))


def _restarts(change: Change) -> str:
    if change.effect == "cluster_replaced":
        return "all"
    return ", ".join(change.restarts) or "nothing"


def _sum(found: Plan) -> str:
    if found.replaces_cluster:
        return "Everything restarts: a new cluster takes over when it is ready."
    if not found.restarts:
        return "Nothing restarts."
    return f"Restarts: {', '.join(found.restarts)}; nothing else."

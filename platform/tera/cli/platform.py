"""`tera serve` and `tera status`: a platform on this machine."""

import asyncio
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from tera.cli.console import Json, out, print_json, reported
from tera.config.environment import Runtime, ServeOptions
from tera.config.values_file import default_values_file, load_platform
from tera.local.state import LocalState

_REPLICA_COLUMNS = ("replica_id", "pid", "running", "waiting")


def serve(
    file: Annotated[
        list[Path] | None,
        typer.Option(
            "-f",
            "--file",
            help="A values.yaml; later ones win. Default: the demo platform.",
        ),
    ] = None,
    port: Annotated[int | None, typer.Option(help="Default: TERA_PORT, or else 8000.")] = None,
    host: Annotated[str | None, typer.Option(help="Default: TERA_HOST, or else 127.0.0.1.")] = None,
) -> None:
    """Run a platform on this machine, in the foreground."""
    from tera.local.cluster import end_if_abandoned
    from tera.local.console import StageConsole
    from tera.local.serve import serve as run

    code = 1
    try:
        with reported():
            options = ServeOptions.from_environment()
            platform = load_platform(*(file or [default_values_file()]))
            home = Runtime.from_environment().home
            asyncio.run(
                run(platform, home, host or options.host, port or options.port, StageConsole(out))
            )
        code = 0
    except typer.Exit as end:
        code = end.exit_code
        raise
    finally:
        end_if_abandoned(code)


def status(as_json: Json = False) -> None:
    """Show the models, their replicas and their current load."""
    from tera.local.status import read_status

    with reported():
        found = read_status(LocalState.read(Runtime.from_environment().home))
    if as_json:
        print_json(found)
        return
    table = Table("model", "status", "replica", "pid", "running", "waiting", "state")
    for model in found["models"]:
        status = f"{model['status']}, {model['running']} of {model['wanted']}"
        if model["starting"]:
            status += f", {model['starting']} starting"
        for replica in model["replicas"] or [{}]:
            table.add_row(
                model["id"],
                status,
                *(str(replica.get(name, "–")) for name in _REPLICA_COLUMNS),
                _state(replica),
            )
    for replica in found["gateway"]:
        table.add_row("(gateway)", "ready", replica["replica_id"], str(replica["pid"]))
    out.print(table)
    for model in found["models"]:
        if model["failure"]:
            out.print(f"{model['id']}: {model['failure']}", markup=False)
    redis = found["redis"]
    out.print(f"redis {redis['state']} at {redis['address']}")


def _state(replica: dict[str, Any]) -> str:
    if not replica:
        return "–"
    if replica["draining"]:
        return "draining"
    if replica["running"] is None:
        return "silent"  # still starting, or not answering
    return "asleep" if replica["asleep"] else "awake"

"""`tera usage`: sum and export the usage ledger."""

import csv
import sys
import time
from dataclasses import asdict, astuple, fields
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from tera.cli.console import Json, out, print_json, reported, seconds
from tera.cli.store import with_redis
from tera.config.gateway import UsageConfig
from tera.errors import ConfigError, ServerError
from tera.tenancy.usage import UsageLedger, UsageRow, total_of
from tera.tenancy.usage_export import UsageExporter

group = typer.Typer(help="Sum and export the usage ledger.")


@group.callback(invoke_without_command=True)
def usage(
    context: typer.Context,
    tenant: Annotated[str | None, typer.Option(help="Only this tenant's usage.")] = None,
    since: Annotated[str, typer.Option(help="How far back, such as 30d, 12h or 15m.")] = "24h",
    as_json: Json = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
) -> None:
    """Sum requests and tokens by tenant, model and day (UTC)."""
    if context.invoked_subcommand is not None:
        return
    with reported():
        if as_json and as_csv:
            raise ConfigError("give --json or --csv, not both")
        since_s = time.time() - seconds("--since", since)
        rows = with_redis(lambda redis: UsageLedger(redis).summary(tenant, since_s=since_s))
    if as_json:
        print_json([asdict(row) for row in rows])
    elif as_csv:
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(field.name for field in fields(UsageRow))
        writer.writerows(astuple(row) for row in rows)
    else:
        out.print(_table(rows))


@group.command()
def export(
    directory: Annotated[Path, typer.Option(help="Where to write the files, one per hour.")],
    retention_days: Annotated[
        int, typer.Option(min=1, help="Exported records older than this leave Redis.")
    ] = 35,
) -> None:
    """Export once: write the records that are not exported yet to files."""
    config = UsageConfig(export_directory=str(directory.absolute()), retention_days=retention_days)
    with reported():
        try:
            written = with_redis(lambda redis: UsageExporter(redis, lambda: config).export())
        except OSError as error:
            raise ServerError(f"{directory}: cannot be written: {error}") from error
    out.print(f"{written} entries written to {directory}")


def _table(rows: list[UsageRow]) -> Table:
    table = Table(show_footer=True)
    total = total_of(rows)
    for field in fields(UsageRow):
        counted = field.type is int
        table.add_column(
            field.name.replace("_", " "),
            footer=f"{getattr(total, field.name):,}" if counted else "",
            justify="right" if counted else "left",
        )
    table.columns[0].footer = "total"
    for row in rows:
        table.add_row(*(f"{cell:,}" if isinstance(cell, int) else cell for cell in astuple(row)))
    return table

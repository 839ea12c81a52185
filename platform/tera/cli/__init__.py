"""The `tera` command.

Exit codes: 0 for success; 2 for wrong usage or configuration, where running the same command again
fails again; 1 for anything else, such as a port in use, an engine that does not start, or a Redis
that cannot be reached.
"""

import typer

from tera.cli import backup, config, keys, plan, platform, probe, tenants, usage

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Run and operate a Tera platform.",
    pretty_exceptions_enable=False,  # they print local variables, secrets among them
)
app.command()(platform.serve)
app.command()(platform.status)
app.command()(probe.probe)
app.command()(plan.plan)
app.command()(plan.apply)
app.command()(backup.backup)
app.command()(backup.restore)
app.add_typer(keys.group, name="keys")
app.add_typer(tenants.group, name="tenants")
app.add_typer(usage.group, name="usage")
app.add_typer(config.group, name="config")

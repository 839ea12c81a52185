"""`tera tenants`: tenants' limits, which take precedence over those of the values file."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from tera.cli.console import Json, err, out, print_json, reported
from tera.cli.limits import HEADINGS, Changed, ChangedPeriod, cells, changes, file_form
from tera.cli.store import with_tenants
from tera.config.environment import Runtime
from tera.config.limits import Limits, LimitsConfig, TenantLimits
from tera.config.values_file import load_platform
from tera.errors import ConfigError
from tera.local.state import LocalState
from tera.tenancy.keys import require_tenant
from tera.tenancy.tenants import effective_limits

group = typer.Typer(no_args_is_help=True, help="Set, show and remove tenants' limits.")


@group.command("set")
def set_limits(
    tenant: str,
    requests_per_minute: Changed = None,
    tokens_per_minute: Changed = None,
    concurrent_requests: Changed = None,
    token_budget: Changed = None,
    budget_period: ChangedPeriod = None,
    weight: Annotated[
        str | None,
        typer.Option(metavar="N|none", help="Share of replicas while requests queue, 1 to 100."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="A model's short name, to limit that model alone.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Set limits. Those not given stay; `none` returns one to the values file's limit."""
    with reported():
        changed = changes(
            {
                "requests_per_minute": requests_per_minute,
                "tokens_per_minute": tokens_per_minute,
                "concurrent_requests": concurrent_requests,
                "token_budget": token_budget,
                "budget_period": budget_period,
                "weight": weight,
            }
        )

        def change(known: TenantLimits) -> TenantLimits:
            if model is None:
                return known.model_copy(update=changed)
            if "weight" in changed:
                raise ConfigError(
                    "--weight applies to all of a tenant's models; leave --model out."
                )
            limits = known.models.get(model, Limits()).model_copy(update=changed)
            models = {**known.models, model: limits}
            kept = {name: one for name, one in models.items() if one != Limits()}
            return known.model_copy(update={"models": kept})

        stored = with_tenants(lambda store: store.edit(tenant, change))
    if as_json:
        print_json({"tenant": tenant, "stored": file_form(stored)})
        return
    out.print(_table({tenant: stored}))


@group.command("list")
def list_tenants(as_json: Json = False) -> None:
    """List the tenants with limits set by `tera tenants set`, and those limits."""
    with reported():
        stored = with_tenants(lambda store: store.list())
    if as_json:
        print_json(
            [{"tenant": tenant, "stored": file_form(limits)} for tenant, limits in stored.items()]
        )
        return
    out.print(_table(stored))


@group.command()
def show(
    tenant: str,
    file: Annotated[
        Path | None, typer.Option("-f", "--file", help="The platform's values.yaml.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show a tenant's limits: set by command, from the values, and those in force.

    The values are those of --file, or of the platform that runs here.
    """
    with reported():
        require_tenant(tenant)
        values = _values(file)
        stored = with_tenants(lambda store: store.get(tenant))
    in_values = default = effective = None
    if values is not None:
        in_values, default = values.tenants.get(tenant), values.default
        effective = effective_limits(default, in_values, stored)
    if as_json:
        print_json(
            {
                "tenant": tenant,
                "stored": file_form(stored),
                "values": file_form(in_values),
                "default": file_form(default),
                "effective": file_form(effective),
            }
        )
        return
    rows = {"set here": stored, "values": in_values, "default": default, "in force": effective}
    out.print(
        _table({name: limits for name, limits in rows.items() if limits is not None}, first="where")
    )
    if values is None:
        err.print(
            "The platform's values are not known here; give them with -f to see what is in force."
        )


@group.command()
def remove(tenant: str) -> None:
    """Remove the limits set by `tera tenants set`; those of the values apply again."""
    with reported():
        with_tenants(lambda store: store.remove(tenant))
    out.print(f"removed the limits of tenant {tenant}")


def _values(file: Path | None) -> LimitsConfig | None:
    if file is not None:
        return load_platform(file).gateway.limits
    runtime = Runtime.from_environment()
    if runtime.key_pepper:
        return None  # the environment names a platform that may not be the one running here
    try:
        return LocalState.read(runtime.home).platform.gateway.limits
    except ConfigError:
        return None  # none runs here; `show` then says that the values are not known


def _table(rows: dict[str, TenantLimits], first: str = "tenant") -> Table:
    table = Table(first, "model", *HEADINGS, "weight")
    for name, limits in rows.items():
        table.add_row(name, "", *cells(limits), str(limits.weight or "–"))
        for model, own in limits.models.items():
            table.add_row("", model, *cells(own))
    return table

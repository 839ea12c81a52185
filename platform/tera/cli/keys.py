"""`tera keys`: create, list, rotate and revoke API keys."""

import sys
from typing import Annotated, Any

import typer
from rich.table import Column, Table

from tera.cli.console import Json, date, err, out, print_json, reported, seconds
from tera.cli.limits import (
    BudgetPeriod,
    ConcurrentRequests,
    RequestsPerMinute,
    TokenBudget,
    TokensPerMinute,
    file_form,
    words,
)
from tera.cli.store import with_keys
from tera.config.limits import Limits
from tera.errors import ConfigError
from tera.tenancy.keys import ApiKey

group = typer.Typer(no_args_is_help=True, help="Create, list, rotate and revoke API keys.")

Lifetime = Annotated[
    str | None,
    typer.Option("--expires", help="Lifetime, such as 30d, 12h or 15m; default: unlimited."),
]


@group.command()
def create(
    tenant: Annotated[str, typer.Option(help="The tenant the key belongs to.")],
    requests_per_minute: RequestsPerMinute = None,
    tokens_per_minute: TokensPerMinute = None,
    concurrent_requests: ConcurrentRequests = None,
    token_budget: TokenBudget = None,
    budget_period: BudgetPeriod = None,
    models: Annotated[
        str | None, typer.Option(help="Comma-separated model ids the key may use; default: all.")
    ] = None,
    expires: Lifetime = None,
    as_json: Json = False,
) -> None:
    """Create a key and print it, once. Its limits apply in addition to its tenant's."""
    with reported():
        if budget_period is not None and token_budget is None:
            raise ConfigError("--budget-period: give --token-budget as well")
        limits = Limits(
            requests_per_minute=requests_per_minute,
            tokens_per_minute=tokens_per_minute,
            concurrent_requests=concurrent_requests,
            token_budget=token_budget,
            budget_period=budget_period,
        )
        lifetime_s = None if expires is None else seconds("--expires", expires)
        ids = None if models is None else [name.strip() for name in models.split(",")]
        made = with_keys(
            lambda store: store.create(tenant, models=ids, limits=limits, expires_in_s=lifetime_s)
        )
    if as_json:
        print_json({"key": made.key, "key_id": made.record.key_id, "tenant": tenant})
        return
    out.print(made.key, highlight=False)
    err.print(f"{made.record.key_id} of tenant {tenant}; the key will not be shown again")


@group.command("list")
def list_keys(
    tenant: Annotated[str | None, typer.Option(help="Only this tenant's keys.")] = None,
    as_json: Json = False,
) -> None:
    """List the keys: everything but the secret keys themselves."""
    with reported():
        records = with_keys(lambda store: store.list())
    records = [record for record in records if tenant in (None, record.tenant)]
    if as_json:
        print_json([_row(record) for record in records])
        return
    table = Table(
        Column("key id", min_width=28),  # ids are copied: never cut them
        *("tenant", "key", "models", "limits", "created", "expires", "last used"),
    )
    for record in records:
        table.add_row(
            record.key_id,
            record.tenant,
            record.hint,
            ", ".join(record.models) if record.models is not None else "all",
            words(record.limits),
            *(date(at) for at in (record.created_s, record.expires_s, record.last_used_s)),
        )
    out.print(table)


@group.command()
def revoke(
    key_id: str,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask for confirmation.")] = False,
) -> None:
    """Revoke a key. It stops working within seconds."""
    if not yes and sys.stdin.isatty():
        typer.confirm(f"Revoke {key_id}? It cannot be undone.", abort=True)
    with reported():
        with_keys(lambda store: store.revoke(key_id))
    out.print(f"{key_id} is revoked")


@group.command()
def rotate(
    key_id: str,
    grace: Annotated[
        str, typer.Option(help="How long the old key keeps working; 0s: not at all.")
    ] = ("24h"),
    expires: Annotated[
        str | None, typer.Option(help="The new key's lifetime; default: the old key's expiry.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Create a key that replaces another, and print it, once."""
    with reported():
        grace_s = seconds("--grace", "0s" if grace == "0" else grace)
        lifetime_s = None if expires is None else seconds("--expires", expires)
        rotation = with_keys(
            lambda store: store.rotate(key_id, grace_s=grace_s, expires_in_s=lifetime_s)
        )
    new = rotation.new
    if as_json:
        print_json(
            {
                "key": new.key,
                "key_id": new.record.key_id,
                "tenant": new.record.tenant,
                "old_key_id": rotation.old_key_id,
                "old_expires": rotation.old_expires_s,
            }
        )
        return
    out.print(new.key, highlight=False)
    end = f"works until {date(rotation.old_expires_s)}" if grace_s else "is revoked"
    err.print(f"{new.record.key_id} replaces {key_id}, which {end}; it is not shown again")


def _row(record: ApiKey) -> dict[str, Any]:
    return {
        "key_id": record.key_id,
        "tenant": record.tenant,
        "hint": record.hint,
        "models": record.models,
        "limits": file_form(record.limits),
        "created": record.created_s,
        "expires": record.expires_s,
        "last_used": record.last_used_s,
        "replaced_by": record.replaced_by,
    }

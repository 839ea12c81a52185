"""The `tera` command.

Exit codes: 0 done, 1 failed, 2 wrong usage or configuration.
"""

import asyncio
import json
import re
import sys
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
import yaml
from rich.console import Console
from rich.table import Table

from tera.config import (
    PlatformConfig,
    Runtime,
    ServeOptions,
    default_values_file,
    load_platform,
)
from tera.errors import ConfigError, TeraError
from tera.local.state import LocalSecrets, LocalState, runtime_of
from tera.manifest import serve_config
from tera.tenancy.keys import ApiKey, KeyStore
from tera.tenancy.redis import connect

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Run and operate a Tera platform.",
    pretty_exceptions_enable=False,  # they print local variables, secrets among them
)
keys = typer.Typer(no_args_is_help=True, help="Make, list and revoke API keys.")
config = typer.Typer(no_args_is_help=True, help="Check and render a values file.")
app.add_typer(keys, name="keys")
app.add_typer(config, name="config")

out = Console(soft_wrap=True)
err = Console(stderr=True, soft_wrap=True)

ValuesFile = Annotated[
    Path | None, typer.Option("-f", "--file", help="A values.yaml; the demo platform without.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]

T = TypeVar("T")


@contextmanager
def _reported() -> Iterator[None]:
    """Say an error of ours in its own words, and set the exit code."""
    try:
        yield
    except TeraError as error:
        for line in error.message.splitlines():
            err.print(f"[red]error:[/] {_escaped(line)}", highlight=False)
        raise typer.Exit(2 if isinstance(error, ConfigError) else 1) from error


def _escaped(text: str) -> str:
    return text.replace("[", r"\[")


@app.command()
def serve(
    file: ValuesFile = None,
    port: Annotated[int | None, typer.Option(help="8000, or TERA_PORT.")] = None,
    host: Annotated[str | None, typer.Option(help="127.0.0.1, or TERA_HOST.")] = None,
) -> None:
    """Run a platform on this machine, in the foreground."""
    from tera.local.console import StageConsole
    from tera.local.serve import serve as run

    with _reported():
        options = ServeOptions.from_environment()
        platform = load_platform(file or default_values_file())
        home = Runtime.from_environment().home
        asyncio.run(
            run(platform, home, host or options.host, port or options.port, StageConsole(out))
        )


@app.command()
def status(as_json: Json = False) -> None:
    """Show the models, their replicas and what they are doing."""
    from tera.local.status import read_status

    with _reported():
        home = Runtime.from_environment().home
        found = read_status(LocalState.read(home), LocalSecrets.of(home))
    if as_json:
        _print_json(found)
        return
    table = Table("model", "status", "replica", "pid", "running", "waiting", "draining")
    for model in found["models"]:
        for replica in model["replicas"] or [{}]:
            table.add_row(
                model["id"],
                model["status"],
                *(str(replica.get(name, "–")) for name in _REPLICA_COLUMNS),
            )
    for replica in found["gateway"]:
        table.add_row("(gateway)", "ready", replica["replica_id"], str(replica["pid"]))
    out.print(table)
    redis = found["redis"]
    out.print(f"redis {redis['state']} at {redis['address']}")


_REPLICA_COLUMNS = ("replica_id", "pid", "running", "waiting", "draining")


@keys.command("create")
def create_key(
    tenant: Annotated[str, typer.Option(help="Who the key belongs to.")],
    models: Annotated[
        str | None, typer.Option(help="Model ids that it may use, with commas; all without.")
    ] = None,
    expires: Annotated[
        str | None, typer.Option(help="Time to live, such as 30d, 12h or 15m; for ever without.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Make a key; it is shown this once."""
    with _reported():
        lifetime_s = None if expires is None else _seconds(expires)
        ids = None if models is None else [name.strip() for name in models.split(",")]
        made = _with_keys(lambda store: store.create(tenant, models=ids, expires_in_s=lifetime_s))
    if as_json:
        _print_json({"key": made.key, "key_id": made.record.key_id, "tenant": tenant})
        return
    out.print(made.key, highlight=False)
    err.print(f"{made.record.key_id} of tenant {tenant}; the key is not shown again")


@keys.command("list")
def list_keys(as_json: Json = False) -> None:
    """List the keys, without the keys themselves."""
    with _reported():
        records = _with_keys(lambda store: store.list())
    if as_json:
        _print_json([_key_row(record) for record in records])
        return
    table = Table("key id", "tenant", "key", "models", "created", "expires", "last used")
    for record in records:
        table.add_row(
            record.key_id,
            record.tenant,
            record.hint,
            ", ".join(record.models) if record.models is not None else "all",
            *(_date(at) for at in (record.created_s, record.expires_s, record.last_used_s)),
        )
    out.print(table)


@keys.command("revoke")
def revoke_key(key_id: str) -> None:
    """Revoke a key; it stops within seconds."""
    with _reported():
        _with_keys(lambda store: store.revoke(key_id))
    out.print(f"{key_id} is revoked")


@config.command("check")
def check_config(file: Annotated[Path, typer.Option("-f", "--file")]) -> None:
    """Say whether a values file is right, and where it is not."""
    with _reported():
        platform = load_platform(file)
    out.print(f"{file}: fine; {len(platform.deployed_models())} model(s) to deploy")


@config.command("render")
def render_config(file: Annotated[Path, typer.Option("-f", "--file")]) -> None:
    """Print the Ray Serve config of a values file."""
    with _reported():
        platform: PlatformConfig = load_platform(file)
    sys.stdout.write(yaml.safe_dump(serve_config(platform), sort_keys=False))


def _with_keys(work: Callable[[KeyStore], Awaitable[T]]) -> T:
    """Run `work` on the keys of the platform of this directory, or of the environment."""

    async def run() -> T:
        async with _key_store() as store:
            return await work(store)

    return asyncio.run(run())


@asynccontextmanager
async def _key_store() -> AsyncGenerator[KeyStore]:
    runtime = Runtime.from_environment()
    if not runtime.key_pepper:
        runtime = runtime_of(runtime.home)
    redis = connect(runtime.redis_url, timeout_s=5)
    try:
        yield KeyStore(redis, runtime.key_pepper, time.time)
    finally:
        await redis.aclose()


_LIFETIME = re.compile(r"(\d+)([smhd])")
_UNIT_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def _seconds(lifetime: str) -> float:
    match = _LIFETIME.fullmatch(lifetime)
    if match is None:
        raise ConfigError(f"--expires {lifetime!r}: give a number and s, m, h or d, such as 30d")
    return int(match[1]) * _UNIT_S[match[2]]


def _key_row(record: ApiKey) -> dict[str, Any]:
    return {
        "key_id": record.key_id,
        "tenant": record.tenant,
        "hint": record.hint,
        "models": record.models,
        "created": record.created_s,
        "expires": record.expires_s,
        "last_used": record.last_used_s,
    }


def _date(at_s: float | None) -> str:
    return "–" if at_s is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(at_s))


def _print_json(value: object) -> None:
    sys.stdout.write(json.dumps(value, indent=2) + "\n")

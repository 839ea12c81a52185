"""`tera probe`: check a platform from outside, the way its clients use it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer
from rich.markup import escape
from rich.table import Column, Table

from tera.cli.console import Json, out, print_json, reported, seconds
from tera.config.environment import ClientOptions
from tera.errors import ConfigError

if TYPE_CHECKING:
    from tera.cli.remote import RemoteModel


def probe(
    base_url: Annotated[
        str | None,
        typer.Option(help="Without /v1; default: TERA_BASE_URL, or else the platform here."),
    ] = None,
    model: Annotated[str | None, typer.Option(help="Model id; default: a ready one.")] = None,
    timeout: Annotated[
        str, typer.Option(help="Time limit of the whole probe; a cold start takes minutes.")
    ] = "60s",
    ready_only: Annotated[
        bool, typer.Option("--ready-only", help="Only check readiness; needs no key.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Check that a platform is ready, lists its models and completes one short prompt.

    The API key is read from TERA_API_KEY.
    """
    # Imported here: other commands should not wait for an HTTP client to load.
    from tera.cli.remote import RemotePlatform, preferred

    with reported():
        client = ClientOptions.from_environment(base_url)
        if not ready_only and not client.api_key:
            raise ConfigError("TERA_API_KEY is not set; give a key there, or --ready-only.")
        found: dict[str, Any] = {"base_url": client.base_url, "status": "ready"}
        with RemotePlatform(client, seconds("--timeout", timeout)) as platform:
            platform.check_ready()
            if not as_json:
                out.print(f"{client.base_url} is ready", markup=False, highlight=False)
            if not ready_only:
                models = platform.models()
                if not as_json:
                    _show(models)
                asked = platform.model(model) if model else preferred(models)
                answer = platform.complete(asked)
                found["models"] = [{"id": each.id, "status": each.status} for each in models]
                found["answer"] = msgspec.to_builtins(answer)
    if as_json:
        print_json(found)
    elif not ready_only:
        out.print(
            f"{answer.model}: first token after {answer.time_to_first_token_s:.3f} s, "
            f"{answer.characters} characters in {answer.duration_s:.3f} s",
            markup=False,
            highlight=False,
        )


def _show(models: "Sequence[RemoteModel]") -> None:
    # Ids and addresses are copied: a narrow terminal must not cut them.
    table = Table(Column("model", overflow="fold"), "status")
    for model in models:
        table.add_row(escape(model.id), escape(model.status))
    out.print(table)

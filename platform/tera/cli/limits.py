"""Limits on the command line: as options, and in words."""

from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal

import typer

from tera.config.limits import LARGEST_BUDGET, LARGEST_LIMIT, Limits
from tera.errors import ConfigError

RequestsPerMinute = Annotated[int | None, typer.Option(min=0, max=LARGEST_LIMIT, help="0 blocks.")]
TokensPerMinute = Annotated[
    int | None,
    typer.Option(min=0, max=LARGEST_LIMIT, help="Prompt and completion together; 0 blocks."),
]
ConcurrentRequests = Annotated[int | None, typer.Option(min=0, max=LARGEST_LIMIT, help="0 blocks.")]
TokenBudget = Annotated[
    int | None, typer.Option(min=0, max=LARGEST_BUDGET, help="Of a day or month; 0 blocks.")
]
BudgetPeriod = Annotated[
    Literal["day", "month"] | None, typer.Option(help="In UTC; a month without.")
]

Changed = Annotated[str | None, typer.Option(metavar="N|none", help="0 blocks.")]
ChangedPeriod = Annotated[Literal["day", "month", "none"] | None, typer.Option(help="In UTC.")]

NONE: Final = "none"
"""Given for an option, it removes the limit."""

_LIMITS: Final = ("requests_per_minute", "tokens_per_minute", "concurrent_requests", "token_budget")
HEADINGS: Final = ("requests/min", "tokens/min", "concurrent", "budget")


def changes(given: Mapping[str, str | None]) -> dict[str, Any]:
    """Return the limits that options set, None for those that they remove.

    Raises:
        ConfigError: one is neither a number nor `none`, or there is none at all.
    """
    found: dict[str, Any] = {}
    for name, text in given.items():
        if text is None:
            continue
        if text == NONE:
            found[name] = None
        elif name == "budget_period":
            found[name] = text
        elif text.isascii() and text.isdigit():
            found[name] = int(text)
        else:
            option = "--" + name.replace("_", "-")
            raise ConfigError(f"{option} {text!r}: give a number from 0, or {NONE}")
    if not found:
        raise ConfigError("Give at least one limit to set, such as --requests-per-minute 60.")
    return found


def cells(limits: Limits) -> list[str]:
    """Return a table's cells under `HEADINGS`."""
    return [_cell(limits, name) for name in _LIMITS]


def _cell(limits: Limits, name: str) -> str:
    number: int | None = getattr(limits, name)
    if name != "token_budget":
        return "–" if number is None else f"{number:,}"
    if number is None:
        return "–" if limits.budget_period is None else f"(a {limits.budget_period})"
    return f"{number:,} a {limits.budget_period or 'month'}"


def words(limits: Limits | None) -> str:
    """Return limits in one line."""
    if limits is None:
        return "–"
    return ", ".join(
        cell if heading == "budget" else f"{cell} {heading}"
        for heading, cell in zip(HEADINGS, cells(limits), strict=True)
        if cell != "–"
    )


def file_form(limits: Limits | None) -> Any:
    """Return limits as a values file has them."""
    if limits is None:
        return None
    return limits.file_form(exclude_defaults=True)

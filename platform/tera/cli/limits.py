"""Limits on the command line: as options, and as text."""

from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal

import typer

from tera.config.limits import LARGEST_BUDGET, LARGEST_LIMIT, Limits
from tera.errors import ConfigError

RequestsPerMinute = Annotated[
    int | None, typer.Option(min=0, max=LARGEST_LIMIT, help="0 blocks all requests.")
]
TokensPerMinute = Annotated[
    int | None,
    typer.Option(min=0, max=LARGEST_LIMIT, help="Prompt plus completion tokens; 0 blocks."),
]
ConcurrentRequests = Annotated[
    int | None, typer.Option(min=0, max=LARGEST_LIMIT, help="0 blocks all requests.")
]
TokenBudget = Annotated[
    int | None, typer.Option(min=0, max=LARGEST_BUDGET, help="Tokens per day or month; 0 blocks.")
]
BudgetPeriod = Annotated[
    Literal["day", "month"] | None,
    typer.Option(help="A UTC calendar day or month; default: month."),
]

Changed = Annotated[str | None, typer.Option(metavar="N|none", help="0 blocks all.")]
ChangedPeriod = Annotated[Literal["day", "month", "none"] | None, typer.Option(help="In UTC.")]

NONE: Final = "none"
"""As the value of an option, it removes that limit."""

_LIMITS: Final = ("requests_per_minute", "tokens_per_minute", "concurrent_requests", "token_budget")
HEADINGS: Final = ("requests/min", "tokens/min", "concurrent", "budget")


def changes(given: Mapping[str, str | None]) -> dict[str, Any]:
    """Return the limits that the options set; a limit that an option removes is None.

    Raises:
        ConfigError: an option is neither a number nor `none`, or no option is given.
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
            raise ConfigError(f"{option} {text!r}: give a number, 0 or more, or {NONE}")
    if not found:
        raise ConfigError("Give at least one limit to set, such as --requests-per-minute 60.")
    return found


def cells(limits: Limits) -> list[str]:
    """Return the cells of a table row, in the order of `HEADINGS`."""
    return [_cell(limits, name) for name in _LIMITS]


def _cell(limits: Limits, name: str) -> str:
    number: int | None = getattr(limits, name)
    if name != "token_budget":
        return "–" if number is None else f"{number:,}"
    if number is None:
        return "–" if limits.budget_period is None else f"(a {limits.budget_period})"
    return f"{number:,} a {limits.budget_period or 'month'}"


def words(limits: Limits | None) -> str:
    """Return limits as one line of text."""
    if limits is None:
        return "–"
    return ", ".join(
        cell if heading == "budget" else f"{cell} {heading}"
        for heading, cell in zip(HEADINGS, cells(limits), strict=True)
        if cell != "–"
    )


def file_form(limits: Limits | None) -> Any:
    """Return limits as a values file writes them."""
    if limits is None:
        return None
    return limits.file_form(exclude_defaults=True)

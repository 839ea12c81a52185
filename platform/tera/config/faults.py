"""How a fault that pydantic finds is told: the path of the value, then what is wrong with it."""

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError


def faults(
    error: ValidationError, *, below: tuple[str, ...] = (), show_values: bool = True
) -> list[str]:
    """Return one line for each fault, each beginning with the path of the value.

    A check of the whole tells its faults itself, several lines at once, each with its path.

    Args:
        error: what pydantic raised.
        below: where the checked values are themselves, such as `("engine", "args")`.
        show_values: whether to quote what was given; not where it may be a secret.
    """
    return [
        _fault((*below, *detail["loc"]), detail, show_values)
        for detail in error.errors(include_url=False)
    ]


def _fault(location: tuple[int | str, ...], detail: Mapping[str, Any], show_value: bool) -> str:
    kind = detail["type"]
    if not location and kind == "value_error":
        return str(detail["ctx"]["error"])
    # pydantic marks the name of an entry, where that is at fault, by a part of the path.
    path = ".".join(str(part) for part in location if part != "[key]") or "values"
    if kind == "extra_forbidden":
        return f"{path}: unknown key"
    if kind == "missing":
        return f"{path}: is missing"
    message = detail["msg"].removeprefix("Value error, ")
    if kind == "value_error" or not show_value:
        return f"{path}: {message}"
    return f"{path}: {message} (got {detail['input']!r})"

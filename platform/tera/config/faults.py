"""Formats the faults that pydantic finds: the path of the value, then what is wrong with it."""

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from tera.config.names import MEANINGS


def faults(
    error: ValidationError, *, below: tuple[str, ...] = (), show_values: bool = True
) -> list[str]:
    """Return one line per fault, each beginning with the path of the value.

    A validator of the whole tree raises several lines at once; these contain their paths already.

    Args:
        error: what pydantic raised.
        below: the path of the checked values themselves, such as `("engine", "args")`.
        show_values: whether to quote the given values; False where they may be secrets.
    """
    return [
        _fault((*below, *detail["loc"]), detail, show_values)
        for detail in error.errors(include_url=False)
    ]


def _fault(location: tuple[int | str, ...], detail: Mapping[str, Any], show_value: bool) -> str:
    kind = detail["type"]
    if not location and kind == "value_error":
        return str(detail["ctx"]["error"])
    # Where a map's key is at fault, and not its value, pydantic adds a part to the path.
    path = ".".join(str(part) for part in location if part != "[key]") or "values"
    if kind == "extra_forbidden":
        return f"{path}: unknown key"
    if kind == "missing":
        return f"{path}: is missing"
    if detail["input"] is None and kind in ("model_type", "dict_type", "model_attributes_type"):
        return f"{path}: is null; give it entries, indented below it, or remove the key"
    message = detail["msg"].removeprefix("Value error, ")
    if kind == "string_pattern_mismatch":
        message = MEANINGS.get(detail["ctx"]["pattern"], message)
    if kind == "value_error" or not show_value:
        return f"{path}: {message}"
    return f"{path}: {message} (got {detail['input']!r})"

"""Values of a field that are refused, as the tests list them."""

from typing import Any

TYPE, VALUE = "invalid_type", "invalid_value"
Refused = tuple[str, Any, str, str]


def each(name: str, code: str, *values: Any) -> list[Refused]:
    """Return a case for each value that is wrong as a whole."""
    return [(name, value, code, name) for value in values]

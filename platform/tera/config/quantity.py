"""Kubernetes quantities: amounts of CPU, memory and storage, such as 500m or 24Gi."""

from fractions import Fraction
from typing import Final

PATTERN: Final = r"^[0-9]{1,15}(\.[0-9]{1,6})?(m|[kMGTPE]|[KMGTPE]i)?$"
"""What a values file may contain: no sign, no exponent and nothing below a billionth."""

_DECIMAL: Final = {
    **{"E": 6, "P": 5, "T": 4, "G": 3, "M": 2, "k": 1},
    **{"": 0, "m": -1, "u": -2, "n": -3},
}
_BINARY: Final = {"Ei": 6, "Pi": 5, "Ti": 4, "Gi": 3, "Mi": 2, "Ki": 1}


LARGEST_NUMBER: Final = 10**15 - 1
"""The largest number that may stand for a quantity: it has as many digits as a text."""


def as_text(value: object) -> object:
    """Return a number as the quantity that it means to Kubernetes; anything else as it is."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return f"{value:f}" if isinstance(value, float) else value


def amount(quantity: str) -> Fraction:
    """Return how much a quantity is: bytes, or cores.

    Args:
        quantity: matches `PATTERN`, or is canonical.
    """
    number, base, power, _ = _parts(quantity)
    return number * Fraction(base) ** power


def _parts(quantity: str) -> tuple[Fraction, int, int, dict[str, int]]:
    number = quantity.rstrip("".join(_DECIMAL) + "Ki")
    suffix = quantity.removeprefix(number)
    base, suffixes = (1024, _BINARY) if suffix.endswith("i") else (1000, _DECIMAL)
    return Fraction(number), base, suffixes[suffix], suffixes


def canonical(quantity: str) -> str:
    """Return a quantity as Kubernetes writes it back: 2 for 2000m, 4Gi for 4096Mi.

    That is the largest suffix that leaves a whole number, as `CanonicalizeBytes` of
    `k8s.io/apimachinery/pkg/api/resource` chooses it. The chart's `tera.quantity` does the same.

    Args:
        quantity: matches `PATTERN`.
    """
    number, base, own_power, suffixes = _parts(quantity)
    whole = number * Fraction(base) ** own_power
    if not whole:
        return "0"
    if base == 1024 and whole % 1024:
        # Without a binary suffix the number reads as a decimal one, and 64000 is written as 64k.
        base, suffixes = 1000, _DECIMAL
    for unit, power in suffixes.items():
        scaled = whole / Fraction(base) ** power
        if scaled.denominator == 1:
            return f"{scaled.numerator}{unit}"
    raise ValueError(f"{quantity!r} is not a quantity: give a number such as 500m or 24Gi")

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


def canonical(quantity: str) -> str:
    """Return a quantity as Kubernetes writes it back: 2 for 2000m, 4Gi for 4096Mi.

    That is the largest suffix that leaves a whole number, as `CanonicalizeBytes` of
    `k8s.io/apimachinery/pkg/api/resource` chooses it. The chart's `tera.quantity` does the same.

    Args:
        quantity: matches `PATTERN`.
    """
    number = quantity.rstrip("".join(_DECIMAL) + "Ki")
    suffix = quantity.removeprefix(number)
    base, suffixes = (1024, _BINARY) if suffix.endswith("i") else (1000, _DECIMAL)
    amount = Fraction(number) * Fraction(base) ** suffixes[suffix]
    if not amount:
        return "0"
    if base == 1024 and amount % 1024:
        # Without a binary suffix the number reads as a decimal one, and 64000 is written as 64k.
        base, suffixes = 1000, _DECIMAL
    for unit, power in suffixes.items():
        scaled = amount / Fraction(base) ** power
        if scaled.denominator == 1:
            return f"{scaled.numerator}{unit}"
    raise ValueError(f"{quantity!r} is not a quantity: give a number such as 500m or 24Gi")

import re
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tera.config.quantity import PATTERN, canonical

SUFFIXES = {
    **{"": Fraction(1), "n": Fraction(1, 10**9), "u": Fraction(1, 10**6), "m": Fraction(1, 1000)},
    **{unit: Fraction(1000**power) for power, unit in enumerate("kMGTPE", 1)},
    **{f"{unit}i": Fraction(1024**power) for power, unit in enumerate("KMGTPE", 1)},
}


def amount(quantity: str) -> Fraction:
    found = re.fullmatch(r"([0-9.]+)(\w*)", quantity)
    assert found is not None
    return Fraction(found[1]) * SUFFIXES[found[2]]


# Below what Kubernetes can count, beyond which it makes less of it.
QUANTITIES = st.builds(
    "{}{}{}".format,
    st.integers(0, 10**15 - 1) | st.sampled_from(["0", "00", "1", "06", "24", "1000", "1024"]),
    st.sampled_from(["", ".0", ".5", ".25", ".001"]) | st.from_regex(r"\A\.[0-9]{1,6}\Z"),
    st.sampled_from(sorted(SUFFIXES.keys() - {"n", "u"})),
).filter(lambda quantity: amount(quantity) < 2**63)


@pytest.mark.parametrize(
    ("given_as", "written"),
    [
        # What k8s.io/apimachinery v0.35.3 makes of each, but for 1.500, which it leaves as it is,
        # and 1.953125Ki, of which it makes 2000, and 2k of that.
        ("6", "6"),
        ("2000m", "2"),
        ("1500m", "1500m"),
        ("0.5", "500m"),
        ("1.5", "1500m"),
        ("1.500", "1500m"),
        ("00.5", "500m"),
        ("08", "8"),
        ("1000", "1k"),
        ("1024", "1024"),
        ("0.0001", "100u"),
        ("0.000001m", "1n"),
        ("1.5G", "1500M"),
        ("4096Mi", "4Gi"),
        ("1.5Gi", "1536Mi"),
        ("0.5Gi", "512Mi"),
        ("16777216Ki", "16Gi"),
        ("1024Ti", "1Pi"),
        ("1000Gi", "1000Gi"),
        ("1.1Gi", "1181116006400m"),
        ("0.5Ki", "512"),
        ("1.953125Ki", "2k"),
        ("0Gi", "0"),
        ("0.000", "0"),
    ],
)
def test_a_quantity_is_written_as_kubernetes_writes_it(given_as: str, written: str) -> None:
    assert canonical(given_as) == written


@given(QUANTITIES)
def test_it_is_one_that_a_values_file_may_hold(quantity: str) -> None:
    assert re.search(PATTERN, quantity)


@given(QUANTITIES)
def test_it_stays_the_same_amount_and_is_written_so_for_good(quantity: str) -> None:
    written = canonical(quantity)
    assert amount(written) == amount(quantity)
    assert "." not in written
    if written[-1] not in "nu":  # which values files do not have
        assert canonical(written) == written

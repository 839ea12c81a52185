import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tera.cli.reference import configuration_page
from tera.config.platform import PlatformConfig

ROOT = Path(__file__).parents[1]
VALUES = yaml.safe_load((ROOT / "helm/tera/values.yaml").read_text())
ROWS = {
    cells[0].strip("`"): cells[1:]
    for cells in (
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for line in configuration_page().splitlines()
        if line.startswith("| `")
    )
}


def leaves(values: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Return the values of a tree by their paths; a map without a row of its own is gone into."""
    if isinstance(values, dict) and ROWS.get(path, ["section"])[0] == "section":
        for key, value in values.items():
            yield from leaves(value, f"{path}.{key}".lstrip("."))
    else:
        yield path, values


def test_committed_page_is_current() -> None:
    assert (ROOT / "docs/configuration.md").read_text() == configuration_page(), "run `make schema`"


def test_every_part_has_a_heading() -> None:
    headings = re.findall(r"^## (\w+)$", configuration_page(), re.MULTILINE)
    assert headings == [field.alias for field in PlatformConfig.model_fields.values()]


@pytest.mark.parametrize(("path", "value"), list(leaves(VALUES)))
def test_default_is_that_of_the_chart(path: str, value: Any) -> None:
    default = ROWS[path][1].partition(";")[0].strip("`")
    assert yaml.safe_load(default) == value


@pytest.mark.parametrize("path", list(ROWS))
def test_value_has_a_type_and_a_meaning(path: str) -> None:
    kind, _, meaning = ROWS[path]
    assert kind
    assert "any" not in kind.split()
    assert meaning


def test_what_is_shared_is_described_where_the_page_says() -> None:
    for kind, _, _ in ROWS.values():
        for path in re.findall(r"as `(.*)`", kind):
            assert any(row.startswith(f"{path}.") for row in ROWS)

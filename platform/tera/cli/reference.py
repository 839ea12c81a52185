"""Writes `docs/configuration.md` from the schema of the configuration."""

import json
from collections.abc import Iterator
from typing import Any

import yaml
from pydantic import TypeAdapter

from tera.config.cluster import Quantity
from tera.config.platform import PlatformConfig
from tera.config.values_file import load_cluster_platform
from tera.manifest import values_schema

_HEAD = """\
# Configuration

Every value of `values.yaml`, its default and its meaning. `make schema` generates this page from
the docstrings of `tera.config.platform.PlatformConfig`. `tera config check -f FILE` reports what is
wrong with a file.

Defaults are the chart's; where `tera serve` on one machine has a different one, both are given.
On one machine, values that only a cluster uses are ignored. `<name>` is a name you choose.
"""


def configuration_page() -> str:
    """Return `docs/configuration.md`: each value with its type, default and meaning."""
    schema = json.loads(values_schema())
    reference = _Reference(schema["$defs"])
    parts = [_HEAD]
    for name, part in schema["properties"].items():
        section = reference.section(part)
        if section is not None:
            meaning = reference.meaning(part)
            rows = reference.fields(name, section)
        else:
            meaning = ""
            rows = reference.rows(name, part)
        table = ["| value | type | default | meaning |", "|---|---|---|---|", *rows]
        parts += [f"## {name}\n", *([meaning + "\n"] if meaning else []), "\n".join(table) + "\n"]
    return "\n".join(parts)


class _Reference:
    """Rows of the page; a section used in several places is described where it first appears."""

    def __init__(self, sections: dict[str, Any]) -> None:
        self._sections = sections
        self._described: dict[str, str] = {}
        self._cluster = load_cluster_platform().file_form()
        self._machine = PlatformConfig().file_form()

    def section(self, schema: dict[str, Any]) -> str | None:
        reference: str | None = schema.get("$ref")
        return reference.rpartition("/")[2] if reference else None

    def meaning(self, schema: dict[str, Any]) -> str:
        """Return a field's description, or else the description of the section it holds."""
        text = schema.get("description")
        if text is None and (section := self.section(schema)):
            text = self._sections[section].get("description", "")
        return " ".join((text or "").split())

    def fields(self, path: str, section: str) -> Iterator[str]:
        self._described[section] = path
        for key, each in self._sections[section]["properties"].items():
            yield from self.rows(f"{path}.{key}", each)

    def rows(self, path: str, schema: dict[str, Any]) -> Iterator[str]:
        """Yield the row of a value, then the rows of everything inside it."""
        below, entry = self._entries(path, schema)
        section = self.section(entry)
        if section is None:
            yield self._row(path, self._type(schema), schema)
        elif section in self._described:
            of = "" if below == path else ("list, " if below.endswith("[]") else "map, ")
            yield self._row(path, f"{of}as `{self._described[section]}`", schema)
        else:
            kind = "section" if below == path else self._type(schema)
            yield self._row(path, kind, schema, self.meaning(entry))
            yield from self.fields(below, section)

    def _entries(self, path: str, schema: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        """Return the path and schema of a map's or list's entries, or the value's own."""
        if "patternProperties" in schema:
            (entry,) = schema["patternProperties"].values()
            return f"{path}.<name>", entry
        if "items" in schema:
            return f"{path}[]", schema["items"]
        return path, schema

    def _type(self, schema: dict[str, Any]) -> str:
        if schema.get("anyOf") == _QUANTITY["anyOf"]:
            return "quantity"
        if "anyOf" in schema:
            return " or ".join(self._type(each) for each in schema["anyOf"])
        if "enum" in schema:
            return ", ".join(f"`{value}`" if value else "empty" for value in schema["enum"])
        kind: str = schema.get("type", "any")
        if kind == "array":
            return "list" if "$ref" in schema["items"] else f"list of {self._type(schema['items'])}"
        names = {"object": "map", "string": "text", "null": "absent"}
        bounds = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤"}
        limits = [f"{sign} {schema[key]:.16g}" for key, sign in bounds.items() if key in schema]
        return " ".join([names.get(kind, kind), ", ".join(limits)]).strip()

    def _row(self, path: str, kind: str, schema: dict[str, Any], otherwise: str = "") -> str:
        meaning = self.meaning(schema) or otherwise
        cells = (
            f"`{path}`",
            kind,
            "" if kind == "section" else self._default(path, schema),
            meaning,
        )
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    def _default(self, path: str, schema: dict[str, Any]) -> str:
        try:
            cluster, machine = _at(self._cluster, path), _at(self._machine, path)
        except KeyError:
            # An entry of a map: nothing exists there until the user adds one.
            empty = {} if schema.get("type") == "object" else _MISSING
            default = schema.get("default", empty)
            return "–" if default is _MISSING else _written(default)
        if cluster == machine:
            return _written(cluster)
        return f"{_written(cluster)}; on one machine {_written(machine)}"


_QUANTITY = TypeAdapter(Quantity).json_schema()
_MISSING = object()


def _at(values: dict[str, Any], path: str) -> Any:
    found: Any = values
    for key in path.split("."):
        found = found[key]
    return found


def _written(value: Any) -> str:
    return "none" if value is None else f"`{_yaml(value)}`"


def _yaml(value: Any) -> str:
    """Return a value as it would be written in YAML, without a map's empty entries."""
    if isinstance(value, dict):
        given = {key: each for key, each in value.items() if each not in (None, "", [], {})}
        entries = [(key, _yaml(each)) for key, each in given.items()]
        return "{" + ", ".join(f"{key}: {each}" for key, each in entries if each != "{}") + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_yaml, value)) + "]"
    if isinstance(value, float):
        return f"{value:g}"
    text = value if isinstance(value, str) else json.dumps(value)
    # Text that YAML would read as another type, such as "6", needs quotes.
    return json.dumps(text) if isinstance(value, str) and yaml.safe_load(text) != text else text

"""A page for each route of the API, made from its OpenAPI document."""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

Schema = Mapping[str, Any]

ERRORS_PAGE = "../docs/api.md#errors"
HEADERS_PAGE = "../docs/api.md#headers"
WRITTEN = {2**31 - 1: "2^31-1", -(2**63): "-2^63", 2**63 - 1: "2^63-1"}
"""Numbers that are unreadable in full."""


def route_pages(document: Schema) -> dict[str, str]:
    """Return the pages' Markdown by file name, in the document's order after `index.md`."""
    routes = [
        _Route(document, path, method, operation)
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
    ]
    rows = [f"| [`{it.title}`]({it.file_name}) | {it.summary} |" for it in routes]
    index = [
        "# Routes",
        document["info"]["description"],
        "These pages are made from the [OpenAPI document](../openapi.json), which a gateway serves "
        "as `GET /openapi.json`. [The API page](../docs/api.md) says how the fields compare with "
        "OpenAI's and vLLM's, and [the contract](../docs/contract.md) what a client can rely on.",
        "\n".join(["| route | what it does |", "|---|---|", *rows]),
    ]
    return {"index.md": _text(index), **{it.file_name: it.page() for it in routes}}


def _text(blocks: list[str]) -> str:
    return "\n\n".join(block for block in blocks if block) + "\n"


class _Route:
    """One method of one path, and its page."""

    def __init__(self, document: Schema, path: str, method: str, operation: Schema) -> None:
        self._document = document
        self._operation = operation
        self._objects: dict[str, Schema] = {}  # what the page has named so far, in that order
        self.title = f"{method.upper()} {path}"
        self.summary: str = operation["summary"]
        words = re.findall(r"[a-z0-9]+", self.title.lower())
        self.file_name = "-".join(words) + ".md"

    def page(self) -> str:
        """Return the page's Markdown."""
        keyless = self._operation.get("security") == []
        blocks = [
            f"# {self.title}",
            f"{self.summary}. {self._operation.get('description', '')}".strip(),
            "Needs no key." if keyless else "Needs an API key: `Authorization: Bearer sk-tera-…`.",
            *self._parameters(),
            *self._body(),
            *self._answers(),
            *self._errors(),
        ]
        # An object's table may name further objects, which then follow it.
        described: list[str] = []
        while len(described) < len(self._objects):
            name = list(self._objects)[len(described)]
            described.append(self._object(name))
        return _text([*blocks, "## Objects" if described else "", *described])

    def _parameters(self) -> Iterator[str]:
        parameters = self._operation.get("parameters", [])
        if parameters:
            yield "## Parameters"
            rows = []
            for it in parameters:
                kind = self._type(it["schema"])
                rows.append(f"| `{it['name']}` | {it['in']} | {kind} | {it['description']} |")
            yield "\n".join(["| name | where | type | meaning |", "|---|---|---|---|", *rows])

    def _body(self) -> Iterator[str]:
        body = self._operation.get("requestBody")
        if body is None:
            return
        for media_type, content in body["content"].items():
            yield "## Request"
            yield f"`{media_type}`: {self._type(content['schema'])}"
            for name, example in content.get("examples", {}).items():
                yield f"Example “{name}”:"
                yield _json(example["value"])

    def _answers(self) -> Iterator[str]:
        for status, answer in self._operation["responses"].items():
            if "$ref" in answer:  # an error, which all routes share
                continue
            yield f"## Answer {status}"
            yield answer["description"]
            for media_type, content in answer.get("content", {}).items():
                yield f"`{media_type}`: {self._type(content['schema'])}"
                if "example" in content:
                    yield _json(content["example"])
            headers = ", ".join(f"`{name}`" for name in answer.get("headers", {}))
            yield f"[Headers]({HEADERS_PAGE}): {headers}." if headers else ""

    def _errors(self) -> Iterator[str]:
        rows = []
        for status, answer in self._operation["responses"].items():
            if "$ref" in answer:
                shared = self._resolve(answer["$ref"])
                examples = shared["content"]["application/json"]["examples"].values()
                codes = dict.fromkeys(it["value"]["error"]["code"] for it in examples)
                rows.append(f"| {status} | {', '.join(f'`{code}`' for code in codes)} |")
        if rows:
            yield "## Errors"
            yield "\n".join(["| status | codes |", "|---|---|", *rows])
            yield f"[What each code means]({ERRORS_PAGE})."

    def _object(self, name: str) -> str:
        schema = self._objects[name]
        required = schema.get("required", [])
        rows = []
        for field, described in schema["properties"].items():
            need = "required" if field in required else _default(described)
            meaning = described.get("description", "")
            rows.append(f"| `{field}` | {self._type(described)} | {need} | {meaning} |")
        table = ["| member | type | default | meaning |", "|---|---|---|---|", *rows]
        return _text([f"### {name}", schema.get("description", ""), "\n".join(table)]).rstrip()

    def _type(self, schema: Schema) -> str:
        """Return a schema in words; objects with a name are links to their tables."""
        if "$ref" in schema:
            name = schema["$ref"].rpartition("/")[2]
            self._objects.setdefault(name, self._resolve(schema["$ref"]))
            return f"[{name}](#{name.lower()})"
        if "const" in schema or "enum" in schema:
            values = schema.get("enum") or [schema["const"]]
            words = (it if isinstance(it, str) else json.dumps(it) for it in values)
            return ", ".join(f"`{word}`" for word in words)
        choices = schema.get("anyOf") or schema.get("oneOf")
        if choices:
            return ", or ".join(self._type(it) for it in choices if it.get("type") != "null")
        kinds = schema.get("type", "any")
        kinds = [kinds] if isinstance(kinds, str) else kinds
        return " or ".join(self._simple(kind, schema) for kind in kinds if kind != "null")

    def _simple(self, kind: str, schema: Schema) -> str:
        if kind == "array":
            items = self._type(schema.get("items", {}))
            return f"array{_bounds(schema, 'minItems', 'maxItems')} of {items}"
        if kind == "object":
            if "properties" in schema:
                members = (f"`{it}`: {self._type(of)}" for it, of in schema["properties"].items())
                return f"object with {', '.join(members)}"
            values = schema.get("additionalProperties")
            return f"object of {self._type(values)}" if isinstance(values, Mapping) else "object"
        if kind == "string":
            return f"string{_bounds(schema, 'minLength', 'maxLength', ' characters')}"
        return f"{kind}{_bounds(schema, 'minimum', 'maximum')}"

    def _resolve(self, reference: str) -> Schema:
        found: Schema = self._document
        for name in reference.removeprefix("#/").split("/"):
            found = found[name]
        return found


def _json(value: object) -> str:
    return f"```json\n{json.dumps(value, indent=2, ensure_ascii=False)}\n```"


def _default(schema: Schema) -> str:
    return f"`{json.dumps(schema['default'])}`" if schema.get("default") is not None else ""


def _bounds(schema: Schema, lowest: str, highest: str, unit: str = "") -> str:
    low: Any = schema.get(lowest)
    high: Any = schema.get(highest)
    low, high = WRITTEN.get(low, low), WRITTEN.get(high, high)
    words = [f"above {schema['exclusiveMinimum']}"] if "exclusiveMinimum" in schema else []
    if low is not None:
        words.append(f"{low} or more" if high is None else f"{low} to {high}")
    elif high is not None:
        words.append(f"up to {high}")
    return f" ({', '.join(words)}{unit})" if words else ""

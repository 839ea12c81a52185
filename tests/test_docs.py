import ast
import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
from docs import build
from docs.routes import route_pages
from openai.types.chat.completion_create_params import CompletionCreateParamsBase as OpenAiChat
from openai.types.completion_create_params import CompletionCreateParamsBase as OpenAiCompletion
from prometheus_client import Counter

from tera.contract import chat, completions, fields, json_body
from tera.contract.chat import ChatRequest
from tera.contract.completions import CompletionRequest
from tera.contract.openapi import openapi_document
from tera.observability import Metrics

ROOT = Path(__file__).parents[1]
API = (ROOT / "docs/api.md").read_text()
OPERATIONS = (ROOT / "docs/operations.md").read_text()
CONTRACT = (ROOT / "docs/contract.md").read_text()
DOCUMENT = openapi_document()

COMPLETIONS = "`POST /v1/completions`"
CHAT = "`POST /v1/chat/completions`"

BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "maxLength", "maxItems", "maxProperties")
"""JSON schema's words that a field's row has to tell."""

WRITTEN = {str(2**31 - 1): "2^31-1", str(-(2**63)): "-2^63", str(2**63 - 1): "2^63-1"}
"""Numbers that are unreadable in full."""


def section(title: str, page: str = API) -> str:
    """Return the text below a heading of a page, up to the next one."""
    found = re.search(rf"^#+ {re.escape(title)}\n(.*?)(?=^#|\Z)", page, re.MULTILINE | re.DOTALL)
    assert found is not None, title
    return found[1]


def rows(text: str) -> list[list[str]]:
    """Return the cells of a Markdown table, without its head."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def names(text: str) -> list[str]:
    """Return what is written as code."""
    return re.findall(r"`([^`]+)`", text)


def field_table(title: str) -> dict[str, str]:
    """Return what Tera does with each field, in the table's order."""
    return {field: tera for fields, tera, *_ in rows(section(title)) for field in names(fields)}


def ignored() -> set[str]:
    return set(names(section("Ignored fields")))


REQUESTS = [
    pytest.param(COMPLETIONS, CompletionRequest, id="completions"),
    pytest.param(CHAT, ChatRequest, id="chat"),
]


@pytest.mark.parametrize(("title", "kind"), REQUESTS)
def test_every_field_is_documented_in_the_order_of_reported_faults(title: str, kind: Any) -> None:
    assert list(field_table(title)) == list(kind.model_fields)


def test_bounds_on_what_a_request_holds_are_documented() -> None:
    constants = [
        item for module in (json_body, fields, chat, completions) for item in vars(module).items()
    ]
    bounds = {value for name, value in constants if name.startswith("MAX_")}
    table = {int(most.replace(",", "")) for most, _ in rows(section("Requests"))}
    assert table == bounds - {json_body.MAX_JSON_DEPTH, chat.MAX_MODALITIES}


@pytest.mark.parametrize(("title", "kind"), REQUESTS)
def test_documented_ranges_and_defaults_are_those_of_the_types(title: str, kind: Any) -> None:
    table = field_table(title)
    schema = DOCUMENT["components"]["schemas"][kind.__name__]
    for field, described in schema["properties"].items():
        cell = table[field]
        for bound in BOUNDS:
            if bound in described:
                number = str(described[bound])
                assert WRITTEN.get(number, number) in re.split(r"[\s;,]", cell), (field, bound)
        if "default" in described:
            default = described["default"]
            text = str(default).lower() if isinstance(default, bool) else f"{default:g}"
            assert f"default {text}" in cell, field
        required = "required" in re.split("; ", cell)
        assert required is (field in schema["required"]), field


@pytest.mark.parametrize(
    ("title", "theirs"),
    [
        pytest.param(COMPLETIONS, OpenAiCompletion, id="completions"),
        pytest.param(CHAT, OpenAiChat, id="chat"),
    ],
)
def test_every_field_of_openai_is_documented(title: str, theirs: Any) -> None:
    assert set(theirs.__annotations__) - set(field_table(title)) <= ignored()


@pytest.mark.parametrize(
    ("title", "folder", "kind"),
    [
        pytest.param(COMPLETIONS, "completion", "CompletionRequest", id="completions"),
        pytest.param(CHAT, "chat_completion", "ChatCompletionRequest", id="chat"),
    ],
)
def test_every_field_of_vllm_is_documented(title: str, folder: str, kind: str) -> None:
    package = importlib.util.find_spec("vllm")
    assert package is not None
    assert package.origin is not None
    # Read and not imported: the import takes seconds.
    source = Path(package.origin).parent / "entrypoints/openai" / folder / "protocol.py"
    (found,) = (
        node
        for node in ast.parse(source.read_text()).body
        if isinstance(node, ast.ClassDef) and node.name == kind
    )
    theirs = {
        node.target.id
        for node in found.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    public = {name for name in theirs if not name.startswith("_")}
    assert public - set(field_table(title)) <= ignored()


def test_nothing_is_said_to_be_ignored_that_is_not() -> None:
    everywhere = {*CompletionRequest.model_fields} & {*ChatRequest.model_fields}
    assert ignored().isdisjoint(everywhere)


def test_every_error_is_documented() -> None:
    documented = {
        (int(status), kind.strip("`"), code.strip("`"))
        for status, kind, code, _ in rows(section("Errors"))
    }
    described = {
        (int(status), example["value"]["error"]["type"], example["value"]["error"]["code"])
        for operation in DOCUMENT["paths"]["/v1/completions"].values()
        for status, response in operation["responses"].items()
        if "$ref" in response
        for example in _examples(response["$ref"].rpartition("/")[2])
    }
    assert documented == described


def _examples(response: str) -> list[Any]:
    content = DOCUMENT["components"]["responses"][response]["content"]["application/json"]
    return list(content["examples"].values())


def test_every_header_is_documented() -> None:
    documented = {name for cell, *_ in rows(section("Headers")) for name in names(cell)}
    assert set(DOCUMENT["components"]["headers"]) <= documented


def test_every_path_is_documented() -> None:
    documented = names(section("API"))
    for path, operations in DOCUMENT["paths"].items():
        for method in operations:
            assert f"{method.upper()} {path}" in documented


def test_every_metric_is_documented() -> None:
    table = rows(section("Health and metrics", OPERATIONS))
    documented = [name for cell, *_ in table for name in names(cell)]
    metrics = [it for it in vars(Metrics()).values() if hasattr(it, "_name")]
    assert metrics
    for metric in metrics:
        name = metric._name + ("_total" if isinstance(metric, Counter) else "")
        assert name in documented


UNBUILT = "*Not built yet.*"
UNTESTED = "*Not tested:"
# A rule is named in prose by its name, and by a test in the test's own name.
IN_PROSE = re.compile(r"\b([HEALCSBMTURNVKPX])-(\d{1,2})\b")
IN_TEST_NAME = re.compile(r"\btest_([healcsbmturnvkpx])(\d{1,2})_")


def rules() -> dict[str, str]:
    """Return each rule of the contract with its text, to which its section's mark is added."""
    found: list[tuple[str, str]] = []
    for part in CONTRACT.split("\n## "):
        head, *texts = re.split(r'(?=^- <a id="[A-Z]-\d+"></a>)', part, flags=re.MULTILINE)
        mark = UNBUILT if UNBUILT in head.partition("\n")[2] else ""
        for text in texts:
            anchor, name = re.findall(r'<a id="(.*?)"></a>\*\*(.*?)\*\*', text)[0]
            assert anchor == name
            found.append((name, text + mark))
    assert len(found) == len(dict(found))
    return dict(found)


def rules_named_in(*folders: str) -> set[str]:
    """Return the rules that sources and pages below these folders name."""
    here = Path(__file__)
    paths = [path for it in folders for path in (ROOT / it).rglob("*.*") if path != here]
    texts = [path.read_text() for path in paths if path.suffix in (".py", ".md", ".lua")]
    named = [it for text in texts for it in IN_PROSE.findall(text) + IN_TEST_NAME.findall(text)]
    return {f"{letter.upper()}-{number}" for letter, number in named}


def test_every_rule_that_is_named_is_in_the_contract() -> None:
    assert rules_named_in("platform", "tests", "docs", "benchmarks", "k8s", "helm") <= set(rules())


def test_every_rule_that_is_built_is_named_by_a_test_or_says_why_not() -> None:
    excused = {name for name, text in rules().items() if UNBUILT in text or UNTESTED in text}
    assert set(rules()) - rules_named_in("tests") == excused


def test_readme_leads_to_every_page() -> None:
    readme = (ROOT / "README.md").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert f"](docs/{page.name})" in readme


def test_every_page_is_in_the_sites_navigation_once(tmp_path: Path) -> None:
    routes = build.gather(tmp_path)
    shown = [
        name
        for part in build.settings(routes)["nav"]
        for entries in part.values()
        for name in build.named(entries)
    ]
    assert sorted(shown) == sorted(str(it.relative_to(tmp_path)) for it in tmp_path.rglob("*.md"))


def test_every_test_that_the_threat_model_names_is_there() -> None:
    named = re.findall(
        r"`(tests/\S+\.py)::(test_\w+)`", (ROOT / "docs/threat-model.md").read_text()
    )
    assert len(named) > 20
    for path, name in named:
        assert re.search(rf"def {name}\(", (ROOT / path).read_text()), name


def test_every_link_of_a_page_leads_to_something(tmp_path: Path) -> None:
    build.gather(tmp_path)  # which raises where one does not; `make docs` looks at headings too


def test_every_path_that_contributors_are_led_to_is_there() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text()
    paths = [it for it in names(page) if re.fullmatch(r"[a-z][a-z_./-]*(/|\.[a-z]+)", it)]
    assert "gateway/pipeline.py" in paths
    places = (ROOT, ROOT / "platform/tera", ROOT / "tests")
    assert not [path for path in paths if not any((it / path).exists() for it in places)]


def test_every_route_has_a_page_with_its_fields_and_errors() -> None:
    pages = route_pages(DOCUMENT)
    for path, operations in DOCUMENT["paths"].items():
        for method, operation in operations.items():
            title = f"{method.upper()} {path}"
            (page,) = (it for it in pages.values() if it.startswith(f"# {title}\n"))
            assert f"`{title}`" in pages["index.md"]
            assert operation["summary"] in page
    completions, chat = (pages[f"post-v1-{it}.md"] for it in ("completions", "chat-completions"))
    for page, kind in ((completions, CompletionRequest), (chat, ChatRequest)):
        for field in kind.model_fields:
            if field in DOCUMENT["components"]["schemas"][kind.__name__]["properties"]:
                assert f"| `{field}` |" in page
    for _, _, code, _ in rows(section("Errors")):
        assert code in completions


def test_what_a_page_of_a_route_names_is_on_it() -> None:
    for page in route_pages(DOCUMENT).values():
        there = {title.lower() for title in re.findall("^### (.*)$", page, re.MULTILINE)}
        assert set(re.findall(r"\]\(#(.*?)\)", page)) <= there

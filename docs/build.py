"""Builds the documentation as a site, into build/site: `make docs`.

The pages are the repository's own Markdown files. They are gathered in a folder that has the
repository's tree, so each link between them leads to the same page on the site as it does in the
repository, and Zensical, in strict mode, refuses those that lead nowhere.
"""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import yaml
from docs.routes import route_pages

from tera.contract.openapi import openapi_document

ROOT = Path(__file__).parents[1].resolve()
BUILD = ROOT / "build"
PAGES = ("*.md", "docs/*.md", "docs/decisions/*.md", "k8s/**/*.md", "benchmarks/*.md")
LINK = re.compile(r"(?<=\]\()([^)#\s:]+)(#[^)\s]*)?(?=\))")
"""A link to a file of the repository; one to another place has a scheme, and so a colon."""
MEANING = re.compile(r"^\| \[.*?\]\((.*?)\) \| (.*) \|$", re.MULTILINE)
"""What the README's table says of a page."""


def pages() -> list[Path]:
    """Return the repository's pages."""
    return sorted({path for each in PAGES for path in ROOT.glob(each)})


def gather(target: Path) -> list[str]:
    """Fill an empty folder with the repository's pages and those of the routes.

    Returns:
        The routes' pages, in the order in which they are shown.

    Raises:
        FileNotFoundError: a page has a link to what is not there.
    """
    repository = site()["repo_url"]
    for page in pages():
        there = target / page.relative_to(ROOT)
        there.parent.mkdir(parents=True, exist_ok=True)
        there.write_text(_with_repository_links(page, repository))
    document = openapi_document()
    (target / "openapi.json").write_text(json.dumps(document, indent=2, ensure_ascii=False))
    (target / "routes").mkdir()
    texts = {f"routes/{name}": text for name, text in route_pages(document).items()}
    for name, text in texts.items():
        (target / name).write_text(text)
    return list(texts)


def _with_repository_links(page: Path, repository: str) -> str:
    """Return a page whose links to what is no page of the site lead to the repository."""
    on_site = set(pages())

    def follow(link: re.Match[str]) -> str:
        path = (page.parent / link[1]).resolve(strict=True)
        if path in on_site:
            return link[0]
        kind = "tree" if path.is_dir() else "blob"
        return f"{repository}/{kind}/main/{path.relative_to(ROOT)}"

    return LINK.sub(follow, page.read_text())


def site() -> dict[str, Any]:
    """Return the site's settings as they are written."""
    written: dict[str, Any] = yaml.safe_load((ROOT / "docs/site.yml").read_text())
    return written


def settings(routes: list[str]) -> dict[str, Any]:
    """Return the site's settings with each folder's pages, and with what goes into llms.txt."""
    made = site()
    decisions = [str(it.relative_to(ROOT)) for it in pages() if it.parent.name == "decisions"]
    folders = {"routes": routes, "docs/decisions": decisions}
    meanings = dict(MEANING.findall((ROOT / "README.md").read_text()))
    sections = {}
    for part in made["nav"]:
        for title, entries in part.items():
            for folder in (it for it in entries if isinstance(it, dict)):
                folder.update({name: folders[where] for name, where in folder.items()})
            sections[title] = [{name: meanings.get(name, "")} for name in named(entries)]
    (llms_txt,) = (it["llmstxt"] for it in made["plugins"] if "llmstxt" in it)
    llms_txt["sections"] = sections
    return {**made, "docs_dir": "docs", "site_dir": "site"}


def named(entries: list[Any]) -> Iterator[str]:
    """Yield the pages of a part of the navigation, those of its folders among them."""
    for entry in entries:
        yield from [entry] if isinstance(entry, str) else chain(*entry.values())


def main() -> int:
    """Build the site and return Zensical's exit code: 1 where a link leads nowhere."""
    shutil.rmtree(BUILD / "docs", ignore_errors=True)
    routes = gather(BUILD / "docs")
    configuration = BUILD / "site.yml"
    configuration.write_text(yaml.safe_dump(settings(routes), sort_keys=False))
    build = [sys.executable, "-m", "zensical", "build", "--strict", "--clean", "--config-file"]
    return subprocess.run([*build, str(configuration)], check=False).returncode  # noqa: S603  our own arguments


if __name__ == "__main__":
    sys.exit(main())

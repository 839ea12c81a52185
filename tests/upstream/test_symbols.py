"""What `Symbol` and `Literal` find in another package's source, without importing it."""

from pathlib import Path

import pytest

from tera.errors import StartError
from tera.upstream import symbols
from tera.upstream.symbols import PAGE, Literal, Need, Symbol, check, missing

ROOT = Path(__file__).parents[2]
ENGINE = """
raise RuntimeError("imported")
from elsewhere import Other as Renamed

if HAS_GPU:
    def sample(logits): ...
else:
    def sample(logits): ...

class Engine:
    limit: int = 3

    def __init__(self, path, *, threads=1):
        self.load = 0

    async def run(self, prompt, options, seed=None, *, tag): ...

    def step(self): ...

    def any(self, *args, **kwargs): ...
"""


@pytest.fixture(autouse=True)
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "somebodys" / "core"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text('raise RuntimeError("imported")')
    (folder / "__init__.py").write_text("SETTING = 'SOMEBODYS_SETTING'")
    (folder / "engine.py").write_text(ENGINE)
    monkeypatch.syspath_prepend(tmp_path)
    symbols._tree.cache_clear()


def engine(name: str, **kinds: str | bool) -> Symbol:
    return Symbol("somebodys.core.engine", name, "tests", **kinds)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "need",
    [
        engine("Engine"),
        engine("Renamed"),
        engine("sample", exact="logits"),
        engine("Engine", call="path"),
        engine("Engine", call="path threads"),
        engine("Engine.limit"),
        engine("Engine.load"),
        engine("Engine.run", call="prompt options tag", awaited=True),
        engine("Engine.run", exact="self prompt options seed tag", awaited=True),
        engine("Engine.step", call=""),
        engine("Engine.any", call="whatever"),
        Literal("somebodys.core", "SOMEBODYS_SETTING", "tests"),
    ],
    ids=str,
)
def test_what_is_there_is_found(need: Need) -> None:
    assert list(missing([need])) == []


@pytest.mark.parametrize(
    ("need", "fault"),
    [
        (Symbol("nobodys.engine", "Engine", "tests"), "there is no such module"),
        (Symbol("somebodys.core.gone", "Engine", "tests"), "there is no such module"),
        (engine("Motor"), "it is not there"),
        (engine("Engine.limits"), "it is not there"),
        (engine("Renamed.run"), "it is not there"),
        (engine("Engine.limit", call=""), "it is no function"),
        (engine("Engine.run", call="prompt options", awaited=True), "it also needs tag"),
        (engine("Engine.step", call="prompt"), "it does not take prompt"),
        (engine("Engine.step", exact="self prompt"), "its parameters are «self»"),
        (engine("Engine.step", call="", awaited=True), "it is no coroutine"),
        (engine("Engine.run", call="prompt options tag"), "it is a coroutine"),
        (Literal("somebodys.core", "SETTING", "tests"), "it is not there"),
    ],
    ids=str,
)
def test_what_has_changed_is_named(need: Need, fault: str) -> None:
    (line,) = missing([need])
    assert line == f"{need}: {fault}. Needed: tests"


def test_a_check_names_everything_and_the_page_to_read() -> None:
    check([engine("Engine")])
    with pytest.raises(StartError) as raised:
        check([engine("Motor"), engine("Engine"), engine("Gearbox")])
    assert "core.engine.Motor" in raised.value.message
    assert "core.engine.Gearbox" in raised.value.message
    assert PAGE in raised.value.message
    assert (ROOT / PAGE).is_file()

"""What Tera uses of vLLM against the vLLM that is installed, read and not imported.

With another vLLM in a folder of its own, `PYTHONPATH=<folder> pytest tests/upstream/test_vllm.py`
says what it would take to move to that one; see docs/upgrading-ray-and-vllm.md.
"""

import ast
from collections.abc import Iterator
from dataclasses import fields
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tera.config.vllm_arguments import VLLM_ARGUMENTS
from tera.engine import bounds, vllm_args, vllm_plugin, vllm_worker
from tera.errors import ConfigError, StartError
from tera.gateway.request import Conversation
from tera.upstream import symbols, vllm, vllm_grammar, vllm_penalties, vllm_text, xgrammar
from tera.upstream.symbols import Need, Symbol, missing

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "platform" / "tera").rglob("*.py"))
NEEDS = [
    *vllm.NEEDS,
    *vllm_grammar.NEEDS,
    *vllm_penalties.NEEDS,
    *vllm_penalties.V1_NEEDS,
    *vllm_penalties.V2_NEEDS,
    *vllm_text.NEEDS,
    *xgrammar.NEEDS,
]


@pytest.mark.parametrize("need", NEEDS, ids=str)
def test_vllm_has_what_tera_uses_of_it(need: Need) -> None:
    assert list(missing([need])) == []


def imported() -> Iterator[Symbol]:
    """Yield each name that Tera imports of vLLM, wherever."""
    for source in SOURCES:
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
                for alias in node.names:
                    yield Symbol(node.module or "", alias.name, source.name)


@pytest.mark.parametrize("name", sorted({*imported()}, key=str), ids=str)
def test_vllm_has_every_name_that_tera_imports(name: Symbol) -> None:
    as_module = symbols._tree(f"{name.module}.{name.name}") is not None
    assert as_module or list(missing([name])) == []


def test_values_are_checked_by_the_arguments_of_vllm() -> None:
    # Those that begin with an underscore are for vllm's own server.
    public = {name for name in vllm.argument_names() if not name.startswith("_")}
    assert public - VLLM_ARGUMENTS == VLLM_ARGUMENTS - public == set()


def test_a_conversation_is_what_vllms_renderer_reads() -> None:
    assert {field.name for field in fields(Conversation)} == {*vllm_text.CHAT_FIELDS}


def test_xgrammar_enforces_the_formats_that_vllm_says() -> None:
    module = symbols._tree("vllm.v1.structured_output.backend_xgrammar")
    assert module is not None
    (formats,) = (
        ast.literal_eval(statement.value)
        for statement in module.body
        if isinstance(statement, ast.Assign)
        and ast.unparse(statement.targets[0]) == "STRING_SUPPORTED_FORMATS"
    )
    assert formats == xgrammar.FORMATS


def test_a_vllm_without_any_of_it_is_refused_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    symbols._tree.cache_clear()
    try:
        starts: list[Any] = [
            vllm.check_engine,
            vllm.argument_names,
            vllm_plugin.register,
            lambda: vllm_penalties.count_resumed_in_v1(SimpleNamespace()),  # type: ignore[arg-type]
            lambda: vllm_penalties.count_resumed_in_v2(SimpleNamespace()),  # type: ignore[arg-type]
            lambda: vllm_text.VllmText.load("model", {}, {}),
            vllm_grammar.leave_check_to_gateways,
        ]
        for start in starts:
            with pytest.raises(StartError, match=symbols.PAGE):
                start()
    finally:
        symbols._tree.cache_clear()


def test_vllm_finds_the_plugin_and_the_worker_extension() -> None:
    (plugin,) = entry_points(group=vllm.PLUGIN_GROUP, name=vllm.PLUGIN)
    assert plugin.load() is vllm_plugin.register
    module, _, name = vllm_args.WORKER_EXTENSION.rpartition(".")
    assert module == vllm_worker.__name__
    assert getattr(vllm_worker, name) is vllm_worker.WorkerExtension


def test_a_bias_is_bounded_by_what_vllm_has_room_for() -> None:
    tree = symbols._tree("vllm.v1.worker.gpu.sample.logit_bias")
    assert tree is not None
    (size,) = (
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        and [ast.unparse(it) for it in node.targets] == ["MAX_NUM_LOGIT_BIAS_TOKENS"]
    )
    assert ast.literal_eval(size) == bounds.MAX_LOGIT_BIAS_TOKENS


@pytest.mark.parametrize("allowed", [None, ["tera"], ["other", "tera"]])
def test_the_plugin_is_loaded(allowed: list[str] | None) -> None:
    vllm.check_plugin(allowed)


@pytest.mark.parametrize("allowed", [[], ["other"]])
def test_a_setting_that_leaves_the_plugin_out_is_refused(allowed: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"^VLLM_PLUGINS: "):
        vllm.check_plugin(allowed)


def test_a_plugin_that_is_not_installed_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "PLUGIN", "somebodys")
    with pytest.raises(StartError, match=symbols.PAGE):
        vllm.check_plugin(None)

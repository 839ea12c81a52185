"""Declares what Tera needs of other packages' private parts, and checks that it exists.

Ray and vLLM release every few weeks, and Tera uses some parts of them that are not public API. Each
such part is a `Symbol` next to the code that uses it. Symbols are looked up in the package's
source, which takes milliseconds where an import takes seconds: `check` does so when a process
starts, and `tests/upstream` for all of them at once.
"""

import ast
import importlib.util
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from tera.errors import StartError

PAGE = "docs/upgrading-ray-and-vllm.md"

_Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, slots=True)
class Symbol:
    """Something that a module of another package must define.

    A function's parameters are given in one of two ways. `call` lists those that we pass, by
    position or name: all must exist, and no other may be required. `exact` lists all parameters in
    order, for a function that we replace.
    """

    module: str
    name: str
    """Such as `run`, `Engine.run` or, for an attribute set in methods, `Engine.load`."""
    why: str
    call: str | None = None
    """Names separated by spaces; empty for a call without arguments."""
    exact: str | None = None
    awaited: bool = False
    """Whether a function is a coroutine function."""

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(frozen=True, slots=True)
class Literal:
    """A string that a module must contain, such as the name of an environment variable."""

    module: str
    text: str
    why: str

    def __str__(self) -> str:
        return f"{self.text!r} in {self.module}"


Need = Symbol | Literal


def check(needs: Iterable[Need]) -> None:
    """Check that the installed packages have all of `needs`.

    Raises:
        StartError: they do not; the message names each missing one and the page with instructions.
    """
    faults = list(missing(needs))
    _tree.cache_clear()  # a module's tree takes megabytes
    if faults:
        raise StartError(
            "\n".join([*faults, f"This version is not one that Tera works with; see {PAGE}."])
        )


def missing(needs: Iterable[Need]) -> Iterator[str]:
    """Yield one line for each need that is not met."""
    for need in needs:
        if (fault := _fault(need)) is not None:
            yield f"{need}: {fault}. Needed: {need.why}"


def _fault(need: Need) -> str | None:
    """Return what is wrong with a need, or None."""
    tree = _tree(need.module)
    if tree is None:
        return "there is no such module"
    if isinstance(need, Literal):
        texts = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant))
        return None if need.text in texts else "it is not there"
    found = _definition(tree, need.name.split("."))
    if found is None:
        return "it is not there"
    if need.call is None and need.exact is None:
        return None
    function = _constructor(found) if isinstance(found, ast.ClassDef) else found
    if not isinstance(function, _Function):
        return "it is no function"
    if need.awaited != isinstance(function, ast.AsyncFunctionDef):
        return "it is no coroutine" if need.awaited else "it is a coroutine"
    if need.exact is not None:
        parameters = " ".join(_names(function))
        return None if parameters == need.exact else f"its parameters are «{parameters}»"
    return _call_fault(function, (need.call or "").split(), is_method="." in need.name)


@lru_cache(maxsize=64)
def _tree(module: str) -> ast.Module | None:
    """Return a module's syntax tree, without importing it or its package."""
    package, *inner = module.split(".")
    spec = importlib.util.find_spec(package)
    for root in spec.submodule_search_locations or [] if spec is not None else []:
        path = Path(root, *inner)
        for source in (path / "__init__.py", path.with_suffix(".py")):
            if source.is_file():
                return ast.parse(source.read_text(encoding="utf-8"))
    return None


def _definition(tree: ast.Module | ast.ClassDef, path: list[str]) -> ast.AST | None:
    name, *inner = path
    for node in _statements(tree):
        if name in _defined(node):
            if not inner:
                return node
            if isinstance(node, ast.ClassDef):
                return _definition(node, inner)
    if isinstance(tree, ast.ClassDef) and not inner:
        return _attribute(tree, name)
    return None


def _statements(tree: ast.Module | ast.ClassDef) -> Iterator[ast.stmt]:
    """Yield the statements of a body, last first, since the last definition counts.

    Statements within an `if` or `try` are included, as possible definitions.
    """
    for node in reversed(tree.body):
        if isinstance(node, ast.If | ast.Try):
            yield from (inner for inner in ast.walk(node) if isinstance(inner, ast.stmt))
        yield node


def _defined(node: ast.stmt) -> set[str]:
    match node:
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
            return {name}
        case ast.Assign(targets=targets):
            return {target.id for target in targets if isinstance(target, ast.Name)}
        case ast.AnnAssign(target=ast.Name(id=name)):
            return {name}
        case ast.Import(names=names) | ast.ImportFrom(names=names):
            return {alias.asname or alias.name for alias in names}
        case _:
            return set()


def _attribute(owner: ast.ClassDef, name: str) -> ast.AST | None:
    """Return the node where a method sets `self.name`."""
    for node in ast.walk(owner):
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Store)
            and node.attr == name
            and isinstance(node.value, ast.Name)
            and node.value.id == "self"
        ):
            return node
    return None


def _constructor(owner: ast.ClassDef) -> ast.AST | None:
    return _definition(owner, ["__init__"])


def _names(function: _Function) -> list[str]:
    arguments = function.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    return [
        *(argument.arg for argument in named),
        *([f"*{arguments.vararg.arg}"] if arguments.vararg else []),
        *([f"**{arguments.kwarg.arg}"] if arguments.kwarg else []),
    ]


def _call_fault(function: _Function, given: list[str], *, is_method: bool) -> str | None:
    arguments = function.args
    positional = [*arguments.posonlyargs, *arguments.args]
    without_default = positional[: len(positional) - len(arguments.defaults)]
    needed = {argument.arg for argument in without_default}
    needed |= {
        argument.arg
        for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
        if default is None
    }
    names = set(_names(function))
    unbound = {"self", "cls"} if is_method or function.name == "__init__" else set()
    if unknown := [name for name in given if name not in names and not arguments.kwarg]:
        return f"it does not take {', '.join(unknown)}"
    if more := sorted(needed - set(given) - unbound):
        return f"it also needs {', '.join(more)}"
    return None

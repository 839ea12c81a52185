"""Which grammars wait for which, and which results are kept, with a scripted compiler."""

import asyncio
from collections import Counter
from functools import partial
from typing import Any

import psutil
import pytest
from tests.routing.conftest import until

from tera.errors import EngineOverloadedError, InternalError
from tera.gateway import grammars
from tera.gateway.grammar_compiler import plain
from tera.gateway.grammars import (
    LEAST_WAITING_BYTES,
    Compiler,
    Fault,
    Grammars,
    Outcome,
    Vocabulary,
)

TOKENS = Vocabulary(lambda: "")
GOOD = Outcome(None, [])


class ScriptedCompiler(Compiler):
    """Ends compiling a grammar when the test says so, and as it says."""

    def __init__(self) -> None:
        super().__init__()
        self.compiling: dict[str, asyncio.Future[Outcome | None]] = {}
        self.begun: Counter[str] = Counter()

    async def compile(self, vocabulary: Vocabulary, kind: str, text: str) -> Outcome | None:
        self.begun[text] += 1
        self.compiling[text] = asyncio.get_running_loop().create_future()
        try:
            return await self.compiling[text]
        finally:
            del self.compiling[text]

    def end(self, text: str, outcome: Outcome | None = GOOD) -> None:
        self.compiling[text].set_result(outcome)


def check(known: Grammars, tenant: str, text: str) -> "asyncio.Task[Fault | None]":
    return asyncio.create_task(known.check(tenant, TOKENS, "json", text))


async def test_x2_a_tenants_slow_grammars_wait_for_each_other_alone() -> None:
    compiler = ScriptedCompiler()
    known = Grammars(compiler)
    slow = [check(known, "hostile", f"slow {n}") for n in range(20)]
    await until(lambda: "slow 0" in compiler.compiling)
    quick = check(known, "acme", "quick")
    await until(lambda: "quick" in compiler.compiling)
    assert {*compiler.compiling} == {"slow 0", "quick"}
    compiler.end("quick")
    assert await quick is None
    compiler.end("slow 0", None)
    refused = await slow[0]
    assert refused is not None
    assert "5 s" in refused.reason
    await until(lambda: "slow 1" in compiler.compiling)
    for task in slow[1:]:
        task.cancel()
    compiler.end("slow 1")


async def test_x2_a_tenants_waiting_grammars_are_bounded_and_leave_room_for_others() -> None:
    compiler = ScriptedCompiler()
    known = Grammars(compiler, most_waiting_bytes=4 * LEAST_WAITING_BYTES)
    flood = [check(known, "hostile", f"slow {n}") for n in range(6)]
    await until(flood[5].done)
    with pytest.raises(EngineOverloadedError, match="structured output") as refused:
        await flood[5]
    assert refused.value.retry_after_s is not None
    # Another tenant's first begins at once; its second takes the place of the flood's latest.
    others = [check(known, "acme", f"quick {n}") for n in range(2)]
    await until(flood[4].done)
    with pytest.raises(EngineOverloadedError):
        await flood[4]
    for n, asked in enumerate(others):
        await until(partial(compiler.compiling.__contains__, f"quick {n}"))
        compiler.end(f"quick {n}")
        assert await asked is None
    for n, asked in enumerate(flood[:4]):
        await until(partial(compiler.compiling.__contains__, f"slow {n}"))
        compiler.end(f"slow {n}")
        assert await asked is None


async def test_x2_a_client_that_leaves_gives_no_second_turn() -> None:
    compiler = ScriptedCompiler()
    known = Grammars(compiler)
    leaving = check(known, "hostile", "left behind")
    await until(lambda: "left behind" in compiler.compiling)
    leaving.cancel()
    await asyncio.gather(leaving, return_exceptions=True)
    following = check(known, "hostile", "next")
    other = check(known, "acme", "other")
    await until(lambda: "other" in compiler.compiling)
    compiler.end("other")
    assert await other is None
    assert {*compiler.compiling} == {"left behind"}
    compiler.end("left behind")
    await until(lambda: "next" in compiler.compiling)
    compiler.end("next")
    assert await following is None


async def test_a_grammar_is_compiled_once_for_all_who_send_it_at_once() -> None:
    compiler = ScriptedCompiler()
    known = Grammars(compiler)
    asked = [check(known, "acme", "same") for _ in range(10)]
    await until(lambda: "same" in compiler.compiling)
    compiler.end("same", Outcome("it is wrong", []))
    assert await asyncio.gather(*asked) == [Fault("it is wrong", unsupported=False)] * 10
    assert compiler.begun == {"same": 1}


async def test_x2_no_tenant_learns_what_another_has_sent() -> None:
    compiler = ScriptedCompiler()
    known = Grammars(compiler)
    for tenant in ("acme", "other"):
        asked = check(known, tenant, "same")
        await until(lambda: "same" in compiler.compiling)
        compiler.end("same")
        assert await asked is None
    assert compiler.begun == {"same": 2}


def known_or_begun(asked: asyncio.Task[Any], compiler: ScriptedCompiler) -> bool:
    """Return whether a check has ended, or had to begin to compile."""
    return asked.done() or bool(compiler.compiling)


async def test_the_memory_of_grammars_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammars, "REMEMBERED", 2)
    compiler = ScriptedCompiler()
    known = Grammars(compiler)
    for text in ("a", "b", "a", "c", "a", "b"):
        asked = check(known, "acme", text)
        await until(partial(known_or_begun, asked, compiler))
        if not asked.done():
            compiler.end(text)
        await asked
    assert compiler.begun == {"a": 1, "b": 2, "c": 1}


async def test_what_took_too_long_may_be_tried_again() -> None:
    compiler = ScriptedCompiler()
    known = Grammars(compiler)
    for outcome in (None, GOOD):
        asked = check(known, "acme", "slow")
        await until(lambda: "slow" in compiler.compiling)
        compiler.end("slow", outcome)
        await asked
    assert compiler.begun == {"slow": 2}


async def test_what_would_not_be_enforced_is_unsupported() -> None:
    compiler = ScriptedCompiler()
    asked = check(Grammars(compiler), "acme", "half")
    await until(lambda: "half" in compiler.compiling)
    compiler.end("half", Outcome(None, ["multipleOf is ignored"]))
    assert await asked == Fault("multipleOf is ignored", unsupported=True)


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        (
            '[20:40:18] /project/cpp/json_schema.cc:4944: Unsupported type "x"\n',
            'Unsupported type "x"',
        ),
        ("[20:40:18] /project/cpp/a.cc:1: Bad.\nTraceback: /usr/lib/a.py", "Bad"),
        ("", "it is not valid"),
    ],
)
def test_h9_no_message_names_a_file_of_xgrammars(message: str, shown: str) -> None:
    assert plain(message) == shown


async def test_a_closed_compiler_leaves_no_process() -> None:
    compiler = Compiler()
    before = psutil.Process().children()
    compiling = asyncio.create_task(compiler.compile(TOKENS, "json", "{}"))
    await until(lambda: psutil.Process().children() != before)
    compiler.close()
    assert psutil.Process().children() == before
    with pytest.raises(InternalError):
        await compiling

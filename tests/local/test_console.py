import io

import pytest
from rich.console import Console

from tera.local.console import StageConsole
from tera.local.serve import RunningPlatform

HIDE_CURSOR, SHOW_CURSOR = "\x1b[?25l", "\x1b[?25h"


def console(*, terminal: bool) -> tuple[StageConsole, io.StringIO]:
    written = io.StringIO()
    rich = Console(file=written, force_terminal=terminal, width=60, soft_wrap=True)
    return StageConsole(rich), written


def test_without_a_terminal_each_stage_is_two_lines() -> None:
    stages, written = console(terminal=False)
    stages.stage("Model [x]")
    stages.progress("half", 0.5)  # a bar would fill a log
    stages.progress("one [a] is up")
    stages.done("there")
    begin, step, end = written.getvalue().splitlines()
    assert begin == "… Model [x]"
    assert step == "  one [a] is up"
    assert end.startswith("✓ Model [x] (there) ")
    assert end.endswith(" s")


@pytest.mark.parametrize("ended", ["done", "failed"])
def test_a_terminal_has_its_cursor_back_after_a_stage(ended: str) -> None:
    stages, written = console(terminal=True)
    stages.stage("Engines")
    stages.progress("one [/a] is up")
    getattr(stages, ended)()
    text = written.getvalue()
    assert text.count(HIDE_CURSOR) == text.count(SHOW_CURSOR) == 1
    assert "one [/a] is up" in text
    *_, last = text.splitlines()
    assert {"done": "✓", "failed": "✗"}[ended] in last
    assert "Engines" in last


def test_a_given_up_stage_says_so_in_its_line() -> None:
    stages, written = console(terminal=False)
    stages.stage("Ray")
    stages.failed()
    assert written.getvalue().splitlines()[-1].startswith("✗ Ray ")


def test_what_is_there_to_be_pasted_is_not_broken() -> None:
    stages, written = console(terminal=False)
    key = "sk-tera-" + "x" * 80
    stages.ready(RunningPlatform("http://127.0.0.1:8000", key, "sim/[one]", 1.5))
    assert f"API key   {key}" in written.getvalue().splitlines()
    assert '"model": "sim/[one]"' in written.getvalue()

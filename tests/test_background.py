from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from tera.background import Background, end

if TYPE_CHECKING:
    import pytest


class Work(Background):
    """Runs until it is cancelled, if nothing fails."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.began = asyncio.Event()
        self.ended = asyncio.Event()

    async def _run(self) -> None:
        self.began.set()
        try:
            if self.error is not None:
                raise self.error
            await asyncio.Event().wait()
        finally:
            self.ended.set()


async def test_work_goes_on_for_as_long_as_the_block_and_has_ended_after_it() -> None:
    async with Work() as work:
        await work.began.wait()
        assert not work.ended.is_set()
    assert work.ended.is_set()


async def test_work_that_fails_is_told_with_its_error_and_the_block_ends_as_ever(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with Work(RuntimeError("out of paper")) as work:
        await work.ended.wait()
        await asyncio.sleep(0)  # asyncio tells of a task's end in the next turn of its loop
    (record,) = caplog.records
    assert record.message == "Work has failed and does not go on."
    assert record.exc_info is not None
    assert str(record.exc_info[1]) == "out of paper"


async def test_a_cancellation_that_is_lost_is_sent_again() -> None:
    lost = 0

    async def loses_two() -> None:
        nonlocal lost
        while True:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                if lost == 2:
                    raise
                lost += 1

    task = asyncio.create_task(loses_two())
    await asyncio.sleep(0)
    await end(task)
    assert task.cancelled()
    assert lost == 2


async def test_a_task_that_has_failed_already_is_ended_without_its_error() -> None:
    async def fails() -> None:
        raise RuntimeError

    task = asyncio.create_task(fails())
    await asyncio.wait([task])
    await end(task)
    assert isinstance(task.exception(), RuntimeError)

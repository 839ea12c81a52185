"""Several coroutines that succeed or fail together."""

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any


async def all_or_none(work: Sequence[Coroutine[Any, Any, None]]) -> None:
    """Run all to completion; the first error cancels the others and is raised."""
    if len(work) == 1:
        await work[0]
        return
    tasks = [asyncio.create_task(each) for each in work]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

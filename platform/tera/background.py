"""Background work: one task that starts and ends with a block."""

import asyncio
import logging
from types import TracebackType
from typing import Self

logger = logging.getLogger(__name__)

_CANCEL_AGAIN_S = 0.01


class Background:
    """Does its work in one task while its `async with` block runs.

    A subclass implements `_run`, which is cancelled when the block ends. To do something before the
    task starts or after it has ended, extend `__aenter__` or `__aexit__`.
    """

    _task: asyncio.Task[None]

    async def _run(self) -> None:
        """Do the work until there is none left; must survive any failure within it."""
        raise NotImplementedError

    async def __aenter__(self) -> Self:
        """Start the work."""
        self._task = asyncio.create_task(self._run(), name=type(self).__name__)
        self._task.add_done_callback(_tell_if_it_failed)
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """End the work, whatever it is doing."""
        await end(self._task)


async def end(task: asyncio.Task[None]) -> None:
    """Cancel a task, repeatedly until it has ended; its error, if any, is not raised here.

    Before Python 3.12, `asyncio.wait_for`, which redis-py uses, may lose a cancellation that
    arrives just as the awaited work completes (bpo-42130).
    """
    while not task.done():
        task.cancel()
        await asyncio.wait([task], timeout=_CANCEL_AGAIN_S)


def _tell_if_it_failed(task: asyncio.Task[None]) -> None:
    # Nobody awaits the task, so this is where its error would be lost.
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.error("%s has failed and does not go on.", task.get_name(), exc_info=error)

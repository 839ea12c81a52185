"""How late the event loop is: what one request can do to all the others of a gateway replica."""

import asyncio
from collections.abc import Callable
from typing import Final

from tera.background import Background

INTERVAL_S: Final = 0.05
"""Between looks; a look costs some 20 µs. A shorter stall may fall between two of them."""


class LoopLag(Background):
    """Measures for as long as its block runs how much later than due the event loop wakes a task.

    Whatever holds the loop holds every stream of the process, whoever's they are.
    """

    def __init__(self, observe: Callable[[float], None], interval_s: float = INTERVAL_S) -> None:
        """`observe` is called with each lag, in seconds."""
        self._observe = observe
        self._interval_s = interval_s

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + self._interval_s
            await asyncio.sleep(self._interval_s)
            self._observe(max(0.0, loop.time() - due))

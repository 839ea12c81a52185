"""Runs long text work (parsing, templates, tokenising) in threads, fairly between tenants.

Threads and not processes: a process would have to send back up to a million token ids or thousands
of messages, and unpickling those blocks the event loop as well; vLLM's text side also takes 0.7 GB
per process. docs/decisions/0008-text-in-threads.md has the measurements.
"""

import asyncio
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any, TypeVar

from tera.gateway.fair_pool import FairPool

WORKERS = 2
"""Threads. Most of their work needs the GIL, so each additional thread slows down the event loop,
which waits for a thread to release it; see `SWITCH_INTERVAL_S` in `deployment.py`."""

SHORT_BYTES = 8192
"""Requests with bodies of up to this size are parsed and rendered on the event loop. The costliest,
some two hundred messages without text, takes 10 ms."""

MOST_WAITING_BYTES = 64 * 1024 * 1024
"""Bytes of waiting texts, all of which are in memory: six of the largest, or hundreds of ordinary
long ones."""

R = TypeVar("R")


class TextPool:
    """A few threads that tenants use in turns; see `FairPool`."""

    def __init__(
        self,
        workers: int = WORKERS,
        most_waiting_bytes: int = MOST_WAITING_BYTES,
        clock: Callable[[], float] = time.monotonic,
        executor: Executor | None = None,
    ) -> None:
        """Threads are started when there is work for them.

        Args:
            workers: pieces that run at once.
            most_waiting_bytes: of all waiting texts; a single larger one may wait alone.
            clock: monotonic seconds.
            executor: runs the pieces; by default a thread pool of its own.
        """
        self._executor = executor or ThreadPoolExecutor(workers, "text")
        self._turns = FairPool(workers, most_waiting_bytes, "long requests", clock)

    @property
    def waiting(self) -> int:
        """The number of waiting pieces."""
        return self._turns.waiting

    async def run(self, tenant: str, size_bytes: int, work: Callable[[], R]) -> R:
        """Call `work` in a thread and return its result.

        Args:
            tenant: the tenant that the work is for.
            size_bytes: size of the text.
            work: must not touch anything that belongs to the event loop.

        Raises:
            EngineOverloadedError: too much is waiting already; see its `retry_after_s`.
        """

        def begin() -> asyncio.Future[R]:
            return asyncio.get_running_loop().run_in_executor(self._executor, work)

        return await self._turns.run(tenant, size_bytes, begin)

    async def render(
        self, tenant: str, size_bytes: int, render: Callable[[], Coroutine[Any, Any, R]]
    ) -> R:
        """Run a coroutine in a thread with an event loop of its own; see `run`."""
        return await self.run(tenant, size_bytes, lambda: asyncio.run(render()))

    def close(self) -> None:
        """Accept no more work; running pieces are completed."""
        self._executor.shutdown(wait=False, cancel_futures=True)

"""What an engine pushes, as an async generator."""

import asyncio
from collections.abc import AsyncGenerator

from tera.engine.base import TextEngine
from tera.errors import TeraError
from tera.generation import Generation, TokenDelta


async def streamed(engine: TextEngine, generation: Generation) -> AsyncGenerator[TokenDelta]:
    """Yield what the engine emits; closing it early aborts the generation.

    Raises:
        TeraError: the generation ended without a finish reason.
    """
    pushed: asyncio.Queue[TokenDelta | TeraError] = asyncio.Queue()
    abort = engine.start(generation, pushed.put_nowait, pushed.put_nowait)
    try:
        while True:
            delta = await pushed.get()
            if isinstance(delta, TeraError):
                raise delta
            yield delta
            if delta.finish_reason is not None:
                return
    finally:
        abort()

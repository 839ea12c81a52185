"""Clients that ask again and again while something happens to the platform."""

import asyncio
import itertools
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from benchmarks.streams import Answer, StreamClient
from tests.serve.conftest import Platform

Body = dict[str, Any]


def greedy(model: str, number: int, max_tokens: int = 100) -> Body:
    """Return a request of its own prompt, whose text is always the same."""
    prompt = f"Story number {number} of what happened"
    return {"model": model, "prompt": prompt, "temperature": 0, "max_tokens": max_tokens}


def faults(answers: Sequence[Answer]) -> set[str]:
    """Return why answers are not whole."""
    return {answer.error for answer in answers} - {""}


class Load:
    """So many clients within its block; at its end each finishes the stream that it has begun."""

    def __init__(self, platform: Platform, bodies: Sequence[Body], *, clients: int) -> None:
        self._platform = platform
        self._bodies = bodies
        self._numbers = itertools.cycle(range(len(bodies)))
        self._count = clients
        self._clients: list[asyncio.Task[None]] = []
        self._stopping = False
        self.answers: list[tuple[int, Answer]] = []
        """With the number of the body that each answers."""

    async def __aenter__(self) -> Self:
        self._clients = [asyncio.create_task(self._client()) for _ in range(self._count)]
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stopping = True
        if exc is not None:
            for client in self._clients:
                client.cancel()
        await asyncio.gather(*self._clients, return_exceptions=exc is not None)

    async def _client(self) -> None:
        async with StreamClient(self._platform.port, self._platform.api_key) as connection:
            while not self._stopping:
                number = next(self._numbers)
                self.answers.append((number, await connection.ask(self._bodies[number])))

    def texts_differ_from(self, undisturbed: Sequence[Answer]) -> list[int]:
        """Return the numbers of the bodies that got another text, or no whole answer."""
        return [
            number
            for number, answer in self.answers
            if answer.error or answer.choices != undisturbed[number].choices
        ]

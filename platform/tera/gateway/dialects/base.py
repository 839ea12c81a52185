"""What a dialect is: one API's way to ask for text and to be answered."""

from collections.abc import Callable
from typing import Any, Protocol

from tera.gateway.exchange import Exchange
from tera.gateway.pieces import Answer
from tera.gateway.relay import Events, StreamedAnswer
from tera.gateway.request import TextRequest


class WholeAnswer(Answer, Protocol):
    """An answer that is sent once, when it is complete."""

    def body(self) -> bytes:
        """Return the JSON that the pieces add up to."""
        ...


class Question(Protocol):
    """A request of one API that was read and found right."""

    @property
    def request(self) -> TextRequest:
        """What the client wants, in the form that the pipeline knows."""
        ...

    @property
    def stream(self) -> bool:
        """Whether the client wants it as it is made."""
        ...

    def streamed(self, exchange: Exchange, events: Events) -> StreamedAnswer:
        """Return the answer as events."""
        ...

    def whole(self, exchange: Exchange) -> WholeAnswer:
        """Return the answer as one object."""
        ...


Dialect = Callable[[dict[str, Any]], Question]
"""Reads the JSON object of a request's body.

Raises:
    InvalidRequestError: it is not a request of this API.
"""


class Unblocked:
    """The side of an `Answer` that has no client to wait for."""

    blocked = False

    async def free(self) -> None:
        """Return: it is never blocked."""


class Streamed:
    """The side of an `Answer` that writes events."""

    def __init__(self, events: Events) -> None:
        self._events = events

    @property
    def blocked(self) -> bool:
        """Whether the client does not keep up."""
        return self._events.blocked

    async def free(self) -> None:
        """Wait until it does."""
        await self._events.free()

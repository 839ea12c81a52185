"""The interface of a dialect: how one API asks for text and is answered."""

from collections.abc import Callable
from typing import Any, Protocol

from tera.gateway.exchange import Exchange
from tera.gateway.pieces import Answer
from tera.gateway.relay import Events, StreamedAnswer
from tera.gateway.request import TextRequest


class WholeAnswer(Answer, Protocol):
    """An answer that is sent once, when it is complete."""

    def body(self) -> bytes:
        """Return the JSON of all the pieces together."""
        ...


class Question(Protocol):
    """A valid request of one API."""

    @property
    def request(self) -> TextRequest:
        """What the client wants, in the form that the pipeline knows."""
        ...

    @property
    def stream(self) -> bool:
        """Whether the client wants the answer as it is generated."""
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
    """The flow control of an `Answer` that has no client to wait for."""

    blocked = False

    async def free(self) -> None:
        """Return at once: it is never blocked."""


class Streamed:
    """The flow control of an `Answer` that writes events."""

    def __init__(self, events: Events) -> None:
        self._events = events

    @property
    def blocked(self) -> bool:
        """Whether the client does not keep up."""
        return self._events.blocked

    async def free(self) -> None:
        """Wait until it does."""
        await self._events.free()

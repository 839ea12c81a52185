"""Where bodies are parsed."""

import asyncio
import json
import threading
from collections.abc import Callable
from typing import Any

import pytest
from pydantic import model_validator

from tera.contract.common import Request, parse_request
from tera.errors import InvalidRequestError
from tera.gateway.parsing import INLINE_BYTES, SHARED_BYTES, RequestParser


class Watched(Request):
    """A request that knows in which thread it was validated."""

    x: str
    thread: int = 0

    @model_validator(mode="before")
    @classmethod
    def _watched(cls, values: Any) -> Any:
        return {**values, "thread": threading.get_ident()}


def watched(values: dict[str, Any]) -> Watched:
    return parse_request(Watched, values)


def body(size: int, x: Any = "") -> bytes:
    """Return a body of exactly that size."""
    short = json.dumps({"x": x, "padding": ""}).encode()
    return json.dumps({"x": x, "padding": "y" * (size - len(short))}).encode()


async def test_x1_a_large_body_is_parsed_off_the_event_loop() -> None:
    parser = RequestParser()
    small = await parser.parse(watched, body(INLINE_BYTES))
    large = await parser.parse(watched, body(INLINE_BYTES + 1))
    assert small.thread == threading.get_ident() != large.thread


@pytest.mark.parametrize(("size", "at_once"), [(SHARED_BYTES, 4), (SHARED_BYTES + 1, 1)])
async def test_x1_the_largest_bodies_are_parsed_one_at_a_time(
    monkeypatch: pytest.MonkeyPatch, size: int, at_once: int
) -> None:
    running = most = 0

    async def to_thread(function: Callable[..., Any], *arguments: Any) -> Any:
        nonlocal running, most
        running += 1
        most = max(most, running)
        for _ in range(10):  # every other task has its turns
            await asyncio.sleep(0)
        running -= 1
        return function(*arguments)

    monkeypatch.setattr(asyncio, "to_thread", to_thread)
    parser = RequestParser()
    large = body(size)
    assert len(await asyncio.gather(*(parser.parse(watched, large) for _ in range(4)))) == 4
    assert most == at_once


@pytest.mark.parametrize("size", [INLINE_BYTES, INLINE_BYTES + 1])
async def test_e2_a_refusal_is_the_same_wherever_it_comes_from(size: int) -> None:
    with pytest.raises(InvalidRequestError, match="expected a string, but got 5"):
        await RequestParser().parse(watched, body(size, x=5))

"""Where bodies are parsed."""

import json
import threading
from typing import Any

import pytest
from pydantic import model_validator

from tera.contract.common import Request, parse_request
from tera.errors import InvalidRequestError
from tera.gateway.parsing import RequestParser
from tera.gateway.text_pool import SHORT_BYTES, TextPool


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


def parser() -> RequestParser:
    return RequestParser(TextPool())


async def test_x1_a_large_body_is_parsed_off_the_event_loop() -> None:
    small = await parser().parse("acme", watched, body(SHORT_BYTES))
    large = await parser().parse("acme", watched, body(SHORT_BYTES + 1))
    assert small.thread == threading.get_ident() != large.thread


@pytest.mark.parametrize("size", [SHORT_BYTES, SHORT_BYTES + 1])
async def test_e2_a_refusal_is_the_same_wherever_it_comes_from(size: int) -> None:
    with pytest.raises(InvalidRequestError, match="expected a string, but got 5"):
        await parser().parse("acme", watched, body(size, x=5))

"""What the dearest bodies that we know of may cost, in memory and in steps, never in seconds."""

import sys
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from benchmarks.hostile_bodies import BODIES
from pydantic import ValidationError

from tera.contract import json_slices
from tera.contract.chat import ChatRequest
from tera.contract.common import Request, parse_request
from tera.contract.completions import CompletionRequest
from tera.contract.json_body import parse_json_object
from tera.contract.json_slices import SLICE_BYTES
from tera.errors import InvalidRequestError

MOST_BYTES = 10 * 1024 * 1024
"""Of a body, by default."""
MOST_MEMORY = 200 * 1024 * 1024

MOST_CALLS = {256 * 1024: 100_000, MOST_BYTES: 250_000}
"""Of functions in Python, or from it, while a body of this size is read. In ten megabytes there
are up to five million values, and each had some."""

HEAVY = [
    *("messages of zeros", "ignored arrays", "nested arrays", "as many strings as may be"),
    *("as many strings of commas as may be", "as many token ids as fractions as may be"),
    "as many huge fractions as may be",
]
"""One of each kind."""


def read(kind: type[Request], body: bytes) -> InvalidRequestError | None:
    """Read a body as the gateway does; return what it is refused with."""
    try:
        parse_request(kind, parse_json_object(body))
    except InvalidRequestError as error:
        return error
    return None


@pytest.mark.parametrize("name", HEAVY)
def test_x1_a_body_takes_bounded_memory(name: str) -> None:
    kind, make = BODIES[name]
    body = make(MOST_BYTES)
    tracemalloc.start()
    try:
        read(kind, body)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < MOST_MEMORY


@contextmanager
def counted_calls() -> Iterator[Callable[[], int]]:
    """Count the calls that are made in the block, of functions in Python and in C."""
    calls = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        yield lambda: calls
    finally:
        sys.setprofile(before)


@pytest.mark.parametrize("size", MOST_CALLS)
@pytest.mark.parametrize("name", BODIES)
def test_x1_a_body_takes_a_bounded_number_of_steps(name: str, size: int) -> None:
    kind, make = BODIES[name]
    body = make(size)
    with counted_calls() as calls:
        read(kind, body)
    assert calls() < MOST_CALLS[size]


@pytest.mark.parametrize("name", HEAVY)
def test_x1_no_call_into_a_decoder_is_long(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # A decoder holds the GIL, and so the event loop, up to its return.
    decode, decoded = json_slices._decoder.decode, [0]

    def counting(text: bytes) -> Any:
        decoded.append(len(text.strip()))
        return decode(text)

    monkeypatch.setattr(json_slices, "_decoder", SimpleNamespace(decode=counting))
    kind, make = BODIES[name]
    read(kind, make(MOST_BYTES))
    assert max(decoded) < 2 * SLICE_BYTES


def test_x1_a_decoder_leaves_fractions_to_python() -> None:
    # By itself it takes 12 µs for 1.5e300: ten megabytes of them held the event loop for 14 s.
    assert json_slices._decoder.float_hook is float


ARRAYS = [
    pytest.param(ChatRequest, "messages", id="messages"),
    pytest.param(ChatRequest, "tools", id="tools"),
    pytest.param(ChatRequest, "modalities", id="modalities"),
    pytest.param(ChatRequest, "stop", id="stop"),
    pytest.param(CompletionRequest, "prompt", id="prompt"),
    pytest.param(CompletionRequest, "stop", id="completion-stop"),
]
WRONG: tuple[list[Any], ...] = ([None] * 8, [{}] * 8, [True] * 8, [[]] * 8)


@pytest.mark.parametrize(("kind", "field"), ARRAYS)
@pytest.mark.parametrize("entries", WRONG, ids=str)
def test_x1_an_array_is_read_up_to_its_first_wrong_entry(
    kind: type[Request], field: str, entries: list[Any]
) -> None:
    others = {"model": "m", "messages": [{"role": "user", "content": "Hello"}], "prompt": "One"}
    with pytest.raises(InvalidRequestError) as refused:
        parse_request(kind, {**others, field: entries})
    cause = refused.value.__cause__
    assert isinstance(cause, ValidationError)
    assert len({fault["loc"][:2] for fault in cause.errors() if fault["loc"][0] == field}) == 1


LONG = "confidential " * 2000
HELLO = {"role": "user", "content": "Hello"}
CLOCK = {"type": "function", "function": {"name": "clock"}}

REPEATING: list[tuple[type[Request], dict[str, Any]]] = [
    (CompletionRequest, {"prompt": "One", "logit_bias": {LONG: 0}}),
    (CompletionRequest, {"prompt": "One", "logit_bias": {"1": LONG}}),
    (CompletionRequest, {"prompt": "One", "max_tokens": -(10**300)}),
    (CompletionRequest, {"prompt": "One", "user": LONG}),
    (CompletionRequest, {"prompt": [LONG, 5]}),
    (ChatRequest, {"messages": [{**HELLO, "role": LONG}]}),
    (ChatRequest, {"messages": [{**HELLO, "content": [{"type": LONG}]}]}),
    (ChatRequest, {"messages": [HELLO], "tool_choice": LONG}),
    (ChatRequest, {"messages": [HELLO], "tools": [{"type": LONG}]}),
    (ChatRequest, {"messages": [HELLO], "tools": [{**CLOCK, "function": {"name": LONG}}]}),
    (
        ChatRequest,
        {
            "messages": [HELLO],
            "tools": [CLOCK] * 128,
            "tool_choice": {"type": "function", "function": {"name": LONG}},
        },
    ),
    (ChatRequest, {"messages": [HELLO], "response_format": {"type": LONG}}),
    (ChatRequest, {"messages": [HELLO], "max_completion_tokens": 10**300, "max_tokens": 1}),
]


@pytest.mark.parametrize(("kind", "fields"), REPEATING, ids=lambda it: str(it)[:60])
def test_h9_no_message_repeats_much_of_a_request(
    kind: type[Request], fields: dict[str, Any]
) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        parse_request(kind, {"model": "m", **fields})
    assert len(refused.value.message) < 500
    assert "confidential confidential confidential" not in refused.value.message
    assert len(refused.value.param or "") < 100

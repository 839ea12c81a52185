"""What no input may break: each target reads bytes, and raises if a promise does not hold."""

import asyncio
import json
import tempfile
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, cast

import msgspec
from tests.gateway.dialects.answering import streamed
from tests.haproxies import rendered

from tera import haproxy, wire
from tera.contract import json_slices
from tera.contract.chat import ChatRequest
from tera.contract.common import error_envelope
from tera.contract.completions import CompletionRequest
from tera.contract.json_body import parse_json_object
from tera.engine.link import GatewayLink
from tera.errors import InvalidRequestError
from tera.gateway.dialects.chat import ChatQuestion
from tera.gateway.dialects.completions import CompletionQuestion
from tera.gateway.pieces import Piece
from tera.generation import (
    FinishReason,
    Order,
    ReplicaLoad,
    StepFrame,
    TokenDelta,
    decode_frame,
    decode_order,
    encode,
)
from tera.routing.link import ReplicaLink, ReplicaLinks

Target = Callable[[bytes], None]

SECRET = "fuzzed"  # noqa: S105  of nothing
_MOST_PIECES = 64


def bodies(data: bytes) -> None:
    """A body is a request or a 400, the same however it is cut, and as Python reads it."""
    slice_bytes, body = data[:1], data[1:]
    found = _read(body)
    whole, json_slices.SLICE_BYTES = json_slices.SLICE_BYTES, 1 + (slice_bytes or b"\0")[0] % 32
    try:
        cut = _read(body)
    finally:
        json_slices.SLICE_BYTES = whole
    assert cut == found, "it depends on where the body is cut"
    if found is None:
        return
    assert repr(found) == repr(json.loads(body)), "another parser reads it differently"
    for question in (CompletionQuestion, ChatQuestion):
        refusal = _refusal(question, found)
        if refusal is not None:
            message = msgspec.json.decode(error_envelope(refusal))["error"]["message"]
            assert len(message) < 2000, "a message repeats a request"


def _refusal(
    question: Callable[[dict[str, Any]], object], body: dict[str, Any]
) -> InvalidRequestError | None:
    try:
        question(body)
    except InvalidRequestError as error:
        return error
    return None


def _read(body: bytes) -> dict[str, Any] | None:
    try:
        return parse_json_object(body)
    except InvalidRequestError:
        return None


def events(data: bytes) -> None:
    """Whatever a model says, each event is one line of JSON, and together they are the text."""
    texts = data.decode("utf-8", "replace").split("\x00")[:_MOST_PIECES]
    pieces = [Piece(0, text) for text in texts] + [Piece(0, "", FinishReason.STOP)]
    messages = [{"role": "user", "content": "a"}]
    for question, path in (
        (CompletionQuestion({"model": "m", "prompt": "a", "stream": True}), ("text",)),
        (ChatQuestion({"model": "m", "messages": messages, "stream": True}), ("delta", "content")),
    ):
        told = _loop().run_until_complete(streamed(question, pieces))
        assert "".join(_at(chunk["choices"][0], path) for chunk in told) == "".join(texts)


def _at(value: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        value = (value or {}).get(name)
    return value or ""


def frames(data: bytes) -> None:
    """What either end of the token channel is sent is taken or closes the connection."""
    for payload in _payloads(data):
        _same_again(decode_frame, payload)
        _same_again(decode_order, payload)
    _loop().run_until_complete(_sent_to_both_ends(data))


def _payloads(data: bytes) -> list[bytes]:
    try:
        return [data, *wire.take_frames(bytearray(data), 65_536)]
    except ValueError:
        return [data]


def _same_again(decode: Callable[[bytes], msgspec.Struct], payload: bytes) -> None:
    """Whatever is read as a record is written as one that reads the same."""
    try:
        record = decode(payload)
    except msgspec.MsgspecError:
        return
    assert repr(decode(encode(record))) == repr(record)


async def _sent_to_both_ends(data: bytes) -> None:
    gateway = ReplicaLink(ReplicaLinks("127.0.0.1", SECRET))
    replica = GatewayLink("replica", SECRET, _Worker())
    ends: tuple[ReplicaLink | GatewayLink, ...] = (gateway, replica)
    wires = [_Wire(), _Wire()]
    for end, transport in zip(ends, wires, strict=True):
        end.connection_made(cast(asyncio.Transport, transport))
    for _ in range(3):  # the handshake: nonce, proof, proof
        for receiver, sender in ((1, 0), (0, 1)):
            sent, wires[sender].written = wires[sender].written, b""
            ends[receiver].data_received(sent)
    assert replica.ready.done()
    assert gateway.replica_id == "replica"
    half = len(data) // 2
    for end, transport in zip(ends, wires, strict=True):
        for part in (data[:half], data[half:]):
            if not transport.closed:
                end.data_received(part)
        end.connection_lost(None)


class _Wire:
    """A transport that keeps what is written."""

    def __init__(self) -> None:
        self.written = b""
        self.closed = False

    def write(self, data: bytes) -> None:
        self.written += data

    def abort(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed


class _Worker:
    """Obeys without doing anything."""

    def load(self) -> ReplicaLoad:
        return ReplicaLoad()

    def obey(self, link: GatewayLink, order: Order) -> None:
        assert link.ready.done()

    def lost(self, link: GatewayLink) -> None:
        pass


def rewriting(data: bytes) -> None:
    """Ray's configuration, whatever becomes of its lines, is completed whole or refused."""
    lines = _configuration().splitlines(keepends=True)
    for place, action, *text in (data[at : at + 8] for at in range(0, len(data) - 2, 8)):
        line = place % len(lines)
        added = bytes(text).decode("utf-8", "replace")
        lines[line] = ("", added + "\n", lines[line] * 2, added + lines[line])[action % 4]
        lines = "".join(lines).splitlines(keepends=True) or [""]
    page = Path("/tera-500.http")
    try:
        done = haproxy.complete("".join(lines), page, "127.0.0.1", haproxy.Bounds(1000, 10))
    except haproxy.UnknownTemplateError:
        return
    for needed in ("x-request-timeout-seconds", "path,url_dec -i -m beg /-/", str(page)):
        assert needed in done


@cache
def _configuration() -> str:
    with tempfile.TemporaryDirectory() as directory:
        return rendered(Path(directory), 8000).read_text(encoding="utf-8")


@cache
def _loop() -> asyncio.AbstractEventLoop:
    return asyncio.new_event_loop()


TARGETS: Mapping[str, Target] = {
    "bodies": bodies,
    "events": events,
    "frames": frames,
    "rewriting": rewriting,
}

_ASKED = {
    "model": "m",
    "stop": ["a"],
    "logit_bias": {"5": 1.5},
    "stream": True,
    "stream_options": {"include_usage": True},
}
_FRAME = StepFrame(ReplicaLoad(1, 2, 0.5), [TokenDelta(1, [5, 6], FinishReason.STOP)], [], [7])

SEEDS: Mapping[str, list[bytes]] = {
    "bodies": [
        b"\x05" + json.dumps({**_ASKED, "prompt": [[1, 2], [3.0]]}).encode(),
        b"\x09" + json.dumps({**_ASKED, "messages": [{"role": "user", "content": "a"}]}).encode(),
        b'\x00{"a":[1,2,{"b":"\\u00e9\\ud83d\\ude80"}],"c":[1e300,-0.5,null,true]}',
    ],
    "events": ["a\x00b\n\nc\x00\ud7ff🚀\u2028".encode()],
    "frames": [wire.pack(encode(_FRAME)) * 2, encode(_FRAME)],
    "rewriting": [b"\x05\x01abcdef", b"\x07\x02abcdef\x10\x00abcdef"],
}
"""What the search begins with."""

WORDS: Mapping[str, list[str]] = {
    "bodies": [
        *(f'"{name}":' for name in {**CompletionRequest.model_fields, **ChatRequest.model_fields}),
        *('"role":"user"', '"content":', '"type":"text"', '"json_schema"', "true", "null", "1e999"),
    ]
}
"""What the search puts into inputs, beside what it learns."""

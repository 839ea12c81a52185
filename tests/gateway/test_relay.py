"""What a client is sent, byte by byte, and what its hang-up ends."""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from starlette.responses import Response
from starlette.types import Message
from tests.gateway.conftest import Client
from tests.routing.conftest import until

from tera.errors import BackendFailureError, ContextLengthError, TeraError
from tera.gateway.relay import (
    DONE,
    KEEP_ALIVE,
    MAX_WRITE_BYTES,
    ClientGoneError,
    EventStream,
    answered,
    while_connected,
)

FAILURE = BackendFailureError("The engines failed.")
NEVER_S = 3600.0


class Events:
    """Events that come when the test says so, and whether who reads them has closed them."""

    def __init__(self, *events: bytes) -> None:
        self._queue: asyncio.Queue[bytes | Exception | None] = asyncio.Queue()
        self.closed = False
        self.say(*events)

    def say(self, *events: bytes | Exception | None) -> None:
        """Let events come, an error, or with None the end."""
        for event in events:
            self._queue.put_nowait(event)

    async def stream(self) -> AsyncGenerator[bytes]:
        try:
            while (event := await self._queue.get()) is not None:
                if isinstance(event, Exception):
                    raise event
                yield event
        finally:
            await asyncio.sleep(0)  # closing may have to wait, as for an engine
            self.closed = True

    @property
    def next_is_here(self) -> bool:
        return not self._queue.empty()


class Relay:
    """One `EventStream` under way, and its client."""

    def __init__(
        self, events: Events, client: Client | None = None, *, keep_alive_s: float = NEVER_S
    ) -> None:
        self.events = events
        self.client = client or Client()
        self.errors: list[TeraError] = []
        stream = EventStream(
            events.stream(),
            send=self.client.send,
            next_is_here=lambda: events.next_is_here,
            keep_alive_s=keep_alive_s,
            on_error=self.errors.append,
        )
        self.task = asyncio.create_task(self._run(stream))

    async def _run(self, stream: EventStream) -> None:
        await stream({"type": "http"}, self.client.receive, self.client.send)

    async def ended(self) -> None:
        async with asyncio.timeout(10):
            await self.task


async def turns(number: int = 20) -> None:
    """Let everything happen that waits for nothing."""
    for _ in range(number):
        await asyncio.sleep(0)


def envelope_of(event: bytes) -> Any:
    assert event.startswith(b"data: ")
    assert event.endswith(b"\n\n")
    return json.loads(event.removeprefix(b"data: "))


async def test_s5_nothing_is_sent_before_the_first_event_and_then_each_at_once() -> None:
    relay = Relay(Events())
    await turns()
    assert relay.client.sent == []
    relay.events.say(b"data: 1\n\n")
    await until(lambda: len(relay.client.sent) == 2)
    assert relay.client.status == 200
    assert dict(relay.client.sent[0]["headers"]) == {
        b"content-type": b"text/event-stream; charset=utf-8",
        b"cache-control": b"no-cache",
        b"x-accel-buffering": b"no",
    }
    relay.events.say(b"data: 2\n\n")
    await until(lambda: len(relay.client.sent) == 3)
    relay.events.say(None)
    await relay.ended()
    assert relay.client.writes == [b"data: 1\n\n", b"data: 2\n\n", DONE]
    assert [message.get("more_body") for message in relay.client.sent[1:]] == [True, True, False]
    assert relay.events.closed
    assert relay.errors == []


async def test_s5_events_that_are_here_together_leave_together() -> None:
    relay = Relay(Events(b"data: 1\n\n", b"", b"data: 2\n\n"))
    await until(lambda: len(relay.client.sent) == 2)
    assert relay.client.writes == [b"data: 1\n\ndata: 2\n\n"]
    relay.events.say(b"", None)  # an event that says nothing is no write
    await relay.ended()
    assert relay.client.writes[1:] == [DONE]


async def test_s9_a_write_is_bounded() -> None:
    event = b"data: " + b"x" * 1000 + b"\n\n"
    relay = Relay(Events(*[event] * 200))
    relay.events.say(None)
    await relay.ended()
    assert relay.client.body == event * 200 + DONE
    assert len(relay.client.writes) > 1
    assert max(map(len, relay.client.writes)) < MAX_WRITE_BYTES + len(event) + len(DONE)


@pytest.mark.parametrize(
    "error",
    [
        pytest.param(ContextLengthError("Too long."), id="of the request"),
        pytest.param(FAILURE, id="of the backend"),
        pytest.param(RuntimeError("a defect"), id="a defect"),
    ],
)
async def test_s6_an_error_before_the_first_event_is_raised(error: Exception) -> None:
    relay = Relay(Events())
    relay.events.say(b"", error)
    with pytest.raises(type(error)) as raised:
        await relay.ended()
    assert raised.value is error
    assert relay.client.sent == []
    assert relay.events.closed


@pytest.mark.parametrize(
    ("error", "code"),
    [
        pytest.param(FAILURE, "backend_failure", id="of the backend"),
        pytest.param(RuntimeError("a defect"), "internal_error", id="a defect"),
    ],
)
@pytest.mark.parametrize("at_once", [True, False])
async def test_s6_an_error_after_it_is_one_event_and_no_done(
    error: Exception, code: str, at_once: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)
    relay = Relay(Events(b"data: 1\n\n"))
    if not at_once:
        await until(lambda: len(relay.client.sent) == 2)
    relay.events.say(error)
    await relay.ended()
    assert relay.client.status == 200
    assert relay.client.ended
    first, event = relay.client.body.split(b"\n\n", 1)
    assert first == b"data: 1"
    found = envelope_of(event)["error"]
    assert found.keys() == {"message", "type", "param", "code"}
    assert (found["type"], found["code"]) == ("server_error", code)
    assert b"a defect" not in event
    assert [error.code for error in relay.errors] == [code]
    assert relay.events.closed


async def test_s7_silence_before_the_first_event_is_broken() -> None:
    relay = Relay(Events(), keep_alive_s=0.01)
    await until(lambda: relay.client.body.count(KEEP_ALIVE) >= 2)
    assert relay.client.status == 200
    relay.events.say(b"data: 1\n\n", None)
    await relay.ended()
    spoken = [write for write in relay.client.writes if write != KEEP_ALIVE]
    assert b"".join(spoken) == b"data: 1\n\n" + DONE
    assert relay.client.ended


async def test_s7_silence_between_events_is_broken() -> None:
    relay = Relay(Events(b"data: 1\n\n"), keep_alive_s=0.01)
    await until(lambda: relay.client.body.startswith(b"data: 1\n\n" + KEEP_ALIVE))
    relay.events.say(None)
    await relay.ended()
    assert relay.client.body.endswith(DONE)


async def test_s6_an_error_after_a_keep_alive_is_an_event() -> None:
    relay = Relay(Events(), keep_alive_s=0.01)
    await until(lambda: KEEP_ALIVE in relay.client.body)
    relay.events.say(FAILURE)
    await relay.ended()
    event = relay.client.writes[-1]
    assert envelope_of(event)["error"]["code"] == "backend_failure"
    assert relay.client.ended
    assert [error.code for error in relay.errors] == ["backend_failure"]


class Slow(Client):
    """A client that does not take the last write until the test lets it."""

    def __init__(self) -> None:
        super().__init__()
        self.takes = asyncio.Event()

    async def send(self, message: Message) -> None:
        await super().send(message)
        if message.get("more_body") is False:
            await self.takes.wait()


async def test_s1_nothing_follows_the_last_write() -> None:
    client = Slow()
    relay = Relay(Events(b"data: 1\n\n"), client, keep_alive_s=0.005)
    relay.events.say(None)
    await until(lambda: client.ended)
    await asyncio.sleep(0.05)  # ten times the silence that would be broken
    client.takes.set()
    await relay.ended()
    assert client.ended


@pytest.mark.parametrize("events", [[], [b"data: 1\n\n"]], ids=["before", "after the first event"])
async def test_s8_a_hang_up_closes_the_events(events: list[bytes]) -> None:
    relay = Relay(Events(*events))
    await turns()
    relay.client.hang_up()
    await relay.ended()
    assert relay.events.closed
    assert relay.client.body == b"".join(events)
    assert not relay.client.ended
    assert relay.errors == []


class Gone(Client):
    """A client whose server raises when it is written to, as ASGI 2.4 has it."""

    async def send(self, message: Message) -> None:
        if "body" in message:
            raise OSError("the connection is closed")
        await super().send(message)


async def test_s8_a_write_that_fails_is_a_hang_up() -> None:
    relay = Relay(Events(b"data: 1\n\n"), Gone())
    await relay.ended()
    assert relay.events.closed
    assert relay.client.body == b""
    assert relay.errors == []


async def test_b6_a_cancel_from_elsewhere_passes_through_and_closes_the_events() -> None:
    relay = Relay(Events(b"data: 1\n\n"))
    await until(lambda: relay.client.body != b"")
    relay.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await relay.ended()
    assert relay.events.closed


async def test_a_stream_leaves_no_task_behind() -> None:
    before = asyncio.all_tasks()
    relay = Relay(Events(b"data: 1\n\n"), keep_alive_s=0.01)
    await turns()
    relay.client.hang_up()
    await relay.ended()
    await until(lambda: asyncio.all_tasks() <= before)


async def test_an_answer_is_what_the_work_makes() -> None:
    client, response = Client(), Response(b"{}")

    async def work() -> Response:
        await asyncio.sleep(0)
        return response

    assert await answered(client.receive, work()) is response


async def test_s8_a_hang_up_cancels_the_work() -> None:
    client, cancelled = Client(), asyncio.Event()

    async def work() -> Response:
        try:
            await asyncio.get_running_loop().create_future()
        except asyncio.CancelledError:
            await asyncio.sleep(0)  # what closes may have to wait
            cancelled.set()
            raise
        raise AssertionError("nothing ends this but a cancel")

    answering = asyncio.create_task(answered(client.receive, work()))
    await turns()
    client.hang_up()
    with pytest.raises(ClientGoneError):
        await answering
    assert cancelled.is_set()
    assert not answering.cancelled()
    assert answering.cancelling() == 0


async def test_the_bodys_rest_is_no_hang_up() -> None:
    client, may_end = Client({}), asyncio.Event()

    async def work() -> Response:
        await may_end.wait()
        return Response()

    answering = asyncio.create_task(answered(client.receive, work()))
    await turns()
    assert not answering.done()
    may_end.set()
    await answering


async def test_an_error_of_the_work_passes_through() -> None:
    async def work() -> Response:
        raise FAILURE

    with pytest.raises(BackendFailureError) as raised:
        await answered(Client().receive, work())
    assert raised.value is FAILURE


@pytest.mark.parametrize("gone_too", [True, False])
async def test_b6_a_cancel_from_elsewhere_passes_through(gone_too: bool) -> None:
    client = Client()

    async def work() -> Response:
        found: Response = await asyncio.get_running_loop().create_future()
        return found

    answering = asyncio.create_task(answered(client.receive, work()))
    await turns()
    if gone_too:
        client.hang_up()
    answering.cancel()
    with pytest.raises(asyncio.CancelledError):
        await answering
    assert answering.cancelled()


async def test_a_hang_up_that_comes_with_the_end_cancels_nothing_after_it() -> None:
    gone, may_end = asyncio.Event(), asyncio.Event()

    async def receive() -> Message:
        await gone.wait()
        return {"type": "http.disconnect"}

    async def request() -> str:
        async with while_connected(receive):
            await may_end.wait()
        await turns()  # the answer is sent
        return "answered"

    answering = asyncio.create_task(request())
    await turns()
    gone.set()
    may_end.set()
    assert await answering == "answered"

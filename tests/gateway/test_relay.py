"""What a client is sent, byte by byte, and when."""

import asyncio
import json
import logging
from typing import Any

import pytest
from starlette.types import Message
from tests.gateway.conftest import Client, SlowClient
from tests.gateway.relays import DONE, FAILURE, begun, spoken, turns
from tests.routing.conftest import until

from tera.errors import ContextLengthError
from tera.gateway.relay import KEEP_ALIVE, Outbox


async def test_s5_nothing_is_sent_before_the_first_event_and_then_each_at_once() -> None:
    relay = await begun()
    assert relay.client.sent == []
    relay.say(b"1")
    await turns(2)
    assert relay.client.status == 200
    assert dict(relay.client.sent[0]["headers"]) == {
        b"content-type": b"text/event-stream; charset=utf-8",
        b"cache-control": b"no-cache",
        b"x-accel-buffering": b"no",
    }
    assert relay.client.writes == [b"1"]
    relay.say(b"2")
    await turns(2)
    assert relay.client.writes == [b"1", b"2"]
    relay.end()
    await relay.ended()
    assert relay.client.writes == [b"1", b"2", DONE]
    assert [message.get("more_body") for message in relay.client.sent[1:]] == [True, True, False]
    assert not relay.cancelled
    assert relay.exchange.code == ""


async def test_s5_events_of_one_turn_leave_in_one_write_per_stream() -> None:
    outbox = Outbox()
    relays = [await begun(outbox=outbox) for _ in range(3)]
    loop = asyncio.get_running_loop()
    for frame in range(2):  # two connections are read in one turn
        for at, relay in enumerate(relays):
            loop.call_soon(relay.say, b"%d.%d " % (at, frame), b"again ")
    await turns()
    for at, relay in enumerate(relays):
        assert relay.client.writes == [b"%d.0 again %d.1 again " % (at, at)]
        relay.end()
        await relay.ended()


async def test_s5_events_of_the_last_turn_leave_with_the_end() -> None:
    relay = await begun()
    relay.say(b"1")
    relay.end()
    await relay.ended()
    await turns()
    assert relay.client.body == b"1" + DONE
    assert relay.client.ended


class Thoughtful(Client):
    """A client whose server waits for several things before it has sent anything."""

    def __init__(self, after: BaseException | None = None) -> None:
        super().__init__()
        self._lock = asyncio.Lock()
        self._after = after

    async def send(self, message: Message) -> None:
        async with self._lock:
            await asyncio.sleep(0)
            await asyncio.get_running_loop().run_in_executor(None, bool)
            await asyncio.gather(asyncio.sleep(0), asyncio.sleep(0.001))
            if self._after is not None and "body" in message:
                raise self._after
            await super().send(message)


async def test_s5_a_send_may_wait_as_often_as_it_likes() -> None:
    relay = await begun(Thoughtful())
    for number in range(30):
        relay.say(b"%d " % number)
        await turns(number % 5)
    relay.end()
    await relay.ended()
    assert relay.client.body == b"".join(b"%d " % number for number in range(30)) + DONE
    assert [message["type"] for message in relay.client.sent].count("http.response.start") == 1
    assert relay.client.ended


async def test_s9_what_is_written_while_a_client_does_not_read_leaves_once_it_does() -> None:
    client = SlowClient()
    relay = await begun(client)
    client.stop_reading()
    relay.say(b"1")
    await turns()
    assert relay.answer.blocked
    for event in (b"2", b"3", b"4"):
        relay.say(event)
        await turns()
    assert client.writes == []
    client.read_on()
    await turns()
    assert client.writes == [b"1", b"234"]
    assert not relay.answer.blocked
    relay.end()
    await relay.ended()
    assert client.writes == [b"1", b"234", DONE]


async def test_s9_the_end_waits_for_a_client_that_does_not_read() -> None:
    client = SlowClient()
    relay = await begun(client)
    client.stop_reading()
    relay.say(b"1")
    await turns()
    relay.say(b"2")
    relay.end()
    await turns()
    assert not relay.task.done()
    client.read_on()
    await relay.ended()
    assert client.body == b"12" + DONE
    assert client.ended


async def test_s9_who_waits_for_a_client_goes_on_when_it_reads() -> None:
    client = SlowClient()
    relay = await begun(client)
    await relay.answer.free()  # at once
    client.stop_reading()
    relay.say(b"1")
    await turns()
    free = asyncio.create_task(relay.answer.free())
    await turns()
    assert not free.done()
    client.read_on()
    async with asyncio.timeout(10):
        await free
    assert not relay.answer.blocked
    relay.end()
    await relay.ended()


async def test_s9_a_client_that_does_not_read_slows_nobody_else() -> None:
    outbox, slow = Outbox(), SlowClient()
    slow.stop_reading()
    relays = [await begun(client, outbox=outbox) for client in (Client(), slow, Client())]
    for number in range(5):
        for relay in relays:
            relay.say(b"%d" % number)
        await turns(2)
        for relay in (relays[0], relays[2]):
            assert relay.client.writes[number:] == [b"%d" % number]
    assert slow.writes == []
    slow.read_on()
    for relay in relays:
        relay.end()
        await relay.ended()
        assert relay.client.body == b"01234" + DONE


async def test_s9_a_client_that_does_not_read_gets_no_comments() -> None:
    client = SlowClient()
    relay = await begun(client, keep_alive_s=0.002)
    other = await begun(keep_alive_s=0.002)
    client.stop_reading()
    relay.say(b"1")
    await turns()
    await until(lambda: other.client.body.count(KEEP_ALIVE) >= 5)
    client.read_on()
    await turns()
    assert client.writes[client.writes.index(b"1") :] == [b"1"]
    for each in (relay, other):
        each.end()
        await each.ended()


async def test_s7_silence_before_the_first_event_is_broken() -> None:
    relay = await begun(keep_alive_s=0.01)
    await until(lambda: relay.client.body.count(KEEP_ALIVE) >= 2)
    assert relay.client.status == 200
    assert set(relay.client.writes) == {KEEP_ALIVE}
    relay.say(b"1")
    relay.end()
    await relay.ended()
    assert spoken(relay.client) == b"1" + DONE
    assert relay.client.ended


async def test_s7_silence_between_events_is_broken() -> None:
    relay = await begun(keep_alive_s=0.01)
    relay.say(b"1")
    await until(lambda: relay.client.body.endswith(b"1" + KEEP_ALIVE))
    relay.say(b"2")
    await until(lambda: relay.client.body.endswith(b"2" + KEEP_ALIVE))
    relay.end()
    await relay.ended()
    assert spoken(relay.client) == b"12" + DONE


async def test_s1_nothing_follows_the_last_write() -> None:
    client = SlowClient()
    relay, clock = await begun(client, keep_alive_s=0.002), await begun(keep_alive_s=0.002)
    relay.say(b"1")
    await turns()
    client.stop_reading()
    relay.end()
    await until(lambda: client.ended)
    passed = clock.client.body.count(KEEP_ALIVE)
    await until(lambda: clock.client.body.count(KEEP_ALIVE) >= passed + 5)
    assert client.ended
    client.read_on()
    await relay.ended()
    passed = clock.client.body.count(KEEP_ALIVE)
    await until(lambda: clock.client.body.count(KEEP_ALIVE) >= passed + 5)
    assert client.ended
    assert client.body.count(DONE) == 1
    clock.end()
    await clock.ended()


@pytest.mark.parametrize(
    "error",
    [
        pytest.param(ContextLengthError("Too long."), id="of the request"),
        pytest.param(FAILURE, id="of the backend"),
        pytest.param(RuntimeError("a defect"), id="a defect"),
    ],
)
async def test_s6_an_error_before_the_first_event_is_raised(error: Exception) -> None:
    relay = await begun()
    relay.end(error)
    with pytest.raises(type(error)) as raised:
        await relay.ended()
    assert raised.value is error
    assert relay.client.sent == []


@pytest.mark.parametrize(
    ("error", "code"),
    [
        pytest.param(FAILURE, "backend_failure", id="of the backend"),
        pytest.param(RuntimeError("a defect"), "internal_error", id="a defect"),
    ],
)
@pytest.mark.parametrize("when", ["in its turn", "later", "while the client does not read"])
async def test_s6_an_error_after_it_is_one_event_and_no_done(
    error: Exception, code: str, when: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)
    client = SlowClient()
    relay = await begun(client)
    if when == "while the client does not read":
        client.stop_reading()
    relay.say(b"1")
    if when != "in its turn":
        await turns()
    relay.end(error)
    await turns()
    client.read_on()
    await relay.ended()
    assert client.status == 200
    assert client.ended
    event = client.body.removeprefix(b"1")
    found = envelope_of(event)["error"]
    assert found.keys() == {"message", "type", "param", "code"}
    assert (found["type"], found["code"]) == ("server_error", code)
    assert b"a defect" not in event
    assert relay.exchange.code == code


async def test_s6_an_error_after_a_keep_alive_is_an_event() -> None:
    relay = await begun(keep_alive_s=0.01)
    await until(lambda: KEEP_ALIVE in relay.client.body)
    relay.end(FAILURE)
    await relay.ended()
    assert envelope_of(spoken(relay.client))["error"]["code"] == "backend_failure"
    assert relay.client.ended
    assert relay.exchange.code == "backend_failure"


def envelope_of(event: bytes) -> Any:
    assert event.startswith(b"data: ")
    assert event.endswith(b"\n\n")
    return json.loads(event.removeprefix(b"data: "))

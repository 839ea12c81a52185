"""What a client's hang-up ends, however it is noticed, and what it does not."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from starlette.types import Message
from tests.gateway.conftest import Client, SlowClient
from tests.gateway.relays import FAILURE, Relay, begun, turns
from tests.routing.conftest import until

from tera.errors import BackendFailureError
from tera.gateway.relay import KEEP_ALIVE, ClientGoneError, Outbox, while_connected


@pytest.mark.parametrize("events", [[], [b"1"]], ids=["before", "after the first event"])
async def test_s8_a_hang_up_cancels_the_work(events: list[bytes]) -> None:
    relay = await begun()
    relay.say(*events)
    await turns()
    relay.client.hang_up()
    await relay.ended()
    assert relay.cancelled
    assert relay.client.body == b"".join(events)
    assert not relay.client.ended
    assert relay.exchange.code == ""


async def test_s8_a_hang_up_cancels_the_work_also_while_a_write_waits() -> None:
    client = SlowClient()
    relay = await begun(client)
    client.stop_reading()
    relay.say(b"1")
    await turns()
    relay.say(b"2")
    client.hang_up()
    await relay.ended()
    assert relay.cancelled
    client.read_on()
    await turns()
    assert b"2" not in client.body


@pytest.mark.parametrize("waiting", ["for the last write", "for room before it"])
async def test_s8_a_hang_up_ends_a_stream_whose_work_is_done(waiting: str) -> None:
    client = SlowClient()
    relay = await begun(client)
    client.stop_reading()
    if waiting == "for room before it":
        relay.say(b"1")
        await turns()
    relay.end()
    await turns()
    assert not relay.task.done()
    client.hang_up()
    await relay.ended()
    assert not relay.cancelled


class Gone(SlowClient):
    """A client that has left, of which its server tells by an error of `send` alone."""

    def __init__(self, error: BaseException, sends: int, *, at_once: bool) -> None:
        super().__init__()
        self._error = error
        self._sends = sends
        self._at_once = at_once

    async def send(self, message: Message) -> None:
        self._sends -= 1
        if self._sends >= 0:
            await Client.send(self, message)
            return
        if not self._at_once:
            await self._reads.wait()
        raise self._error


ERRORS = [
    pytest.param(OSError("the connection is closed"), False, id="as ASGI 2.4 has it"),
    pytest.param(RuntimeError("unexpected"), True, id="another error"),
    pytest.param(asyncio.CancelledError(), False, id="a cancel of the server's own"),
]


@pytest.mark.parametrize(("error", "logged"), ERRORS)
@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("sends", [0, 1, 2], ids=["head", "first event", "later event"])
async def test_s8_a_write_that_fails_is_a_hang_up(
    error: BaseException,
    logged: bool,
    at_once: bool,
    sends: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    client, outbox = Gone(error, sends, at_once=at_once), Outbox()
    client.stop_reading()
    first, relay, last = [await begun(each, outbox=outbox) for each in (Client(), client, Client())]
    for event in (b"1", b"2"):
        for each in (first, relay, last):
            each.say(event)
        await turns()
    client.read_on()
    await relay.ended()
    assert relay.cancelled
    assert client.body == b"1" * (sends == 2)
    assert bool(caplog.records) == logged
    for other in (first, last):
        assert other.client.writes == [b"1", b"2"]
        other.end()
        await other.ended()
        assert other.client.ended


async def test_s8_a_comment_that_cannot_be_sent_is_a_hang_up() -> None:
    relay = await begun(Gone(OSError("gone"), 0, at_once=True), keep_alive_s=0.001)
    await relay.ended()
    assert relay.cancelled


async def test_s8_a_last_write_that_fails_is_a_hang_up() -> None:
    relay = await begun(Gone(OSError("gone"), 2, at_once=True))
    relay.say(b"1")
    await turns()
    relay.end()
    await relay.ended()
    assert relay.client.body == b"1"
    assert not relay.client.ended


@pytest.mark.parametrize("reads", [True, False])
async def test_b6_a_cancel_from_elsewhere_passes_through_and_cancels_the_work(reads: bool) -> None:
    client = SlowClient()
    relay = await begun(client)
    if not reads:
        client.stop_reading()
    relay.say(b"1")
    await turns()
    relay.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await relay.ended()
    assert relay.cancelled
    assert not client.ended


async def _finish(relay: Relay) -> None:
    relay.end()
    await relay.ended()


async def _fail(relay: Relay) -> None:
    relay.end(FAILURE)
    await relay.ended()


async def _hang_up(relay: Relay) -> None:
    relay.client.hang_up()
    await relay.ended()


async def _hang_up_while_blocked(relay: Relay) -> None:
    assert isinstance(relay.client, SlowClient)
    relay.client.stop_reading()
    relay.say(b"2")
    await turns()
    await _hang_up(relay)


async def _cancel_while_blocked(relay: Relay) -> None:
    assert isinstance(relay.client, SlowClient)
    relay.client.stop_reading()
    relay.say(b"2")
    await turns()
    relay.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await relay.ended()


@pytest.mark.parametrize(
    "end", [_finish, _fail, _hang_up, _hang_up_while_blocked, _cancel_while_blocked]
)
async def test_a_stream_leaves_no_task_and_no_timer_behind(end: Callable[..., Any]) -> None:
    before = asyncio.all_tasks()
    relay = await begun(SlowClient(), keep_alive_s=0.005)
    clock = await begun(keep_alive_s=0.005)
    relay.say(b"1")
    await turns()
    await end(relay)
    await until(lambda: asyncio.all_tasks() - before <= {clock.task, *_watchers(clock)})
    sent = len(relay.client.sent)
    passed = clock.client.body.count(KEEP_ALIVE)
    await until(lambda: clock.client.body.count(KEEP_ALIVE) >= passed + 3)
    assert len(relay.client.sent) == sent
    await _finish(clock)
    await until(lambda: asyncio.all_tasks() <= before)


def _watchers(relay: Relay) -> set[asyncio.Task[Any]]:
    """Return the tasks that listen for a hang-up; one, while a single stream runs."""
    found = {task for task in asyncio.all_tasks() if "_disconnect" in repr(task.get_coro())}
    return found if len(found) == 1 else set()


async def answered(client: Client, work: Callable[[], Any]) -> Any:
    async with while_connected(client.receive):
        return await work()


async def test_an_answer_is_what_the_work_makes() -> None:
    async def work() -> str:
        await asyncio.sleep(0)
        return "made"

    assert await answered(Client(), work) == "made"


@pytest.mark.parametrize("noticed", ["by the server", "by a write", "by both", "by both, twice"])
async def test_s8_a_hang_up_cancels_what_runs(noticed: str) -> None:
    client, cancelled = Client(), asyncio.Event()
    told: list[Callable[[], None]] = []

    async def work() -> None:
        async with while_connected(client.receive) as hang_up:
            told.append(hang_up)
            try:
                await asyncio.get_running_loop().create_future()
            except asyncio.CancelledError:
                await asyncio.sleep(0)  # what closes may have to wait
                cancelled.set()
                raise

    answering = asyncio.create_task(work())
    await turns()
    if noticed != "by a write":
        client.hang_up()
    if noticed != "by the server":
        told[0]()
    if noticed == "by both, twice":
        client.hang_up()
        told[0]()
    with pytest.raises(ClientGoneError):
        await answering
    assert cancelled.is_set()
    assert not answering.cancelled()
    assert answering.cancelling() == 0
    told[0]()  # too late to cancel anything
    assert answering.cancelling() == 0


async def test_the_bodys_rest_is_no_hang_up() -> None:
    client, may_end = Client({}), asyncio.Event()
    answering = asyncio.create_task(answered(client, may_end.wait))
    await turns()
    assert not answering.done()
    may_end.set()
    await answering


async def test_an_error_of_the_work_passes_through() -> None:
    async def work() -> None:
        raise FAILURE

    with pytest.raises(BackendFailureError) as raised:
        await answered(Client(), work)
    assert raised.value is FAILURE


@pytest.mark.parametrize("gone_too", [True, False])
async def test_b6_a_cancel_from_elsewhere_passes_through(gone_too: bool) -> None:
    client = Client()

    async def work() -> None:
        await asyncio.get_running_loop().create_future()

    answering = asyncio.create_task(answered(client, work))
    await turns()
    if gone_too:
        client.hang_up()
    answering.cancel()
    with pytest.raises(asyncio.CancelledError):
        await answering
    assert answering.cancelled()


@pytest.mark.parametrize("noticed", ["by the server", "by a write"])
async def test_a_hang_up_that_comes_with_the_end_cancels_nothing_after_it(noticed: str) -> None:
    gone, may_end = asyncio.Event(), asyncio.Event()
    told: list[Callable[[], None]] = []

    async def receive() -> Message:
        await gone.wait()
        return {"type": "http.disconnect"}

    async def request() -> str:
        async with while_connected(receive) as hang_up:
            told.append(hang_up)
            await may_end.wait()
        await turns()  # the answer is sent
        return "answered"

    answering = asyncio.create_task(request())
    await turns()
    may_end.set()
    if noticed == "by the server":
        gone.set()
    else:
        await turns(2)
        told[0]()
    assert await answering == "answered"

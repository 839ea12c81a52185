"""What a request holds is settled once, whichever way it ends; its neighbours go on."""

import asyncio
import json
import logging
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from tests.gateway.conftest import CALLER, MODEL, Gateway, SlowClient
from tests.gateway.test_pipeline import ENDLESS, PROMPT, Told, completion, told
from tests.routing.conftest import until

from tera.config.limits import TenantLimits
from tera.errors import (
    BackendFailureError,
    ConcurrencyLimitError,
    InternalError,
    InvalidValueError,
    TokenRateLimitError,
)
from tera.gateway.pieces import Piece
from tera.routing.run import Run, Sink, Work
from tera.tenancy.usage import UsageRecord

SLOW = {"decode_step_s": 0.001}
NEVER = {"decode_step_s": 3600.0}

End = Callable[[Gateway], Coroutine[Any, Any, None]]


async def finishes(gateway: Gateway) -> None:
    await told(gateway, completion(max_tokens=5))


async def stops(gateway: Gateway) -> None:
    whole = (await told(gateway, completion(max_tokens=30))).texts[0]
    gateway.admitter.settled.clear()
    await told(gateway, completion(max_tokens=30, stop=[whole[:2]]))


async def dies_and_goes_on(gateway: Gateway) -> None:
    await told(gateway, completion(max_tokens=5))


async def fails(gateway: Gateway) -> None:
    with pytest.raises(BackendFailureError):
        await told(gateway, completion("FAULT", max_tokens=5, **ENDLESS))


async def is_refused_by_the_engine(gateway: Gateway) -> None:
    with pytest.raises(InvalidValueError):
        await told(gateway, completion("FAULT", max_tokens=5))


async def finds_its_client_defective(gateway: Gateway) -> None:
    broken = BrokenAnswer()
    with pytest.raises(InternalError):
        await gateway.pipeline.generate(CALLER, completion(max_tokens=5), broken.exchange, broken)


async def is_cancelled_in_the_queue(gateway: Gateway) -> None:
    gateway.fleet.fleet.changed({})  # every replica is taken away
    await cancelled(gateway, lambda _: gateway.fleet.serve.waiting == 1)


async def is_cancelled_before_its_first_token(gateway: Gateway) -> None:
    runs = noted_runs(gateway)
    await cancelled(gateway, lambda _: any(run.taken for run in runs))


async def is_cancelled_in_mid_stream(gateway: Gateway) -> None:
    await cancelled(gateway, lambda answer: answer.completion_tokens > 0)


def noted_runs(gateway: Gateway) -> list[Run]:
    """Return a list to which the gateway's generations are added as they begin."""
    runs: list[Run] = []
    dispatcher = gateway.catalog.models["one"].dispatcher
    make = dispatcher.run

    def run(work: Work, sink: Sink) -> Run:
        runs.append(make(work, sink))
        return runs[-1]

    dispatcher.run = run  # type: ignore[method-assign]
    return runs


async def cancelled(gateway: Gateway, when: Callable[[Told], bool]) -> None:
    answer = Told()
    request = completion(max_tokens=500, **ENDLESS)
    running = asyncio.create_task(
        gateway.pipeline.generate(CALLER, request, answer.exchange, answer)
    )
    await until(lambda: when(answer))
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running


class BrokenAnswer(Told):
    """An answer that fails at its second piece, by a defect."""

    def add(self, piece: Piece) -> None:
        if self.pieces:
            raise RuntimeError("a defect")
        super().add(piece)


@pytest.mark.parametrize(
    ("end", "setting", "status", "code", "prompt", "tokens"),
    [
        pytest.param(finishes, {}, "finished", "", True, 5, id="finished"),
        pytest.param(stops, {}, "finished", "", True, 1, id="stopped"),
        pytest.param(
            dies_and_goes_on, {"deaths": [2]}, "finished", "", True, 5, id="resumed elsewhere"
        ),
        pytest.param(fails, {}, "failed", "backend_failure", True, 3, id="failed"),
        pytest.param(
            is_refused_by_the_engine,
            {"faults": {"refuse": True}},
            *("failed", "invalid_value", False, 0),
            id="refused by the engine",
        ),
        pytest.param(
            finds_its_client_defective,
            {"profile": SLOW},
            *("failed", "internal_error", True, 2),
            id="our defect",
        ),
        pytest.param(
            is_cancelled_in_the_queue, {}, "cancelled", "", False, 0, id="cancelled in the queue"
        ),
        pytest.param(
            is_cancelled_before_its_first_token,
            {"profile": NEVER},
            *("cancelled", "", True, 0),
            id="cancelled before the first token",
        ),
        pytest.param(
            is_cancelled_in_mid_stream,
            {"profile": SLOW},
            *("cancelled", "", True, None),
            id="cancelled in mid-stream",
        ),
    ],
)
async def test_l3_every_end_settles_once(
    end: End,
    setting: dict[str, Any],
    status: str,
    code: str,
    prompt: bool,
    tokens: int | None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.CRITICAL)
    async with Gateway(**setting) as gateway:
        gateway.admitter.limits = TenantLimits(concurrent_requests=1)
        await end(gateway)
        await gateway.wait_until_idle()
        record = settled(gateway)
        assert (record.status, record.code) == (status, code)
        assert bool(record.prompt_tokens) == prompt
        if tokens is None:
            assert 0 < record.completion_tokens < 500
        else:
            assert record.completion_tokens == tokens
        assert (record.first_token_s is not None) == (tokens != 0)
        assert record.replica_switches == len(setting.get("deaths", ()))


async def test_l3_who_leaves_before_the_first_token_pays_for_what_replicas_have_taken() -> None:
    async with Gateway(profile=NEVER) as gateway:
        runs, answer = noted_runs(gateway), Told()
        request = completion(max_tokens=5, n=2, prompt=["a b c", "d e f g h"])
        running = asyncio.create_task(
            gateway.pipeline.generate(CALLER, request, answer.exchange, answer)
        )
        await until(lambda: [run.taken for run in runs] == [True] * 4)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert settled(gateway).prompt_tokens == answer.exchange.prompt_tokens > 0
        assert sorted(answer.exchange.taken_prompts) == [0, 2]  # once, whatever n is


def settled(gateway: Gateway) -> UsageRecord:
    """Return the one record that was settled, when nothing is held any more."""
    assert gateway.admitter.running == {}
    [record] = gateway.admitter.settled
    return record


@pytest.mark.parametrize(
    ("hangs_up", "status"), [(True, "cancelled"), (False, "finished")], ids=["leaves", "reads"]
)
async def test_l3_a_client_that_does_not_read_holds_its_place_until_it_does(
    hangs_up: bool, status: str
) -> None:
    async with Gateway() as gateway:
        gateway.admitter.limits = TenantLimits(concurrent_requests=1)
        body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 400, "stream": True, **ENDLESS}
        client = SlowClient(body)
        client.stop_reading()
        posting = asyncio.create_task(gateway.post(client))
        await until(lambda: client.status == 200 and gateway.load.running == 0)
        assert list(gateway.admitter.running)
        with pytest.raises(ConcurrencyLimitError):
            await told(gateway, completion())
        if hangs_up:
            client.hang_up()
        else:
            client.read_on()
        await posting
        record = settled(gateway)
        assert record.status == status
        assert record.completion_tokens == 400  # it pays for what was generated, read or not
        await told(gateway, completion())


async def test_l2_what_the_limits_refuse_is_nowhere_counted(gateway: Gateway) -> None:
    gateway.admitter.limits = TenantLimits(tokens_per_minute=10)
    with pytest.raises(TokenRateLimitError):
        await told(gateway, completion(max_tokens=100))
    assert gateway.admitter.settled == []
    assert gateway.admitter.running == {}
    assert gateway.fleet.dispatched == []


async def test_an_answer_that_cannot_take_its_pieces_fails_alone(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.CRITICAL)
    async with Gateway(profile=SLOW) as gateway:
        request = completion(max_tokens=100, **ENDLESS)
        whole = await told(gateway, request)
        broken, answers = BrokenAnswer(), [Told() for _ in range(3)]
        ends = await asyncio.gather(
            *(
                gateway.pipeline.generate(CALLER, request, answer.exchange, answer)
                for answer in [answers[0], broken, *answers[1:]]
            ),
            return_exceptions=True,
        )
        assert [type(end) for end in ends if end is not None] == [InternalError]
        assert all(answer.texts == whole.texts for answer in answers)
        await gateway.wait_until_idle()
        statuses = sorted(record.status for record in gateway.admitter.settled)
        assert statuses == ["failed", *["finished"] * 4]


async def test_s9_a_client_that_does_not_read_gets_what_it_missed_in_one_event() -> None:
    async with Gateway() as gateway:
        fields = {"max_tokens": 400, **ENDLESS}
        whole = (await told(gateway, completion(**fields))).texts[0]
        client = SlowClient(
            {"model": MODEL, "prompt": PROMPT, "temperature": 0, "stream": True, **fields}
        )
        client.stop_reading()
        posting = asyncio.create_task(gateway.post(client))
        await until(lambda: client.status == 200 and gateway.load.running == 0)
        # Nobody else waits for it.
        assert (await told(gateway, completion(**fields))).texts[0] == whole
        client.read_on()
        await posting
    *events, last = client.body.removesuffix(b"\n\n").split(b"\n\n")
    assert last == b"data: [DONE]"
    texts = [json.loads(event.removeprefix(b"data: "))["choices"][0]["text"] for event in events]
    assert "".join(texts) == whole
    assert len(texts[-1]) > len(whole) / 2
    assert len(texts) < 50


async def test_s6_what_a_client_missed_of_a_generation_that_failed_comes_before_the_error() -> None:
    async with Gateway(faults={"fail_after_tokens": 100}) as gateway:
        body = {"model": MODEL, "prompt": "FAULT", "temperature": 0, "max_tokens": 400, **ENDLESS}
        client = SlowClient({**body, "stream": True})
        client.stop_reading()
        posting = asyncio.create_task(gateway.post(client))
        await until(lambda: client.status == 200 and gateway.load.running == 0)
        client.read_on()
        await posting
        assert settled(gateway).completion_tokens == 100
    *_, last_text, error = client.body.removesuffix(b"\n\n").split(b"\n\n")
    assert json.loads(error.removeprefix(b"data: "))["error"]["code"] == "backend_failure"
    assert "choices" in json.loads(last_text.removeprefix(b"data: "))

"""One generation over replicas that answer and fail as they are told."""

from collections.abc import Awaitable, Callable

import msgspec
import pytest
from tests.routing.conftest import Attempt, FakeModel, die_after, live, passed
from tests.routing.stages import PROMPT, SALT, Stage, limits

from tera import wire
from tera.errors import BackendFailureError, EngineError, InvalidRequestError, InvalidValueError
from tera.generation import FinishReason, Sampling, TokenDelta, TokenLogprobs


async def test_deltas_arrive_as_the_replica_sends_them(model: FakeModel, stage: Stage) -> None:
    await model.start("a")
    going = stage.go()
    attempt = await model.begun()
    assert (attempt.generation.token_ids, attempt.generation.resumed_tokens) == (PROMPT, 0)
    assert attempt.generation.cache_salt == SALT
    assert attempt.generation.request_id == "request"
    assert attempt.generation.sampling == Sampling(max_tokens=9)
    await attempt.take()
    await attempt.send(1, 2)
    await attempt.send(3, finish=FinishReason.STOP)
    await going.end()
    assert [(delta.token_ids, delta.finish_reason) for delta in going.sink.deltas] == [
        ([1, 2], None),
        ([3], FinishReason.STOP),
    ]
    assert going.run.replica_switches == 0
    assert model.idle
    assert not attempt.aborted.is_set()


async def test_a_long_prompts_log_probabilities_come_whole_with_the_first_token(
    model: FakeModel, stage: Stage
) -> None:
    entries = [None, *(TokenLogprobs(it, -0.5, []) for it in range(9))]
    await model.start("a", "b")
    going = stage.go(Sampling(max_tokens=9, prompt_logprobs=0))
    attempt = await model.begun()
    number = attempt.generation.generation_id
    # What a replica has told that is lost then is told anew by another.
    await attempt.replica.send(TokenDelta(number, [], prompt_logprobs=entries[:4]))
    await attempt.die()
    attempt = await model.begun()
    number = attempt.generation.generation_id
    await attempt.take()
    for start, end in ((0, 4), (4, 10)):
        await attempt.replica.send(TokenDelta(number, [], prompt_logprobs=entries[start:end]))
    await attempt.replica.send(TokenDelta(number, [1], prompt_logprobs=[]))
    await attempt.send(2, finish=FinishReason.STOP)
    await going.end()
    assert [it.prompt_logprobs for it in going.sink.deltas] == [entries, None]
    assert going.sink.token_ids == [1, 2]


async def test_no_replica_makes_more_tokens_than_were_asked_for(
    model: FakeModel, stage: Stage
) -> None:
    await model.start("a")
    going = stage.go(Sampling(max_tokens=3))
    attempt = await model.begun()
    await attempt.take()
    await attempt.send(1, 2)
    await attempt.send(*[666] * 1000)
    attempt = await model.begun()
    assert attempt.generation.sampling.max_tokens == 1
    await live(attempt, 3)
    await going.end()
    assert going.sink.token_ids == [1, 2, 3]


async def test_a_generation_has_a_seat_until_its_end(model: FakeModel, stage: Stage) -> None:
    await model.start("a")
    going = stage.go()
    attempt = await model.begun()
    assert (model.serve.running, model.serve.most_waiting) == ({"a": 1}, 0)
    await live(attempt, 1)
    await going.end()
    assert model.idle


@pytest.mark.parametrize("retries", [0, 1, 2])
@pytest.mark.parametrize("tokens", [pytest.param([], id="before"), pytest.param([1], id="after")])
async def test_b1_a_generation_is_tried_on_so_many_replicas_more_and_then_fails(
    model: FakeModel, deaths_far_apart: None, retries: int, tokens: list[int]
) -> None:
    await model.start("a")
    going = Stage(model.fleet, model.links, limits(retries=retries)).go()
    for _ in range(retries + 1):
        await die_after(await model.begun(), going, *tokens)
    with pytest.raises(BackendFailureError, match="failed repeatedly") as failed:
        await going.end()
    assert isinstance(failed.value.__cause__, EngineError)
    assert going.run.replica_switches == retries
    assert going.sink.token_ids == tokens * (retries + 1)
    assert model.nothing_begun
    assert model.idle


async def fail_connection(attempt: Attempt) -> None:
    await attempt.die()


async def fail_engine(attempt: Attempt) -> None:
    await attempt.fail()


async def fail_frames(attempt: Attempt) -> None:
    await attempt.replica.write(wire.pack(b"\xc1"))


@pytest.mark.parametrize("fail", [fail_connection, fail_engine, fail_frames])
async def test_b1_another_replica_answers_in_place_of_one_that_failed(
    model: FakeModel, stage: Stage, fail: Callable[[Attempt], Awaitable[None]]
) -> None:
    await model.start("a", "b")
    going = stage.go()
    first = await model.begun()
    await first.take()
    await fail(first)
    second = await model.begun()
    await live(second, 1, 2)
    await going.end()
    assert (going.sink.token_ids, going.sink.finish_reasons) == ([1, 2], [FinishReason.LENGTH])
    asked, again = first.generation, second.generation
    assert asked.generation_id != again.generation_id
    assert msgspec.structs.replace(again, generation_id=asked.generation_id) == asked
    assert going.run.replica_switches == 1
    assert model.idle


async def test_b1_a_replica_that_never_had_the_generation_is_no_failure_to_count(
    model: FakeModel,
) -> None:
    await model.start("a")
    stage = Stage(model.fleet, model.links, limits(retries=0))
    stage.dispatcher.budget.spend()
    going = stage.go()
    for _ in range(4):
        await (await model.begun()).die()
    await live(await model.begun(), 1)
    await going.end()
    assert going.sink.token_ids == [1]
    assert going.run.replica_switches == 0


async def test_b2_the_next_replica_goes_on_from_prompt_and_tokens(
    model: FakeModel, stage: Stage, deaths_far_apart: None
) -> None:
    await model.start("a", "b")
    going = stage.go(Sampling(max_tokens=9, seed=7, logprobs=2, prompt_logprobs=3))
    attempts = [await model.begun()]
    await die_after(attempts[-1], going, 1, 2)
    attempts.append(await model.begun())
    await die_after(attempts[-1], going, 3)
    attempts.append(await model.begun())
    await live(attempts[-1], 4, 5)
    await going.end()
    assert going.sink.token_ids == [1, 2, 3, 4, 5]
    assert going.sink.finish_reasons == [FinishReason.LENGTH]
    asked = [attempt.generation for attempt in attempts]
    assert [each.token_ids for each in asked] == [PROMPT, [*PROMPT, 1, 2], [*PROMPT, 1, 2, 3]]
    assert [each.resumed_tokens for each in asked] == [0, 2, 3]
    assert [each.cache_salt for each in asked] == [SALT] * 3
    assert [each.sampling.max_tokens for each in asked] == [9, 7, 6]
    # Only the first delta of all tells of the prompt.
    assert [each.sampling.prompt_logprobs for each in asked] == [3, None, None]
    assert {(each.sampling.seed, each.sampling.logprobs) for each in asked} == {(7, 2)}
    assert going.run.replica_switches == 2


async def test_b2_what_a_given_up_replica_still_sends_finds_nobody(
    model: FakeModel, stage: Stage
) -> None:
    await model.start("a")
    going = stage.go()
    first = await model.begun()
    await first.send(1)
    await first.fail()
    second = await model.begun()
    await first.send(99)
    await first.send(99, finish=FinishReason.STOP)
    await live(second, 2)
    await going.end()
    assert (going.sink.token_ids, going.sink.finish_reasons) == ([1, 2], [FinishReason.LENGTH])


async def test_b2_a_loss_after_the_last_token_needs_no_other_replica(
    model: FakeModel, stage: Stage
) -> None:
    await model.start("a", "b")
    going = stage.go(Sampling(max_tokens=2))
    await die_after(await model.begun(), going, 1, 2)
    await going.end()
    assert (going.sink.token_ids, going.sink.finish_reasons) == ([1, 2], [FinishReason.LENGTH])
    assert model.nothing_begun
    assert model.idle


async def test_b2_a_stream_older_than_the_cold_start_deadline_still_moves(
    model: FakeModel,
) -> None:
    await model.start("a", "b")
    going = Stage(model.fleet, model.links, limits(cold_start_deadline_s=0.5)).go()
    first = await model.begun()
    await passed(0.5)
    await die_after(first, going, 1)
    await live(await model.begun(), 2)
    await going.end()
    assert going.sink.token_ids == [1, 2]


@pytest.mark.parametrize("tokens", [pytest.param([], id="before"), pytest.param([1], id="after")])
async def test_b5_a_refusal_of_the_request_is_not_tried_again(
    model: FakeModel, stage: Stage, tokens: list[int]
) -> None:
    await model.start("a", "b")
    going = stage.go()
    attempt = await model.begun()
    await attempt.send(*tokens)
    await attempt.fail("invalid_value", "prompt")
    with pytest.raises(InvalidRequestError) as refused:
        await going.end()
    assert isinstance(refused.value, InvalidValueError)
    assert refused.value.param == "prompt"
    assert going.sink.token_ids == tokens
    assert going.run.replica_switches == 0
    assert model.nothing_begun
    assert model.idle

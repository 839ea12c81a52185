"""One generation over replicas that fail as they are told, and over the simulated engine."""

import asyncio
import random
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import msgspec
import pytest
import pytest_asyncio
from tests.routing.conftest import (
    Attempt,
    EngineFleet,
    EngineReplica,
    FakeModel,
    FakeServe,
    until,
)

from tera import wire
from tera.engine.simulated import SimulatedEngine
from tera.errors import (
    BackendFailureError,
    EngineError,
    InternalError,
    InvalidRequestError,
    InvalidValueError,
)
from tera.generation import (
    FinishReason,
    GenerationFailure,
    ReplicaLoad,
    Sampling,
    TokenDelta,
    TokenLogprobs,
)
from tera.routing import fleet as fleet_module
from tera.routing import link as link_module
from tera.routing import loss, retry_budget
from tera.routing.fleet import Fleet
from tera.routing.link import ReplicaLinks
from tera.routing.retry_budget import FIRST_BALANCE, RETRIES_PER_GENERATION
from tera.routing.run import Dispatcher, DispatchLimits, Run, Work
from tera.routing.switchboard import Route, Share, Switchboard

PROMPT = [10, 11, 12]
SALT = "salt"
PATIENT = DispatchLimits(
    deadline_s=60, first_token_deadline_s=60, cold_start_deadline_s=60, retries=2
)


def limits(**changes: float) -> DispatchLimits:
    """Return limits that no test meets by chance, but for the changed ones."""
    kept = {name: getattr(PATIENT, name) for name in DispatchLimits.__slots__}
    return DispatchLimits(**{**kept, **changes})


@dataclass
class Sink:
    """What a client would be sent; it has enough after so many tokens."""

    enough_after: float = float("inf")
    deltas: list[TokenDelta] = field(default_factory=list)

    def push(self, delta: TokenDelta) -> bool:
        self.deltas.append(delta)
        return len(self.token_ids) >= self.enough_after

    @property
    def token_ids(self) -> list[int]:
        return [token_id for delta in self.deltas for token_id in delta.token_ids]

    @property
    def finish_reasons(self) -> list[FinishReason]:
        return [delta.finish_reason for delta in self.deltas if delta.finish_reason is not None]

    @property
    def logprobs(self) -> list[TokenLogprobs]:
        return [entry for delta in self.deltas for entry in delta.logprobs or ()]


class Going:
    """A generation that is under way."""

    def __init__(self, run: Run, sink: Sink) -> None:
        self.run = run
        self.sink = sink
        self.task = asyncio.create_task(run.to_end())

    async def end(self) -> None:
        """Wait for its end; raises what it ends with."""
        async with asyncio.timeout(20):
            await self.task

    async def cancel(self) -> None:
        """Hang up, as a client does."""
        self.task.cancel()
        await asyncio.wait([self.task])
        assert self.task.cancelled()


class Stage:
    """One model's gateway side, which begins generations."""

    def __init__(self, fleet: Fleet, links: ReplicaLinks, limits: DispatchLimits = PATIENT) -> None:
        self.dispatcher = Dispatcher(fleet, links, limits)

    def go(
        self,
        sampling: Sampling | None = None,
        *,
        prompt: Sequence[int] = PROMPT,
        tenant: str = "tenant",
        age_s: float = 0.0,
        sink: Sink | None = None,
    ) -> Going:
        """Begin a generation, of a request that has arrived so long ago."""
        arrived = asyncio.get_running_loop().time() - age_s
        sink = sink or Sink()
        sampling = sampling or Sampling(max_tokens=9)
        work = Work("request", arrived, Share(tenant), list(prompt), sampling, SALT)
        return Going(self.dispatcher.run(work, sink), sink)


@pytest.fixture
def stage(model: FakeModel) -> Stage:
    return Stage(model.fleet, model.links)


@pytest.fixture
def deaths_far_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no loss count as soon after the take: it was not the request."""
    monkeypatch.setattr(loss, "POISON_WINDOW_S", -1)


async def passed(seconds: float) -> None:
    """Wait until the loop's clock says that so much has passed."""
    loop = asyncio.get_running_loop()
    ends = loop.time() + seconds
    await until(lambda: loop.time() >= ends)


async def die_after(attempt: Attempt, going: Going, *token_ids: int) -> None:
    """Take a generation and die once the gateway has read so much of it."""
    await attempt.take()
    count = len(going.sink.token_ids) + len(token_ids)
    if token_ids:
        await attempt.send(*token_ids)
    await until(lambda: going.run._taken_at is not None and len(going.sink.token_ids) == count)
    await attempt.die()


async def live(attempt: Attempt, *token_ids: int) -> None:
    await attempt.take()
    await attempt.send(*token_ids, finish=FinishReason.LENGTH)


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


class TestStopping:
    """S8: whoever stops listening stops the engine, and gives back what was held."""

    async def test_s8_a_sink_that_has_enough_stops_the_replica(
        self, model: FakeModel, stage: Stage
    ) -> None:
        await model.start("a")
        going = stage.go(sink=Sink(enough_after=2))
        attempt = await model.begun()
        await attempt.send(1)
        await attempt.send(2)
        await going.end()
        await attempt.aborted.wait()
        await attempt.send(3)
        assert going.sink.token_ids == [1, 2]
        assert model.idle

    @pytest.mark.parametrize("fails", [True, False], ids=["failed", "refused"])
    async def test_s8_what_follows_in_the_frame_that_was_enough_changes_nothing(
        self, model: FakeModel, stage: Stage, fails: bool
    ) -> None:
        await model.start("a")
        going = stage.go(sink=Sink(enough_after=1))
        attempt = await model.begun()
        number = attempt.generation.generation_id
        await attempt.replica.send(
            TokenDelta(number, [1]),
            TokenDelta(number, [2]),
            failures=[GenerationFailure(number, "The engine failed.")] if fails else [],
            refused=[] if fails else [number],
        )
        await going.end()
        assert going.sink.token_ids == [1]
        assert model.fleet.seat_now(Route(Share("tenant"), PROMPT, SALT, 9)) is not None

    async def test_s8_hanging_up_while_no_replica_has_room_leaves_the_queue(
        self, model: FakeModel, stage: Stage
    ) -> None:
        going = stage.go()
        await until(lambda: model.serve.waiting == 1)
        await going.cancel()
        assert model.idle
        assert stage.dispatcher.queue.waiting == 0
        await model.start("a")
        assert model.nothing_begun

    @pytest.mark.parametrize("tokens", [None, [], [1]], ids=["not had", "had", "mid-stream"])
    async def test_s8_hanging_up_stops_the_replica_and_gives_its_room_back(
        self, model: FakeModel, stage: Stage, tokens: list[int] | None
    ) -> None:
        await model.start("a", room=1)
        going = stage.go()
        attempt = await model.begun()
        if tokens is not None:
            await attempt.send(*tokens)
            await until(lambda: going.run._taken_at is not None)
            await until(lambda: going.sink.token_ids == tokens)
        await going.cancel()
        await attempt.aborted.wait()
        assert model.idle
        following = stage.go()
        await live(await model.begun(), 1)
        await following.end()

    async def test_s8_hanging_up_stops_the_replica_that_it_has_moved_to(
        self, model: FakeModel, stage: Stage
    ) -> None:
        await model.start("a", "b")
        going = stage.go()
        await die_after(await model.begun(), going, 1)
        second = await model.begun()
        await second.send(2)
        await until(lambda: going.sink.token_ids == [1, 2])
        await going.cancel()
        await second.aborted.wait()
        assert model.idle

    async def test_s8_hanging_up_between_two_replicas_leaves_nothing_behind(
        self, model: FakeModel, stage: Stage
    ) -> None:
        await model.start("a")
        going = stage.go()
        del model.serve.replicas["a"]
        await die_after(await model.begun(), going, 1)
        await until(lambda: model.serve.waiting == 1)
        await going.cancel()
        assert model.idle

    async def test_a_sink_that_raises_ends_its_own_generation_only(
        self, model: FakeModel, stage: Stage, caplog: pytest.LogCaptureFixture
    ) -> None:
        class Broken(Sink):
            def push(self, delta: TokenDelta) -> bool:
                raise RuntimeError("a defect")

        await model.start("a")
        broken, sound = stage.go(sink=Broken()), stage.go()
        first, second = await model.begun(), await model.begun()
        await first.replica.send(
            TokenDelta(first.generation.generation_id, [1]),
            TokenDelta(second.generation.generation_id, [2]),
        )
        with pytest.raises(InternalError):
            await broken.end()
        await first.aborted.wait()
        await second.send(3, finish=FinishReason.STOP)
        await sound.end()
        assert sound.sink.token_ids == [2, 3]
        assert (sound.run.replica_switches, model.serve.asked) == (0, ["a"])
        (line,) = [record for record in caplog.records if record.levelname == "ERROR"]
        assert "Request request:" in line.getMessage()


class TestDeadlines:
    @pytest.mark.parametrize(
        ("changes", "age_s", "tokens"),
        [
            pytest.param({"first_token_deadline_s": 0.05}, 0, None, id="b7 first token, not had"),
            pytest.param({"first_token_deadline_s": 0.05}, 0, [], id="b7 first token"),
            pytest.param({"deadline_s": 0.2}, 0, [1], id="b7 whole, mid-stream"),
            pytest.param({"deadline_s": 0.2}, 0, [], id="b7 whole, no token"),
            pytest.param({}, 59.8, [1], id="b7 whole, most of it gone on arrival"),
            pytest.param({}, 61, None, id="b7 whole, gone on arrival"),
        ],
    )
    async def test_a_deadline_ends_the_generation_and_the_replicas_work(
        self, model: FakeModel, changes: dict[str, float], age_s: float, tokens: list[int] | None
    ) -> None:
        await model.start("a", "b")
        going = Stage(model.fleet, model.links, limits(**changes)).go(age_s=age_s)
        attempt = await model.begun()
        if tokens is not None:
            await attempt.send(*tokens)
        with pytest.raises(BackendFailureError, match="deadline"):
            await going.end()
        await attempt.aborted.wait()
        assert going.sink.token_ids == (tokens or [])
        assert model.nothing_begun
        assert model.idle

    @pytest.mark.parametrize(
        ("changes", "age_s"),
        [
            pytest.param({"cold_start_deadline_s": 0.05}, 0, id="b3 cold start"),
            pytest.param({"deadline_s": 0.05}, 0, id="b7 whole"),
            pytest.param({}, 59.9, id="b7 whole, most of it gone on arrival"),
        ],
    )
    @pytest.mark.parametrize("replicas", ["none", "full", "not connected"])
    async def test_a_deadline_ends_the_wait_for_a_replica(
        self, model: FakeModel, changes: dict[str, float], age_s: float, replicas: str
    ) -> None:
        if replicas == "full":
            await model.start("a", room=1)
            first = Stage(model.fleet, model.links).go()
            attempt = await model.begun()
        elif replicas == "not connected":
            model.fleet.changed({"a": 8})
        going = Stage(model.fleet, model.links, limits(**changes)).go(age_s=age_s)
        with pytest.raises(BackendFailureError, match="deadline"):
            await going.end()
        assert model.serve.waiting == 0
        if replicas == "full":
            assert model.serve.running == {"a": 1}
            await live(attempt, 1)
            await first.end()
        assert model.nothing_begun
        assert model.idle

    async def test_b7_time_in_the_queue_counts_for_the_whole(self, model: FakeModel) -> None:
        ended: list[asyncio.Task[None]] = []
        stage = Stage(model.fleet, model.links, limits(deadline_s=0.5))
        await model.start("a", room=1)
        seated_at_once = stage.go()
        await (await model.begun()).send(1)
        came_before = stage.go(age_s=0.2)
        await until(lambda: model.serve.waiting == 1)
        await model.start("a", "b", room=1)
        await (await model.begun()).send(1)
        for going in (seated_at_once, came_before):
            going.task.add_done_callback(ended.append)
        for going in (seated_at_once, came_before):
            with pytest.raises(BackendFailureError, match="deadline"):
                await going.end()
        assert ended == [came_before.task, seated_at_once.task]

    async def test_b7_the_first_token_is_waited_for_from_when_a_replica_was_asked(
        self, model: FakeModel
    ) -> None:
        going = Stage(model.fleet, model.links, limits(first_token_deadline_s=0.3)).go()
        await passed(0.3)
        await model.start("a")
        await live(await model.begun(), 1)
        await going.end()
        assert going.sink.token_ids == [1]

    async def test_b7_who_has_tokens_already_has_more_than_a_first_tokens_time(
        self, model: FakeModel
    ) -> None:
        await model.start("a", "b")
        going = Stage(model.fleet, model.links, limits(first_token_deadline_s=0.3)).go()
        await die_after(await model.begun(), going, 1)
        second = await model.begun()
        await second.take()
        await passed(0.4)
        await second.send(2, finish=FinishReason.STOP)
        await going.end()
        assert going.sink.token_ids == [1, 2]


class TestBudget:
    async def test_b1_the_budget_ends_retries_of_engines_that_fail_on_everything(
        self, model: FakeModel, stage: Stage
    ) -> None:
        await model.start("a")
        attempts = 0

        async def fail_all() -> None:
            nonlocal attempts
            while True:
                await (await model.begun()).fail()
                attempts += 1

        failing = asyncio.create_task(fail_all())
        for _ in range(100):
            with pytest.raises(BackendFailureError):
                await stage.go().end()
        failing.cancel()
        assert attempts <= 100 + FIRST_BALANCE + 100 * RETRIES_PER_GENERATION
        assert model.idle

    async def test_b1_generations_earn_what_a_retry_costs(
        self, model: FakeModel, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(retry_budget, "FIRST_BALANCE", 0)
        await model.start("a")
        stage = Stage(model.fleet, model.links)
        for _ in range(int(1 / RETRIES_PER_GENERATION)):
            going = stage.go()
            await live(await model.begun(), 1)
            await going.end()
        going = stage.go()
        await (await model.begun()).fail()
        await live(await model.begun(), 1)
        await going.end()
        assert going.run.replica_switches == 1

    async def test_b2_a_death_moves_whatever_ran_there_even_without_budget(
        self, model: FakeModel, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(retry_budget, "FIRST_BALANCE", 0)
        await model.start("a", "b")
        going = Stage(model.fleet, model.links).go()
        await die_after(await model.begun(), going, 1)
        await live(await model.begun(), 2)
        await going.end()
        assert going.sink.token_ids == [1, 2]

    async def test_b1_a_second_loss_is_paid_for(
        self, model: FakeModel, deaths_far_apart: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(retry_budget, "FIRST_BALANCE", 0)
        await model.start("a", "b")
        going = Stage(model.fleet, model.links).go()
        for _ in range(2):
            await die_after(await model.begun(), going, 1)
        with pytest.raises(BackendFailureError, match="too often"):
            await going.end()
        assert model.nothing_begun

    @pytest.mark.parametrize(
        "tokens", [pytest.param([], id="before"), pytest.param([1], id="after")]
    )
    async def test_a_request_that_kills_two_replicas_gets_no_third(
        self, model: FakeModel, caplog: pytest.LogCaptureFixture, tokens: list[int]
    ) -> None:
        await model.start("a", "b", "c")
        going = Stage(model.fleet, model.links, limits(retries=9)).go()
        for _ in range(2):
            await die_after(await model.begun(), going, *tokens)
        with pytest.raises(BackendFailureError, match="itself"):
            await going.end()
        assert model.nothing_begun
        (line,) = [record for record in caplog.records if record.levelname == "ERROR"]
        assert "Request request:" in line.getMessage()

    async def test_a_failure_that_kills_no_replica_is_no_poison(self, model: FakeModel) -> None:
        await model.start("a", "b")
        going = Stage(model.fleet, model.links, limits(retries=3)).go()
        await (await model.begun()).fail()
        await die_after(await model.begun(), going)
        await (await model.begun()).fail()
        await live(await model.begun(), 1)
        await going.end()
        assert going.sink.token_ids == [1]


class TestRefusals:
    """A replica that has no room, or drains, gives generations back; nobody has failed."""

    async def test_a_refused_generation_goes_elsewhere_and_nothing_is_counted(
        self, model: FakeModel, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(retry_budget, "FIRST_BALANCE", 0)
        await model.start("a", "b", "c", room=8)
        going = Stage(model.fleet, model.links, limits(retries=0)).go()
        refusing = [await model.begun()]
        await refusing[0].refuse()
        refusing.append(await model.begun())
        await refusing[1].refuse()
        last = await model.begun()
        names = {attempt.replica.name for attempt in (*refusing, last)}
        assert names == {"a", "b", "c"}
        assert (last.generation.token_ids, last.room) == (PROMPT, 8)
        await live(last, 1)
        await going.end()
        assert going.run.replica_switches == 0
        assert not any(attempt.aborted.is_set() for attempt in refusing)
        assert model.idle

    async def test_who_is_refused_everywhere_waits_for_room_before_all_others(
        self, model: FakeModel, stage: Stage
    ) -> None:
        await model.start("a", room=1)
        going = stage.go(Sampling(max_tokens=1))
        await (await model.begun()).refuse()
        await until(lambda: model.serve.waiting == 1)
        other = stage.go(Sampling(max_tokens=2))
        await until(lambda: model.serve.waiting == 2)
        await model.replicas["a"].beat(ReplicaLoad())
        first = await model.begun()
        assert first.generation.sampling.max_tokens == 1
        await live(first, 1)
        await going.end()
        await live(await model.begun(), 1, 2)
        await other.end()
        assert model.idle

    async def test_who_was_never_answered_keeps_its_turn(
        self, model: FakeModel, stage: Stage
    ) -> None:
        await model.start("a", room=1)
        going = stage.go(Sampling(max_tokens=1))
        first = await model.begun()
        other = stage.go(Sampling(max_tokens=2))
        await until(lambda: model.serve.waiting == 1)
        await first.die()
        again = await model.begun()
        assert again.generation.sampling.max_tokens == 1
        await live(again, 1)
        await going.end()
        await live(await model.begun(), 1, 2)
        await other.end()

    @pytest.mark.parametrize("tokens", [[], [1, 2]], ids=["no token yet", "mid-stream"])
    async def test_what_a_draining_replica_gives_back_goes_on_and_nothing_is_counted(
        self, model: FakeModel, monkeypatch: pytest.MonkeyPatch, tokens: list[int]
    ) -> None:
        monkeypatch.setattr(retry_budget, "FIRST_BALANCE", 0)
        await model.start("a", "b", room=1)
        stage = Stage(model.fleet, model.links, limits(retries=0))
        going, other = stage.go(), stage.go()
        first, second = await model.begun(), await model.begun()
        await first.send(*tokens)
        await until(lambda: going.sink.token_ids == tokens)
        number = first.generation.generation_id
        await first.replica.send(refused=[number], draining=True)
        # The other replica is full, and a stream that has begun does not wait.
        moved = await model.begun()
        assert moved.replica is second.replica
        assert moved.room == 2
        assert moved.generation.token_ids == [*PROMPT, *tokens]
        assert moved.generation.resumed_tokens == len(tokens)
        await live(moved, 3)
        await going.end()
        assert going.sink.token_ids == [*tokens, 3]
        assert going.run.replica_switches == 1
        assert model.serve.most_waiting == 0
        await live(second, 1)
        await other.end()
        assert model.idle


class TestMoving:
    """B2: what a replica has lost goes on beside what others run, at once."""

    async def test_b2_two_deaths_in_a_row_under_load_keep_nobody_waiting(
        self, model: FakeModel, deaths_far_apart: None
    ) -> None:
        await model.start("a", "b", "c", room=6)
        stage = Stage(model.fleet, model.links)
        running = [stage.go(prompt=[number]) for number in range(9)]
        attempts = {}
        for _ in running:
            attempt = await model.begun()
            await attempt.take()
            attempts[attempt.generation.token_ids[0]] = attempt
        await until(lambda: all(each.run._taken_at is not None for each in running))
        for victim in ("a", "b"):
            del model.serve.replicas[victim]
            lost = [each for each in attempts.values() if each.replica.name == victim]
            assert lost
            await model.replicas[victim].lose()
            for _ in lost:
                attempt = await model.begun()
                await attempt.take()
                attempts[attempt.generation.token_ids[0]] = attempt
            await until(lambda: all(each.run._taken_at is not None for each in running))
        assert model.serve.most_waiting == 0
        assert model.serve.running["c"] == 9
        for attempt in attempts.values():
            await attempt.send(1, finish=FinishReason.STOP)
        for each in running:
            await each.end()
        assert model.idle

    async def test_b2_where_all_replicas_were_lost_the_next_takes_all_that_they_ran(
        self, model: FakeModel, stage: Stage
    ) -> None:
        await model.start("a", room=4)
        running = [stage.go(prompt=[number]) for number in range(4)]
        for _ in running:
            await (await model.begun()).send(1)
        await until(lambda: all(each.sink.token_ids == [1] for each in running))
        del model.serve.replicas["a"]
        await model.replicas["a"].lose()
        await until(lambda: model.serve.waiting == 4)
        await model.start("b", room=2)
        attempts = [await model.begun() for _ in running]
        assert [each.generation.token_ids for each in attempts] == [[n, 1] for n in range(4)]
        for attempt in attempts:
            await attempt.send(2, finish=FinishReason.STOP)
        for each in running:
            await each.end()
            assert each.sink.token_ids == [1, 2]
        assert model.idle

    async def test_b2_beyond_twice_a_replicas_number_a_moved_one_waits_before_new_ones(
        self, model: FakeModel, stage: Stage
    ) -> None:
        await model.start("a", "b", room=1)
        del model.serve.replicas["a"]
        running = [stage.go(prompt=[number]) for number in range(2)]
        attempts = [await model.begun(), await model.begun()]
        new = stage.go(prompt=[9])
        await until(lambda: model.serve.waiting == 1)
        for attempt in attempts:
            await attempt.take()
        await until(lambda: all(each.run._taken_at is not None for each in running))
        (lost,) = [each for each in attempts if each.replica.name == "a"]
        (kept,) = [each for each in attempts if each.replica.name == "b"]
        # Full, with one of another gateway replica beyond its number.
        await kept.replica.beat(ReplicaLoad(running=2))
        await until(lambda: model.switchboard._replicas["b"].others == 1)
        await lost.die()
        await until(lambda: model.serve.waiting == 2)
        await kept.replica.beat(ReplicaLoad(running=1))
        await live(kept, 1)
        moved = await model.begun()
        assert moved.generation.token_ids == lost.generation.token_ids
        await live(moved, 1)
        await live(await model.begun(), 1)
        for each in (*running, new):
            await each.end()
        assert model.idle


class TestSilence:
    @pytest.fixture(autouse=True)
    def quick(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(wire, "SILENCE_S", 0.1)
        monkeypatch.setattr(link_module, "CHECK_S", 0.02)

    @pytest.mark.parametrize("tokens", [[], [1]], ids=["before", "after"])
    async def test_b2_a_frozen_replicas_generation_goes_on_elsewhere(
        self, model: FakeModel, stage: Stage, tokens: list[int]
    ) -> None:
        await model.start("a", "b")
        going = stage.go()
        frozen = await model.begun()
        await frozen.replica.beat()
        await frozen.send(*tokens)
        await live(await model.begun(), 2)
        await going.end()
        assert going.sink.token_ids == [*tokens, 2]
        assert going.run.replica_switches == 1
        await frozen.replica.closed()

    async def test_b1_what_a_frozen_replica_never_had_is_tried_again_and_not_counted(
        self, model: FakeModel
    ) -> None:
        await model.start("a", "b")
        going = Stage(model.fleet, model.links, limits(retries=0)).go()
        for _ in range(3):
            await (await model.begun()).replica.beat()
        await live(await model.begun(), 1)
        await going.end()
        assert going.sink.token_ids == [1]
        assert going.run.replica_switches == 0


SAMPLINGS = [
    pytest.param(Sampling(max_tokens=40, temperature=0, logprobs=2), id="greedy"),
    pytest.param(Sampling(max_tokens=40, seed=5, logprobs=2), id="seeded"),
]
STORY = b"Once upon a time"


@pytest_asyncio.fixture
async def engine() -> AsyncGenerator[SimulatedEngine]:
    profile = {"decode_step_s": 0, "prefill_tokens_per_s": 0}
    engine = await SimulatedEngine.launch({"profile": dict(profile)}, stall_s=60)
    yield engine
    await engine.close()


async def told(
    engine: SimulatedEngine, sampling: Sampling, deaths: list[int]
) -> tuple[Sink, EngineFleet]:
    """Return what is read of a generation whose replicas die after so many tokens."""
    async with EngineFleet(engine, deaths) as replicas:
        stage = Stage(replicas.fleet, replicas.links, limits(retries=len(deaths)))
        going = stage.go(sampling, prompt=STORY)
        await going.end()
        assert replicas.serve.idle
        assert replicas.serve.most_waiting == 0
    return going.sink, replicas


@pytest.mark.parametrize("sampling", SAMPLINGS)
async def test_b2_a_death_at_any_token_changes_nothing(
    engine: SimulatedEngine, sampling: Sampling
) -> None:
    whole, _ = await told(engine, sampling, [])
    assert len(whole.token_ids) == sampling.max_tokens
    for cut in range(sampling.max_tokens + 1):
        sink, replicas = await told(engine, sampling, [cut])
        assert sink.token_ids == whole.token_ids, cut
        assert sink.logprobs == whole.logprobs, cut
        assert sink.finish_reasons == whole.finish_reasons, cut
        # Tokens and their frames may be lost together with the replica, so fewer are resumed.
        for asked in replicas.dispatched[1:]:
            assert asked.token_ids[len(STORY) :] == whole.token_ids[: asked.resumed_tokens]
            assert asked.sampling.max_tokens == sampling.max_tokens - asked.resumed_tokens


async def test_b2_two_deaths_at_any_tokens_change_nothing(
    engine: SimulatedEngine, deaths_far_apart: None
) -> None:
    sampling = Sampling(max_tokens=10, temperature=0)
    whole, _ = await told(engine, sampling, [])
    for first in range(sampling.max_tokens):
        for second in range(sampling.max_tokens - first):
            sink, _ = await told(engine, sampling, [first, second])
            assert sink.token_ids == whole.token_ids, (first, second)
            assert sink.finish_reasons == whole.finish_reasons, (first, second)


async def test_b2_the_end_of_the_text_is_where_it_was(engine: SimulatedEngine) -> None:
    sampling = Sampling(max_tokens=1000, temperature=0)
    whole, _ = await told(engine, sampling, [])
    assert whole.finish_reasons == [FinishReason.STOP]
    tokens = len(whole.token_ids)
    for cut in (0, 1, tokens // 2, tokens - 2, tokens - 1):
        sink, _ = await told(engine, sampling, [cut])
        assert sink.token_ids == whole.token_ids, cut
        assert sink.finish_reasons == [FinishReason.STOP]


class Platform:
    """Engine replicas that a test kills and drains, and Serve starts others in their place."""

    def __init__(self, links: ReplicaLinks) -> None:
        self.links = links
        self.serve = FakeServe()
        self.fleet = Fleet(links, Switchboard(), lambda _: self.serve)
        self.replicas: list[EngineReplica] = []
        self._all: list[EngineReplica] = []

    async def scale(self, count: int, *, room: int, step_s: float = 0.0) -> None:
        while len(self.replicas) < count:
            profile = {"decode_step_s": step_s, "prefill_tokens_per_s": 0}
            engine = await SimulatedEngine.launch({"profile": dict(profile)}, stall_s=60)
            replica = EngineReplica(f"replica-{len(self._all)}", engine)
            self.serve.replicas[replica.name] = replica.connect
            self.replicas.append(replica)
            self._all.append(replica)
        self.fleet.changed({replica.name: room for replica in self.replicas})

    @property
    def ongoing(self) -> int:
        return sum(replica.runs.ongoing for replica in self._all)

    async def close(self) -> None:
        self.fleet.changed({})
        for replica in self._all:
            await replica.links.close()
            await replica.engine.close()


@pytest_asyncio.fixture
async def platform(
    links: ReplicaLinks, monkeypatch: pytest.MonkeyPatch
) -> AsyncGenerator[Platform]:
    monkeypatch.setattr(fleet_module, "CONTACT_INTERVAL_S", 0.001)
    platform = Platform(links)
    yield platform
    await platform.close()


@pytest.mark.parametrize("seed", range(3))
async def test_whatever_happens_every_answer_is_whole_and_nothing_is_left_behind(
    platform: Platform, deaths_far_apart: None, seed: int
) -> None:
    """Kill, drain and break connections under load, while clients come and hang up."""
    drawn = random.Random(seed)
    room = 6
    await platform.scale(3, room=room, step_s=0.001)
    stage = Stage(platform.fleet, platform.links, limits(retries=50, deadline_s=300))
    stage.dispatcher.budget._balance = 1000
    undisturbed = stage.go(Sampling(max_tokens=30, temperature=0))
    await undisturbed.end()
    waiting: list[asyncio.Task[None]] = []

    async def client() -> None:
        going = stage.go(Sampling(max_tokens=30, temperature=0))
        if drawn.random() < 0.3:
            await passed(drawn.random() * 0.05)
            if not going.task.done():
                await going.cancel()
            return
        await going.end()
        assert going.sink.token_ids == undisturbed.sink.token_ids
        assert going.sink.finish_reasons == undisturbed.sink.finish_reasons

    async def disturb(victim: EngineReplica) -> None:
        match drawn.choice(["kill", "drain", "cut"]):
            case "kill":
                platform.replicas.remove(victim)
                victim.die()
            case "drain":
                platform.replicas.remove(victim)
                await victim.drain(drawn.choice([0.0, 0.01, 5.0]))
            case "cut":
                victim.die()
                victim.dead = False

    for _ in range(12):
        waiting += [asyncio.create_task(client()) for _ in range(room * 2)]
        await passed(drawn.random() * 0.03)
        await disturb(drawn.choice(platform.replicas))
        await platform.scale(3, room=room, step_s=0.001)
    async with asyncio.timeout(60):
        await asyncio.gather(*waiting)
    assert platform.serve.idle
    assert stage.dispatcher.queue.waiting == 0
    await until(lambda: platform.ongoing == 0)
    assert all(each.mine == 0 for each in platform.fleet.switchboard._replicas.values())

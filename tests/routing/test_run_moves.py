"""Generations that replicas lose, refuse or keep silent about."""

import asyncio

import pytest
from tests.routing.conftest import FakeModel, die_after, live, until
from tests.routing.stages import PROMPT, Stage, limits

from tera import wire
from tera.errors import BackendFailureError
from tera.generation import FinishReason, ReplicaLoad, Sampling
from tera.routing import link as link_module
from tera.routing import retry_budget
from tera.routing.retry_budget import FIRST_BALANCE, RETRIES_PER_GENERATION


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

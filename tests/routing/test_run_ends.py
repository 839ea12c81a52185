"""Generations that are stopped, or whose time is up."""

import asyncio

import pytest
from tests.routing.conftest import FakeModel, die_after, live, passed, until
from tests.routing.stages import PROMPT, SALT, Sink, Stage, limits

from tera.errors import BackendFailureError, InternalError
from tera.generation import FinishReason, GenerationFailure, TokenDelta
from tera.routing.switchboard import Route, Share


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

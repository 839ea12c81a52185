"""A model's replicas as one gateway replica uses them: connected, chosen, counted."""

import asyncio

import pytest
from tests.routing.conftest import Address, FakeModel, FakeReplica, Heard, until

from tera.errors import EngineError
from tera.generation import FinishReason, Generation, ReplicaLoad, Sampling
from tera.routing import fleet as fleet_module
from tera.routing.fleet import Seat
from tera.routing.link import ReplicaLinks
from tera.routing.switchboard import MOVED_ROOM, Route, Share


def route(*, moved: bool = False) -> Route:
    return Route(Share("tenant"), [1, 2, 3], "", 9, moved)


def taken(model: FakeModel, *, moved: bool = False) -> Seat:
    seat = model.fleet.seat_now(route(moved=moved))
    assert seat is not None
    return seat


def waiting(model: FakeModel) -> asyncio.Task[Seat]:
    return asyncio.create_task(model.fleet.seat(route(), again=False))


def begin(model: FakeModel, seat: Seat) -> Heard:
    heard = Heard()
    number = model.links.new_generation_id()
    seat.begin(Generation(number, "request", [1, 2, 3], Sampling(max_tokens=9)), heard)
    return heard


async def asked_enough(model: FakeModel) -> None:
    """Wait until no replica is being asked to connect."""
    await until(lambda: not model.fleet._contacts)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet_module, "CONTACT_INTERVAL_S", 0.001)


class TestContact:
    async def test_a_new_replica_is_asked_once_and_given_work_when_it_is_connected(
        self, model: FakeModel
    ) -> None:
        connect, may_connect = model.serve.replicas, asyncio.Event()

        async def in_a_while(address: Address) -> None:
            await may_connect.wait()
            await model._connect("a", address)

        connect["a"] = in_a_while
        model.fleet.changed({"a": 8})
        held = waiting(model)
        await until(lambda: model.serve.asked == ["a"] and model.serve.waiting == 1)
        assert model.fleet.seat_now(route()) is None
        may_connect.set()
        seat = await held
        assert seat.replica_id == "a"
        seat.leave()
        await asked_enough(model)
        assert model.serve.asked == ["a"]

    async def test_a_replica_that_is_connected_already_is_not_asked(
        self, model: FakeModel, links: ReplicaLinks
    ) -> None:
        replica = await FakeReplica.connect(links.address, "a")
        model.fleet.changed({"a": 8})
        assert taken(model).replica_id == "a"
        assert model.serve.asked == []
        await replica.close()

    async def test_a_replica_that_cannot_connect_is_asked_until_it_does(
        self, model: FakeModel, quick: None
    ) -> None:
        async def cannot_yet(address: Address) -> None:
            if len(model.serve.asked) < 5:
                raise EngineError("The engine replica could not be reached.")
            await model._connect("a", address)

        model.serve.replicas["a"] = cannot_yet
        await model.start("a")
        assert model.serve.asked == ["a"] * 5

    async def test_a_replica_that_does_not_answer_is_asked_again(
        self, model: FakeModel, quick: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(fleet_module, "CONTACT_DEADLINE_S", 0.01)

        async def hangs(address: Address) -> None:
            if len(model.serve.asked) < 3:
                await asyncio.Event().wait()
            await model._connect("a", address)

        model.serve.replicas["a"] = hangs
        await model.start("a")
        assert len(model.serve.asked) >= 3  # connecting may take longer than the deadline too

    async def test_a_replica_that_serve_takes_away_is_asked_no_more(
        self, model: FakeModel, quick: None
    ) -> None:
        model.fleet.changed({"a": 8})  # which fails: it is not there
        await until(lambda: len(model.serve.asked) > 2)
        model.fleet.changed({})
        await asked_enough(model)

    async def test_one_that_hangs_keeps_no_other_from_connecting(self, model: FakeModel) -> None:
        async def hangs(address: Address) -> None:
            await asyncio.Event().wait()

        model.serve.replicas["hangs"] = hangs
        model.fleet.changed({"hangs": 8})
        await until(lambda: model.serve.asked == ["hangs"])
        model.serve.replicas["a"] = lambda address: model._connect("a", address)
        model.fleet.changed({"hangs": 8, "a": 8})
        await until(lambda: model.links.find("a") is not None)
        assert taken(model).replica_id == "a"

    async def test_a_lost_replica_gets_nothing_and_is_asked_at_once(self, model: FakeModel) -> None:
        await model.start("a")
        gone = model.replicas["a"]
        model.links.watch("a", model.fleet)
        link = model.links.find("a")
        assert link is not None
        link.abort()
        await until(lambda: model.links.find("a") is not link)
        held = waiting(model)
        assert (await held).replica_id == "a"
        assert model.serve.asked == ["a", "a"]
        await gone.closed()

    async def test_a_replica_that_is_lost_as_it_connects_is_asked_again(
        self, model: FakeModel
    ) -> None:
        async def dies_at_once(address: Address) -> None:
            await model._connect("a", address)
            link = model.links.find("a")
            assert link is not None
            if len(model.serve.asked) == 1:
                link.abort()  # which is told when this is over: the call has succeeded

        model.serve.replicas["a"] = dies_at_once
        model.fleet.changed({"a": 8})
        await until(lambda: model.serve.asked == ["a", "a"] and model.links.find("a") is not None)
        assert taken(model).replica_id == "a"


class TestLeaving:
    async def test_a_draining_replica_gets_nothing_new_and_ends_what_it_runs(
        self, model: FakeModel
    ) -> None:
        await model.start("a", room=8)
        seat = taken(model)
        heard = begin(model, seat)
        attempt = await model.begun()
        await attempt.replica.send(draining=True)
        await until(lambda: model.switchboard.capacity("a") == 0)
        assert model.fleet.seat_now(route()) is None
        model.fleet.changed({"a": 8})  # Serve says so later
        assert model.fleet.seat_now(route()) is None
        await attempt.send(1, finish=FinishReason.STOP)
        await until(lambda: heard.token_ids == [1])
        model.fleet.changed({})
        seat.leave()
        assert model.idle

    async def test_what_runs_on_a_replica_that_serve_took_away_goes_on(
        self, model: FakeModel
    ) -> None:
        await model.start("a")
        seat = taken(model)
        heard = begin(model, seat)
        attempt = await model.begun()
        model.fleet.changed({})
        assert model.fleet.seat_now(route()) is None
        await attempt.send(1, finish=FinishReason.STOP)
        await until(lambda: heard.token_ids == [1])
        assert model.serve.running == {"a": 1}
        seat.leave()
        assert model.serve.idle

    async def test_a_replica_that_comes_back_is_used_again(self, model: FakeModel) -> None:
        await model.start("a")
        model.fleet.changed({})
        assert model.fleet.seat_now(route()) is None
        model.fleet.changed({"a": 8})
        assert taken(model).replica_id == "a"
        assert model.serve.asked == ["a"]

    async def test_who_waits_gets_the_replica_that_comes(self, model: FakeModel) -> None:
        held = [waiting(model) for _ in range(3)]
        await until(lambda: model.serve.waiting == 3)
        await model.start("a")
        assert [(await each).replica_id for each in held] == ["a"] * 3
        assert (model.serve.waiting, model.serve.running) == (0, {"a": 3})


class TestRoom:
    async def test_a_replica_is_told_how_many_it_may_run_and_twice_that_for_moved_ones(
        self, model: FakeModel
    ) -> None:
        await model.start("a", room=3)
        begin(model, taken(model))
        assert (await model.begun()).room == 3
        begin(model, taken(model, moved=True))
        assert (await model.begun()).room == 3 * MOVED_ROOM

    async def test_another_number_holds_from_the_next_generation_on(self, model: FakeModel) -> None:
        await model.start("a", room=1)
        seat = taken(model)
        assert model.fleet.seat_now(route()) is None
        model.fleet.changed({"a": 2})
        begin(model, taken(model))
        assert (await model.begun()).room == 2
        model.fleet.changed({"a": 1})
        seat.leave()
        assert model.fleet.seat_now(route()) is None
        assert model.serve.asked == ["a"]

    async def test_moved_ones_take_room_beyond_the_number_up_to_twice_it(
        self, model: FakeModel
    ) -> None:
        await model.start("a", "b", room=2)
        for _ in range(4):
            taken(model)
        assert model.fleet.seat_now(route()) is None
        moved = [taken(model, moved=True).replica_id for _ in range(4)]
        assert sorted(moved) == [*"aabb"]
        assert model.fleet.seat_now(route(moved=True)) is None

    async def test_a_refusing_replica_gets_nothing_until_it_reports(self, model: FakeModel) -> None:
        await model.start("a", room=8)
        seat = taken(model)
        seat.leave(refused=True)
        assert model.fleet.seat_now(route()) is None
        held = waiting(model)
        await model.replicas["a"].beat(ReplicaLoad(running=7))
        assert (await held).replica_id == "a"


class TestCounts:
    async def test_who_waits_is_counted_until_it_has_a_seat(self, model: FakeModel) -> None:
        await model.start("a", room=1)
        first = taken(model)
        held = waiting(model)
        await until(lambda: model.serve.waiting == 1)
        assert model.serve.running == {"a": 1}
        first.leave()
        second = await held
        assert (model.serve.waiting, model.serve.running) == (0, {"a": 1})
        second.leave()
        assert model.idle

    async def test_who_gives_up_waiting_is_counted_no_more(self, model: FakeModel) -> None:
        held = waiting(model)
        await until(lambda: model.serve.waiting == 1)
        held.cancel()
        await asyncio.wait([held])
        assert model.idle

    async def test_who_gives_up_in_the_moment_of_getting_a_seat_leaves_it(
        self, model: FakeModel
    ) -> None:
        await model.start("a", room=1)
        first = taken(model)
        held = waiting(model)
        await until(lambda: model.serve.waiting == 1)
        first.leave()
        held.cancel()
        await asyncio.wait([held])
        assert held.cancelled()
        assert model.idle

    async def test_a_seat_at_a_replica_that_was_lost_meanwhile_is_looked_for_elsewhere(
        self, model: FakeModel
    ) -> None:
        await model.start("a", "b", room=1)
        seats = {seat.replica_id: seat for seat in (taken(model), taken(model))}
        held = waiting(model)
        await until(lambda: model.serve.waiting == 1)
        link = model.links.find("a")
        assert link is not None
        del model.serve.replicas["a"]
        seats["a"].leave()  # `held` is given the seat, and has not run yet when it is lost
        link.connection_lost(None)
        assert not held.done()
        seats["b"].leave()
        assert (await held).replica_id == "b"
        assert +model.serve.running == {"b": 1}
        assert model.switchboard._replicas["a"].mine == 0
        link.abort()

    async def test_leaving_a_seat_stops_what_still_runs_there(self, model: FakeModel) -> None:
        await model.start("a")
        seat = taken(model)
        begin(model, seat)
        attempt = await model.begun()
        seat.leave()
        await attempt.aborted.wait()
        assert model.idle

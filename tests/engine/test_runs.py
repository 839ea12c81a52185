"""What a replica makes of orders: an engine that does as it is told, and real links."""

import asyncio
from collections.abc import AsyncGenerator, Callable

import pytest
import pytest_asyncio
from tests.engine.gateways import NAME, Connection, FakeGateway
from tests.routing.conftest import SECRET, until

from tera.engine.link import GatewayLinks
from tera.engine.runs import Runs
from tera.errors import (
    ContextLengthError,
    EngineError,
    InvalidValueError,
    ReplicaLostError,
    TeraError,
)
from tera.generation import (
    Abort,
    Begin,
    FinishReason,
    Generation,
    GenerationFailure,
    ReplicaLoad,
    Sampling,
    StepFrame,
    TokenDelta,
)

ROOM = 2


class Started:
    """A generation inside the engine, which goes on as the test says."""

    def __init__(
        self,
        generation: Generation,
        emit: Callable[[TokenDelta], None],
        ended: Callable[[TeraError], None],
    ) -> None:
        self.generation = generation
        self.ended = ended
        self.aborts = 0
        self._emit = emit

    def emit(self, *token_ids: int, finish: FinishReason | None = None) -> None:
        self._emit(TokenDelta(self.generation.generation_id, list(token_ids), finish))

    def abort(self) -> None:
        self.aborts += 1


class Engine:
    """A `TextEngine` whose generations make no step of their own."""

    def __init__(self) -> None:
        self.figures = ReplicaLoad()
        self.started: list[Started] = []
        self.on_start: Callable[[Started], None] = lambda _: None
        """What happens inside of `start`; what it raises, `start` raises."""

    def start(
        self,
        generation: Generation,
        emit: Callable[[TokenDelta], None],
        ended: Callable[[TeraError], None],
    ) -> Callable[[], None]:
        started = Started(generation, emit, ended)
        self.started.append(started)
        self.on_start(started)
        return started.abort

    def load(self) -> ReplicaLoad:
        return self.figures

    def metrics_text(self) -> str:
        return ""

    async def check_health(self) -> None:
        pass

    async def close(self) -> None:
        pass


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
def runs(engine: Engine) -> Runs:
    return Runs(engine)


@pytest_asyncio.fixture
async def links(runs: Runs) -> AsyncGenerator[GatewayLinks]:
    links = GatewayLinks(NAME, SECRET, runs)
    yield links
    await links.close()


@pytest_asyncio.fixture
async def gateways(links: GatewayLinks) -> AsyncGenerator[tuple[Connection, Connection]]:
    """Two gateway replicas that the replica is connected to."""
    async with FakeGateway() as one, FakeGateway() as two:
        for gateway in (one, two):
            await links.connect(gateway.address)
        yield await one.connected(), await two.connected()


@pytest.fixture
def gateway(gateways: tuple[Connection, Connection]) -> Connection:
    return gateways[0]


def begin(generation_id: int, most_ongoing: int = ROOM) -> Begin:
    sampling = Sampling(max_tokens=9)
    return Begin(Generation(generation_id, "request", [1, 2, 3], sampling), most_ongoing)


async def begun(engine: Engine, gateway: Connection, *generation_ids: int) -> list[Started]:
    """Order generations, and return them once the gateway has heard that they are there."""
    gateway.order(*(begin(number, most_ongoing=9) for number in generation_ids))
    waited_for = set(generation_ids)
    while waited_for:
        waited_for -= {delta.generation_id for delta in (await gateway.news()).deltas}
    return engine.started[-len(generation_ids) :]


class TestOrders:
    async def test_a_generation_is_had_runs_and_ends(
        self, engine: Engine, runs: Runs, gateway: Connection
    ) -> None:
        order = begin(7)
        gateway.order(order)
        assert (await gateway.news()).deltas == [TokenDelta(7, [])]  # «I have it»
        (started,) = engine.started
        assert started.generation == order.generation
        assert runs.ongoing == 1
        started.emit(1, 2)
        assert (await gateway.news()).deltas == [TokenDelta(7, [1, 2])]
        started.emit(3, finish=FinishReason.STOP)
        assert runs.ongoing == 0
        assert (await gateway.news()).deltas == [TokenDelta(7, [3], FinishReason.STOP)]
        assert started.aborts == 0

    async def test_the_load_that_gateways_hear_is_the_engines(
        self, engine: Engine, gateway: Connection
    ) -> None:
        (started,) = await begun(engine, gateway, 1)
        engine.figures = ReplicaLoad(running=1, waiting=4, kv_usage_ratio=0.5)
        started.emit(1)
        assert (await gateway.news()).load == engine.figures

    async def test_what_is_stopped_is_heard_of_no_more(
        self, engine: Engine, runs: Runs, gateway: Connection
    ) -> None:
        stopped, other = await begun(engine, gateway, 1, 2)
        gateway.order(Abort(1))
        await until(lambda: stopped.aborts == 1)
        assert runs.ongoing == 1
        other.emit(5)
        assert await gateway.news() == StepFrame(ReplicaLoad(), [TokenDelta(2, [5])])
        assert other.aborts == 0

    async def test_stopping_what_has_ended_or_never_was_does_nothing(
        self, engine: Engine, gateway: Connection
    ) -> None:
        (ended,) = await begun(engine, gateway, 1)
        ended.emit(1, finish=FinishReason.STOP)
        gateway.order(Abort(1), Abort(99))
        await begun(engine, gateway, 2)
        assert ended.aborts == 0

    async def test_the_engine_may_emit_before_it_has_started(
        self, engine: Engine, runs: Runs, gateway: Connection
    ) -> None:
        engine.on_start = lambda started: started.emit(1, finish=FinishReason.STOP)
        gateway.order(begin(1))
        assert (await gateway.news()).deltas == [TokenDelta(1, [1], FinishReason.STOP)]
        assert runs.ongoing == 0


class TestRoom:
    async def test_a_full_replica_refuses_counting_all_gateways(
        self, engine: Engine, runs: Runs, gateways: tuple[Connection, Connection]
    ) -> None:
        one, two = gateways
        (first,) = await begun(engine, one, 1)
        await begun(engine, two, 1)
        for gateway in gateways:
            gateway.order(begin(2), begin(3))
            refused: list[int] = []
            while len(refused) < 2:
                refused += (await gateway.news()).refused
            assert refused == [2, 3]
        assert (len(engine.started), runs.ongoing) == (2, 2)
        first.emit(1, finish=FinishReason.STOP)
        two.order(begin(4), begin(5))
        frame = await two.news()
        assert (frame.deltas, frame.refused) == ([TokenDelta(4, [])], [5])

    async def test_each_order_brings_its_own_number(
        self, engine: Engine, gateway: Connection
    ) -> None:
        await begun(engine, gateway, 1, 2)
        gateway.order(begin(3, most_ongoing=2), begin(4, most_ongoing=4), begin(5, most_ongoing=2))
        frame = await gateway.news()
        assert (frame.deltas, frame.refused) == ([TokenDelta(4, [])], [3, 5])

    async def test_gateways_may_use_the_same_ids(
        self, engine: Engine, gateways: tuple[Connection, Connection]
    ) -> None:
        one, two = gateways
        (ours,) = await begun(engine, one, 1)
        (theirs,) = await begun(engine, two, 1)
        one.order(Abort(1))
        await until(lambda: ours.aborts == 1)
        assert theirs.aborts == 0
        theirs.emit(2)
        assert (await two.news()).deltas == [TokenDelta(1, [2])]

    async def test_a_gateway_that_goes_stops_its_own_generations(
        self, engine: Engine, runs: Runs, gateways: tuple[Connection, Connection]
    ) -> None:
        one, two = gateways
        ours = await begun(engine, one, 1, 2)
        (theirs,) = await begun(engine, two, 1)
        one.writer.transport.abort()
        await until(lambda: [each.aborts for each in ours] == [1, 1])
        assert (runs.ongoing, theirs.aborts) == (1, 0)
        theirs.emit(2)
        assert (await two.news()).deltas == [TokenDelta(1, [2])]


FAILURES = [
    pytest.param(
        EngineError("The engine failed this generation."),
        GenerationFailure(1, "The engine failed this generation."),
        id="the engine's fault",
    ),
    pytest.param(
        ReplicaLostError("The engine has stopped."),
        GenerationFailure(1, "The engine has stopped."),
        id="a dead engine",
    ),
    pytest.param(
        InvalidValueError("top_p is out of range.", param="top_p"),
        GenerationFailure(1, "top_p is out of range.", "invalid_value", "top_p"),
        id="the request's fault",
    ),
    pytest.param(
        ContextLengthError("The prompt is too long."),
        GenerationFailure(1, "The prompt is too long.", "context_length_exceeded"),
        id="the request's fault, of no parameter",
    ),
]
DEFECT = pytest.param(
    RuntimeError("internals that no client may read"),
    GenerationFailure(1, "The engine replica failed."),
    id="a defect",
)


class TestFailures:
    @pytest.mark.parametrize(("error", "failure"), FAILURES)
    async def test_an_engines_error_arrives_after_its_tokens(
        self,
        engine: Engine,
        runs: Runs,
        gateway: Connection,
        error: TeraError,
        failure: GenerationFailure,
    ) -> None:
        (started,) = await begun(engine, gateway, 1)
        started.emit(1)
        started.ended(error)
        expected = StepFrame(ReplicaLoad(), [TokenDelta(1, [1])], [failure])
        assert await gateway.news() == expected
        assert runs.ongoing == 0
        gateway.order(Abort(1))
        await begun(engine, gateway, 2)
        assert started.aborts == 0

    @pytest.mark.parametrize(("error", "failure"), [*FAILURES, DEFECT])
    async def test_an_engine_that_does_not_start_it_fails_that_generation_alone(
        self,
        engine: Engine,
        runs: Runs,
        gateway: Connection,
        error: Exception,
        failure: GenerationFailure,
    ) -> None:
        def refuse(started: Started) -> None:
            raise error

        (running,) = await begun(engine, gateway, 2)
        engine.on_start = refuse
        gateway.order(begin(1))
        frame = await gateway.news()
        assert (frame.deltas, frame.failures) == ([TokenDelta(1, [])], [failure])
        assert runs.ongoing == 1
        running.emit(5)
        assert (await gateway.news()).deltas == [TokenDelta(2, [5])]

    async def test_a_defect_is_logged_with_its_cause(
        self, engine: Engine, gateway: Connection, caplog: pytest.LogCaptureFixture
    ) -> None:
        def fail(started: Started) -> None:
            raise RuntimeError("the cause")

        engine.on_start = fail
        gateway.order(begin(1))
        await gateway.news()
        (line,) = [record for record in caplog.records if record.levelname == "ERROR"]
        assert line.exc_info is not None
        assert str(line.exc_info[1]) == "the cause"


class TestDraining:
    async def test_it_waits_for_what_runs_and_takes_nothing_new(
        self, engine: Engine, runs: Runs, gateways: tuple[Connection, Connection]
    ) -> None:
        one, two = gateways
        (first,) = await begun(engine, one, 1)
        (second,) = await begun(engine, two, 1)
        draining = asyncio.create_task(runs.drain(60))
        await asyncio.sleep(0)
        one.order(begin(2, most_ongoing=9))
        assert await one.news() == StepFrame(ReplicaLoad(), refused=[2])
        first.emit(1, finish=FinishReason.STOP)
        assert (await one.news()).deltas == [TokenDelta(1, [1], FinishReason.STOP)]
        assert not draining.done()
        second.ended(EngineError("The engine failed."))
        await draining
        assert [each.aborts for each in engine.started] == [0, 0]

    async def test_what_has_not_ended_in_time_is_given_back_after_its_tokens(
        self, engine: Engine, runs: Runs, gateways: tuple[Connection, Connection]
    ) -> None:
        one, two = gateways
        (first,) = await begun(engine, one, 1)
        await begun(engine, two, 1)
        first.emit(5)
        await runs.drain(0)
        assert [each.aborts for each in engine.started] == [1, 1]
        assert runs.ongoing == 0
        assert await one.news() == StepFrame(ReplicaLoad(), [TokenDelta(1, [5])])
        assert await one.news() == StepFrame(ReplicaLoad(), refused=[1])
        assert await two.news() == StepFrame(ReplicaLoad(), refused=[1])

    async def test_an_idle_replica_has_drained(self, runs: Runs) -> None:
        async with asyncio.timeout(5):
            await runs.drain(60)

    async def test_what_gateways_stop_is_waited_for_no_more(
        self, engine: Engine, runs: Runs, gateways: tuple[Connection, Connection]
    ) -> None:
        one, two = gateways
        await begun(engine, one, 1)
        await begun(engine, two, 1)
        draining = asyncio.create_task(runs.drain(60))
        one.order(Abort(1))
        two.writer.transport.abort()
        async with asyncio.timeout(5):
            await draining
        assert [each.aborts for each in engine.started] == [1, 1]

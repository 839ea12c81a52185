"""The gateway's end of the token channel, with fake replicas and with the real other end."""

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.routing.conftest import HOST, SECRET, FakeReplica, Heard, until
from tests.routing.generations import ROOM, begun, generation, last

from tera import wire
from tera.errors import (
    ContextLengthError,
    EngineError,
    InvalidRequestError,
    InvalidValueError,
    TeraError,
)
from tera.generation import (
    Begin,
    Generation,
    GenerationFailure,
    ReplicaLoad,
    Sampling,
    StepFrame,
    TokenDelta,
    encode,
)
from tera.routing.link import ReplicaLinks


async def test_a_replica_gets_the_order_and_the_listener_its_deltas(links: ReplicaLinks) -> None:
    replica = await FakeReplica.connect(links.address)
    link = links.find("replica")
    assert link is not None
    asked, heard = generation(links), Heard()
    link.begin(asked, ROOM, heard)
    assert await replica.begin() == Begin(asked, ROOM)
    deltas = [
        TokenDelta(asked.generation_id, []),  # «I have it»
        TokenDelta(asked.generation_id, [1, 2], cached_tokens=2),
        last(asked.generation_id, 3),
    ]
    for delta in deltas:
        await replica.send(delta)
    await until(lambda: heard.finish_reason is not None)
    assert heard.deltas == deltas
    assert not link.working
    await replica.close()


async def test_one_frame_reaches_all_generations_of_a_step(links: ReplicaLinks) -> None:
    replica = await FakeReplica.connect(links.address)
    running = [begun(links, "replica") for _ in range(50)]
    for step in range(4):
        await replica.send(*(TokenDelta(number, [number, step]) for number, _ in running))
    await until(lambda: all(len(heard.deltas) == 4 for _, heard in running))
    for number, heard in running:
        assert heard.token_ids == [number, 0, number, 1, number, 2, number, 3]
    await replica.close()


@settings(max_examples=25, deadline=None)
@given(st.data())
async def test_frames_may_be_cut_anywhere(data: st.DataObject) -> None:
    async with ReplicaLinks(HOST, SECRET) as links:
        deltas = [TokenDelta(1, [token_id]) for token_id in range(9)] + [last(1, 9)]
        frames = [encode(StepFrame(ReplicaLoad(), [delta])) for delta in deltas]
        stream = b"".join(map(wire.pack, frames))
        cuts = sorted(data.draw(st.sets(st.integers(1, len(stream) - 1), max_size=12)))
        # Hypothesis may end an example where it draws: connect only after that.
        replica = await FakeReplica.connect(links.address)
        number, heard = begun(links, "replica")
        assert number == 1
        for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
            await replica.write(stream[start:end])
            await asyncio.sleep(0)  # so that the pieces are read one by one
        await until(lambda: heard.finish_reason is not None)
        assert heard.token_ids == list(range(10))
        await replica.close()


async def test_everything_may_come_byte_by_byte(links: ReplicaLinks) -> None:
    async def dribble(stream: bytes) -> None:
        for position in range(len(stream)):
            writer.write(stream[position : position + 1])
            await asyncio.sleep(0)

    reader, writer = await asyncio.open_connection(*links.address)
    replica = FakeReplica("replica", reader, writer)
    nonce_g, nonce_r = await reader.readexactly(wire.NONCE_BYTES), wire.new_nonce()
    await dribble(FakeReplica.opening(nonce_g, nonce_r, "replica", SECRET))
    await replica.check_proof(nonce_g, nonce_r)
    number, heard = begun(links, "replica")
    await dribble(wire.pack(encode(StepFrame(ReplicaLoad(), [last(number, 1, 2, 3)]))))
    await until(lambda: heard.deltas == [last(number, 1, 2, 3)])
    await replica.close()


class TestEnds:
    """How a generation ends, and that it is heard of no more."""

    async def test_stopping_tells_the_replica_and_late_deltas_find_nobody(
        self, links: ReplicaLinks
    ) -> None:
        replica = await FakeReplica.connect(links.address)
        link = links.find("replica")
        assert link is not None
        given_up, heard = begun(links, "replica")
        other, other_heard = begun(links, "replica")
        assert [(await replica.begin()).generation.generation_id for _ in "ab"] == [given_up, other]
        link.end(given_up)
        assert await replica.abort() == given_up
        await replica.send(TokenDelta(given_up, [99]), TokenDelta(other, [1]), refused=[given_up])
        await until(lambda: other_heard.token_ids == [1])
        assert (heard.deltas, heard.error, heard.refused) == ([], None, False)
        await replica.close()

    @pytest.mark.parametrize("how", ["finished", "failed", "refused"])
    async def test_what_the_replica_has_ended_is_not_stopped_and_not_heard_of_again(
        self, links: ReplicaLinks, how: str
    ) -> None:
        replica = await FakeReplica.connect(links.address)
        link = links.find("replica")
        assert link is not None
        number, heard = begun(links, "replica")
        await replica.begin()
        if how == "finished":
            await replica.send(last(number, 1))
            await until(lambda: heard.finish_reason is not None)
        elif how == "failed":
            await replica.send(failures=[GenerationFailure(number, "The engine failed.")])
            await until(lambda: heard.error is not None)
        else:
            await replica.send(refused=[number])
            await until(lambda: heard.refused)
        link.end(number)
        other, other_heard = begun(links, "replica")
        assert (await replica.begin()).generation.generation_id == other  # with no Abort before
        count = len(heard.deltas)
        await replica.send(
            TokenDelta(number, [99]),
            TokenDelta(other, [1]),
            failures=[GenerationFailure(number, "The engine failed again.")],
        )
        await until(lambda: other_heard.token_ids == [1])
        assert len(heard.deltas) == count
        await replica.close()

    async def test_tokens_are_heard_before_the_failure_or_refusal_in_their_frame(
        self, links: ReplicaLinks
    ) -> None:
        class Ordered(Heard):
            def fail(self, error: TeraError) -> None:
                assert self.token_ids == [1]
                super().fail(error)

            def refuse(self) -> None:
                assert self.token_ids == [1]
                super().refuse()

        replica = await FakeReplica.connect(links.address)
        link = links.find("replica")
        assert link is not None
        failed, refused = Ordered(), Ordered()
        for number, heard in ((1, failed), (2, refused)):
            link.begin(Generation(number, "request", [1], Sampling(max_tokens=9)), ROOM, heard)
        await replica.send(
            TokenDelta(1, [1]),
            TokenDelta(2, [1]),
            failures=[GenerationFailure(1, "The engine failed.")],
            refused=[2],
        )
        await until(lambda: failed.error is not None and refused.refused)
        await replica.close()

    @pytest.mark.parametrize(
        ("failure", "expected"),
        [
            pytest.param(
                GenerationFailure(1, "The engine failed."),
                EngineError("The engine failed."),
                id="the engine's fault",
            ),
            pytest.param(
                GenerationFailure(1, "Too long.", "context_length_exceeded", "prompt"),
                ContextLengthError("Too long.", param="prompt"),
                id="the request's fault",
            ),
            pytest.param(
                GenerationFailure(1, "Out of range.", "invalid_value", "top_p"),
                InvalidValueError("Out of range.", param="top_p"),
                id="a value's fault",
            ),
            pytest.param(
                GenerationFailure(1, "Odd.", "a code of a newer version"),
                InvalidRequestError("Odd."),
                id="a fault that is not known here",
            ),
        ],
    )
    async def test_a_failure_arrives_as_the_error_that_it_was(
        self, links: ReplicaLinks, failure: GenerationFailure, expected: TeraError
    ) -> None:
        replica = await FakeReplica.connect(links.address)
        number, heard = begun(links, "replica")
        assert number == failure.generation_id
        await replica.send(failures=[failure])
        await until(lambda: heard.error is not None)
        assert heard.error is not None
        assert type(heard.error) is type(expected)
        assert (heard.error.message, heard.error.param) == (expected.message, expected.param)
        await replica.close()

    async def test_a_request_that_no_order_holds_fails_alone(self, links: ReplicaLinks) -> None:
        replica = await FakeReplica.connect(links.address)
        number, heard = begun(links, "replica")
        link = links.find("replica")
        assert link is not None
        refused, huge = Heard(), "r" * wire.MAX_ORDER_BYTES
        link.begin(Generation(0, huge, [1], Sampling(max_tokens=9)), ROOM, refused)
        assert isinstance(refused.error, InvalidRequestError)
        await replica.begin()
        await replica.send(last(number, 1))
        await until(lambda: heard.token_ids == [1])
        await replica.close()

    async def test_each_attempt_has_an_id_of_its_own(self, links: ReplicaLinks) -> None:
        assert len({links.new_generation_id() for _ in range(1000)}) == 1000

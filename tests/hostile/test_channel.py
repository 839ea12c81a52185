"""Whoever reaches a gateway's token channel, or breaks into an engine's pod and so into its end."""

import asyncio
from collections.abc import AsyncGenerator

import pytest_asyncio
from tests.routing.conftest import HOST, SECRET, FakeReplica, Heard, until

from tera import wire
from tera.generation import (
    FinishReason,
    Generation,
    GenerationFailure,
    Sampling,
    TokenDelta,
)
from tera.routing.link import MOST_STRANGERS, ReplicaLinks


@pytest_asyncio.fixture
async def links() -> AsyncGenerator[ReplicaLinks]:
    async with ReplicaLinks(HOST, SECRET) as links:
        yield links


def begun(links: ReplicaLinks, replica_id: str) -> tuple[int, Heard]:
    """Send a replica a generation; return its id and what is heard of it."""
    link = links.find(replica_id)
    assert link is not None
    heard = Heard()
    asked = Generation(links.new_generation_id(), "request", [1], Sampling(max_tokens=9))
    link.begin(asked, 8, heard)
    return asked.generation_id, heard


async def test_strangers_are_few_and_keep_no_replica_out(links: ReplicaLinks) -> None:
    strangers = [await asyncio.open_connection(*links.address) for _ in range(MOST_STRANGERS + 20)]
    await until(lambda: len(links.all) == MOST_STRANGERS)
    for reader, writer in strangers[:20]:  # the oldest
        await FakeReplica("stranger", reader, writer).closed()
    replica = await FakeReplica.connect(links.address)
    number, heard = begun(links, "replica")
    for _ in range(MOST_STRANGERS + 20):
        strangers.append(await asyncio.open_connection(*links.address))
    await replica.send(TokenDelta(number, [1], FinishReason.STOP))
    await until(lambda: heard.token_ids == [1])
    await until(lambda: len(links.all) == MOST_STRANGERS + 1)
    for _, writer in strangers:
        writer.close()
    await replica.close()


async def test_a_stranger_is_read_no_further_than_a_name(links: ReplicaLinks) -> None:
    reader, writer = await asyncio.open_connection(*links.address)
    await reader.readexactly(wire.NONCE_BYTES)
    length = wire.MAX_NAME_BYTES
    writer.write(bytes(wire.NONCE_BYTES + wire.MAC_BYTES) + length.to_bytes(4, "little"))
    for _ in range(length - 1):  # one byte short of being judged
        writer.write(b"r")
        await writer.drain()
    (link,) = links.all
    expected = wire.NONCE_BYTES + wire.MAC_BYTES + wire.LENGTH_BYTES + length - 1
    await until(lambda: len(link._buffer) == expected)
    writer.write(b"r" * 1_000_000)
    await FakeReplica("stranger", reader, writer).closed()
    assert len(link._buffer) < 2 * 256 * 1024  # at most what one read brings


async def test_a_replica_reaches_no_generation_of_another(links: ReplicaLinks) -> None:
    victim = await FakeReplica.connect(links.address, "victim")
    hostile = await FakeReplica.connect(links.address, "hostile")
    running = [begun(links, "victim") for _ in range(20)]
    own, own_heard = begun(links, "hostile")
    guesses = range(1, 1000)
    await hostile.send(
        *(TokenDelta(it, [666]) for it in guesses if it != own),
        *(TokenDelta(it, [], FinishReason.STOP) for it in guesses if it != own),
        failures=[GenerationFailure(it, "Ended by a stranger.") for it in guesses if it != own],
        refused=[it for it in guesses if it != own],
    )
    await hostile.send(TokenDelta(own, [1]))
    await until(lambda: own_heard.token_ids == [1])
    await hostile.write(b"\xff" * 100)  # and its end is its own
    await hostile.closed()
    await until(lambda: own_heard.error is not None)
    assert all((it.deltas, it.error, it.refused) == ([], None, False) for _, it in running)
    for number, _ in running:
        await victim.send(TokenDelta(number, [number], FinishReason.STOP))
    await until(lambda: all(heard.token_ids == [number] for number, heard in running))
    await victim.close()


async def test_a_frame_over_the_bound_ends_its_own_link_alone(links: ReplicaLinks) -> None:
    victim = await FakeReplica.connect(links.address, "victim")
    hostile = await FakeReplica.connect(links.address, "hostile")
    number, heard = begun(links, "victim")
    _, lost = begun(links, "hostile")
    await hostile.write((wire.MAX_FRAME_BYTES + 1).to_bytes(4, "little"))
    await hostile.closed()
    await until(lambda: lost.error is not None)
    await victim.send(TokenDelta(number, [1], FinishReason.STOP))
    await until(lambda: heard.token_ids == [1])
    await victim.close()

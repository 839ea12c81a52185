"""Generations over links to fake replicas."""

from tests.routing.conftest import Heard

from tera.generation import FinishReason, Generation, Sampling, TokenDelta
from tera.routing.link import ReplicaLinks

ROOM = 8


def generation(links: ReplicaLinks) -> Generation:
    return Generation(links.new_generation_id(), "request", [1, 2, 3], Sampling(max_tokens=9))


def begun(links: ReplicaLinks, replica_id: str) -> tuple[int, Heard]:
    """Send a replica a generation; return its id and what is heard of it."""
    link = links.find(replica_id)
    assert link is not None
    asked, heard = generation(links), Heard()
    link.begin(asked, ROOM, heard)
    return asked.generation_id, heard


def last(generation_id: int, *token_ids: int) -> TokenDelta:
    return TokenDelta(generation_id, list(token_ids), FinishReason.STOP)

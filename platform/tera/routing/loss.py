"""What becomes of a generation whose replica was lost or failed: pure, so that it can be read."""

from dataclasses import dataclass, replace

from tera.errors import EngineError, ReplicaLostError

POISON_LOSSES, POISON_WINDOW_S = 2, 10.0
"""So many replicas lost so soon after they had taken a generation, and it is held to be the cause.

A request that makes an engine fail does so in its prefill or in the first steps. A long stream
whose replicas die minutes apart has only seen much, and is not the cause.
"""


@dataclass(frozen=True, slots=True)
class Losses:
    """What has gone wrong with one generation so far."""

    failures: int = 0
    """Replicas that had taken it and were lost or failed."""
    lost: int = 0
    """Those of them that were lost: their process or its connection is gone."""
    early: int = 0
    """Those of the lost that had taken it just before."""


@dataclass(frozen=True, slots=True)
class Retry:
    """Ask for a replica anew: none has begun, so nothing speaks against the generation."""


@dataclass(frozen=True, slots=True)
class Resume:
    """Go on at another replica, from the ids so far, without waiting for room."""

    losses: Losses
    paid: bool
    """Whether it counts against the model's retry budget."""


@dataclass(frozen=True, slots=True)
class GiveUp:
    """Tell the client; `reason` is for them to read."""

    reason: str
    poisonous: bool = False
    """Whether the request itself seems to make engines fail, which an operator should know."""


def after_loss(
    error: EngineError,
    taken_for_s: float | None,
    before: Losses,
    *,
    retries: int,
    affordable: bool,
) -> Retry | Resume | GiveUp:
    """Decide what a generation does next.

    Args:
        error: how the replica ended it; `ReplicaLostError` if the replica itself is gone.
        taken_for_s: seconds since the replica had taken it; None if it never said so.
        before: what had gone wrong before that.
        retries: how many failures a generation survives.
        affordable: whether the model's retry budget pays for one more.
    """
    if taken_for_s is None:
        return Retry()
    losses = replace(before, failures=before.failures + 1)
    first_loss = False
    if isinstance(error, ReplicaLostError):
        early = before.early + (taken_for_s <= POISON_WINDOW_S)
        losses = replace(losses, lost=before.lost + 1, early=early)
        first_loss = before.lost == 0
    if losses.early >= POISON_LOSSES:
        reason = "This request itself seems to make the model's engines fail."
        return GiveUp(reason, poisonous=True)
    if losses.failures > retries:
        return GiveUp("The model's engines failed repeatedly on this request.")
    # One death takes along whatever runs on the replica, and that all of it may move is what
    # migration is for; the dead replica fails nothing more. So the first loss is free.
    if not first_loss and not affordable:
        return GiveUp("The model's engines fail too often to try this request again.")
    return Resume(losses, paid=not first_loss)

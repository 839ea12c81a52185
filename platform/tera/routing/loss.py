"""Decides what to do with a generation whose replica was lost or failed: pure, easy to read."""

from dataclasses import dataclass, replace

from tera.errors import EngineError, ReplicaLostError

POISON_LOSSES, POISON_WINDOW_S = 2, 10.0
"""If so many replicas are lost so soon after accepting a generation, it is held to be the cause.

A request that makes engines fail does so in its prefill or first steps. A long stream whose
replicas die minutes apart is not the cause.
"""


@dataclass(frozen=True, slots=True)
class Losses:
    """What has gone wrong with one generation so far."""

    failures: int = 0
    """Replicas that had accepted it and were lost or failed."""
    lost: int = 0
    """Replicas of these that were lost: their process or connection is gone."""
    early: int = 0
    """Replicas of the lost ones that had accepted it just before."""


@dataclass(frozen=True, slots=True)
class Retry:
    """Ask for another replica: none had started it, so it is not suspected of anything."""


@dataclass(frozen=True, slots=True)
class Resume:
    """Continue on another replica, from the ids so far, without waiting for room."""

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

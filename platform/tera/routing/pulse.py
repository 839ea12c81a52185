"""Judges from a replica's frames whether it is alive, for failures that close no connection."""

from tera import wire
from tera.generation import ReplicaLoad, StepFrame


class Pulse:
    """One connection's signs of life; callers pass the time, in monotonic seconds.

    The first frame shows whether the replica sends heartbeats. One that does not, an older version
    that drains while this gateway is new, is not judged by them.
    """

    def __init__(self, stall_s: float) -> None:
        """`stall_s` is how long an engine with work may go without a step."""
        self._stall_s = stall_s
        self._beats = False
        self._heard_at = 0.0
        self._stepped_at = 0.0
        self._kv_usage_ratio = 0.0

    def heard(self, now: float) -> None:
        """Record that bytes have arrived: the replica's event loop runs."""
        self._heard_at = now

    def read(self, frame: StepFrame, now: float) -> None:
        """Record whether a frame shows that the engine has made a step, or cannot make one."""
        if not self._beats and not frame.deltas:
            self._beats = True
            self._stepped_at = now
        if self._shows_a_step(frame) or _is_idle(frame.load):
            self._stepped_at = now
        self._kv_usage_ratio = frame.load.kv_usage_ratio

    def excuse(self, away_s: float) -> None:
        """Extend both limits by the time in which this process itself could not listen."""
        self._heard_at += away_s
        self._stepped_at += away_s

    def is_silent(self, now: float) -> bool:
        """Return whether the replica is frozen or out of reach."""
        return self._beats and now - self._heard_at > wire.SILENCE_S

    def is_stalled(self, now: float) -> bool:
        """Return whether the replica is alive but its engine has work and makes no step."""
        return self._beats and now - self._stepped_at > self._stall_s

    def _shows_a_step(self, frame: StepFrame) -> bool:
        # Empty deltas do not count: they are sent before the engine sees the generation. Without
        # tokens for this gateway, a change of KV cache use shows prefill or other gateways' tokens.
        changed = frame.load.kv_usage_ratio != self._kv_usage_ratio
        return changed or any(
            delta.token_ids or delta.finish_reason is not None for delta in frame.deltas
        )


def _is_idle(load: ReplicaLoad) -> bool:
    return load.asleep or (load.running == 0 and load.waiting == 0)

"""Times one completion's deliveries of tokens, for metrics and the ledger."""

import time
from typing import Final

from tera.gateway.exchange import Exchange
from tera.generation import TokenDelta
from tera.observability import Metrics

GAPS_AT_ONCE: Final = 32
"""Gaps between deliveries that a histogram is given in one go.

For one by itself it takes 3 µs, a third of all that a token costs the gateway, since its code and
its buckets have left the processor's caches by the next one.
"""


class Stopwatch:
    """Runs from a request's arrival to the last tokens of one of its completions."""

    def __init__(
        self, metrics: Metrics, model: str, exchange: Exchange, *, first_sample: bool
    ) -> None:
        """`first_sample` is the one of its prompt that tells how much of that was cached."""
        self._first_token_s = metrics.first_token_s.labels(model)
        self._between_tokens_s = metrics.between_tokens_s.labels(model)
        self._exchange = exchange
        self._first_sample = first_sample
        self._previous: float | None = None
        self._gaps_s: list[float] = []

    def delivered(self, delta: TokenDelta) -> None:
        """Take the time of a delivery."""
        now = time.monotonic()
        if self._previous is None:
            self._first(delta, now)
        else:
            self._gaps_s.append(now - self._previous)
            if len(self._gaps_s) == GAPS_AT_ONCE:
                self.tell()
        self._previous = now

    def tell(self) -> None:
        """Give the histogram what it has not been given yet; to be called at the end too."""
        observe = self._between_tokens_s.observe
        for gap_s in self._gaps_s:
            observe(gap_s)
        self._gaps_s.clear()

    def _first(self, delta: TokenDelta, now: float) -> None:
        exchange = self._exchange
        waited_s = now - exchange.arrived
        self._first_token_s.observe(waited_s)
        if exchange.first_token_s is None:
            exchange.first_token_s = waited_s
        if self._first_sample:
            exchange.cached_tokens += delta.cached_tokens

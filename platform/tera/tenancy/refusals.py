"""Repeats refusals that last a while, so that a flood of refused requests does not reach Redis."""

from dataclasses import dataclass, replace
from typing import Final

from msgspec import structs

from tera.tenancy.keys import ApiKey
from tera.tenancy.limits import Admission, Allowance, Scope

BLOCKED_S: Final = 1.0
"""How long a refusal by a limit of 0 is repeated without asking Redis."""
MAX_KNOWN: Final = 50_000
"""Pairs of key and model whose refusal is remembered, about 30 MB."""


@dataclass(frozen=True, slots=True)
class _Known:
    """Redis's refusal of a request, which applies to all others until the debt has drained."""

    scopes: list[Scope]
    admission: Admission
    at: float
    until: float

    def again(self, now: float) -> Admission:
        """Return what Redis would answer now."""
        passed_us = round(1e6 * (now - self.at))
        refusal = self.admission.refusal
        assert refusal is not None
        wait_us = None if refusal.wait_us is None else max(1, refusal.wait_us - passed_us)
        return Admission(
            _later(self.admission.requests, passed_us),
            _later(self.admission.tokens, passed_us),
            replace(refusal, wait_us=wait_us),
        )


class Refusals:
    """Remembers refusals that only time can end, by key and model.

    These are refusals by requests per minute, whose debt only drains, and by a limit of 0. Tokens
    and slots, in contrast, are freed when a request ends. Times are seconds of one clock.
    """

    def __init__(self, most_known: int = MAX_KNOWN) -> None:
        """Up to `most_known` are kept; one more clears all."""
        self._most_known = most_known
        self._known: dict[tuple[str, str | None], _Known] = {}

    def again(
        self, key: ApiKey, model: str | None, scopes: list[Scope], now: float
    ) -> Admission | None:
        """Return the refusal that Redis would give; None if it must be asked.

        A refusal applies only to the same scope objects: other objects mean other limits.
        """
        known = self._known.get((key.key_id, model))
        if known is None:
            return None
        if now < known.until and known.scopes is scopes:
            return known.again(now)
        del self._known[key.key_id, model]
        return None

    def remember(
        self,
        key: ApiKey,
        model: str | None,
        scopes: list[Scope],
        refused: Admission,
        asked_at: float,
    ) -> None:
        """Keep a refusal, if it lasts; `asked_at` is when Redis was asked, or earlier.

        With None for the model it applies to all of the key's requests, whatever they are for.
        """
        refusal = refused.refusal
        assert refusal is not None
        if refusal.limit == 0:
            lasts_s = BLOCKED_S
        elif refusal.kind == "requests" and refusal.wait_us is not None:
            lasts_s = refusal.wait_us / 1e6
        else:
            return
        if len(self._known) >= self._most_known:
            self._known.clear()
        until = asked_at + lasts_s
        self._known[key.key_id, model] = _Known(scopes, refused, asked_at, until)


def _later(allowance: Allowance | None, passed_us: int) -> Allowance | None:
    if allowance is None:
        return None
    return structs.replace(allowance, reset_us=max(0, allowance.reset_us - passed_us))

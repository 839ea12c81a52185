"""Injects the faults that the simulated engine's arguments ask for."""

import asyncio
import os
from collections.abc import Iterable

from tera.engine.simulated_args import Faults
from tera.engine.simulated_batch import Slot
from tera.engine.simulated_model import VOCABULARY

CRASH_STATUS = 86
"""Exit status of a process ended by `die_after_tokens`."""


class FaultInjection:
    """Applies an engine's faults to the generations that are affected."""

    def __init__(self, faults: Faults) -> None:
        self._faults = faults
        self._marker = faults.only_prompts_with.encode()
        self._any = faults != Faults(only_prompts_with=faults.only_prompts_with)

    @property
    def refuses(self) -> bool:
        """Whether affected generations are refused."""
        return self._faults.refuse

    def are_met_by(self, token_ids: list[int]) -> bool:
        """Return whether a prompt is affected by the faults."""
        if not self._any or not self._marker:
            return self._any
        return self._marker in b"".join(map(VOCABULARY.token_bytes, token_ids))

    def delay_s(self, running: Iterable[Slot]) -> float:
        """Return how many seconds longer a step with these generations takes."""
        slow_step_s = self._faults.slow_step_s
        return slow_step_s if slow_step_s and any(slot.meets_faults for slot in running) else 0.0

    async def strike(self, running: Iterable[Slot]) -> list[Slot]:
        """End the process or never return, if that is due; else return the generations to fail."""
        if not self._any:
            return []
        met = [slot for slot in running if slot.meets_faults]
        if any(_reached(slot, self._faults.die_after_tokens) for slot in met):
            os._exit(CRASH_STATUS)
        if any(_reached(slot, self._faults.stall_after_tokens) for slot in met):
            await asyncio.Event().wait()
        return [slot for slot in met if _reached(slot, self._faults.fail_after_tokens)]


def _reached(slot: Slot, after_tokens: int | None) -> bool:
    return after_tokens is not None and slot.generated >= after_tokens

"""What several tests ask of a snapshot."""

import asyncio
import time
from collections.abc import Callable

from tera.errors import InvalidApiKeyError
from tera.tenancy.snapshot import KeySnapshot

SOON_S = 5.0
NEVER_S = 3600.0
"""A re-read interval that a test does not live to see: only messages bring news."""


async def eventually(condition: Callable[[], bool], within_s: float = SOON_S) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        await asyncio.sleep(0.01)


def accepts(snapshot: KeySnapshot, key: str) -> bool:
    try:
        snapshot.authenticate(f"Bearer {key}")
    except InvalidApiKeyError:
        return False
    return True

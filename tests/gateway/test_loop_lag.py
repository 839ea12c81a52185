"""The lag of the event loop, as a gateway measures it."""

import asyncio
import time

from tests.routing.conftest import until

from tera.gateway.loop_lag import LoopLag

HELD_S = 0.2


async def test_what_holds_the_loop_is_seen_as_long_as_it_lasted() -> None:
    lags: list[float] = []
    async with LoopLag(lags.append, interval_s=0.01):
        await until(lambda: bool(lags))
        lags.clear()
        time.sleep(HELD_S)  # noqa: ASYNC251  what a request must not do
        await until(lambda: bool(lags))
    assert lags[0] >= HELD_S - 0.01


async def test_it_looks_no_more_after_its_block() -> None:
    lags: list[float] = []
    async with LoopLag(lags.append, interval_s=0.001):
        await until(lambda: bool(lags))
    seen = len(lags)
    await asyncio.sleep(0.01)
    assert len(lags) == seen
    assert min(lags) >= 0

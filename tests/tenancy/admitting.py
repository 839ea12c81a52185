"""A process that admits requests as it is told on its standard input, one JSON object a line."""

import asyncio
import json
import sys
from typing import Any

from tera.config.limits import Limits
from tera.tenancy.limits import Scope
from tera.tenancy.pipelined import PipelinedRedis
from tera.tenancy.redis import connect
from tera.tenancy.redis_limits import RedisLimiter
from tera.tenancy.silence import Patience

TASKS = 50
PATIENT = Patience(slices=1200, most_slices=1200)


async def admit_all(order: dict[str, Any]) -> int:
    """Admit the requests of an order from many tasks at once; return how many passed."""
    client = connect(order["url"], timeout_s=30)
    calls = PipelinedRedis(client.connection_pool, PATIENT)
    limiter = RedisLimiter(calls, now_us=order["now_us"])
    scopes = [Scope("tenant", Limits(**order["limits"]))]
    waiting = [f"{order['name']}-{number}" for number in range(order["requests"])]
    admitted = 0

    async def work() -> None:
        nonlocal admitted
        while waiting:
            answer = await limiter.admit("acme", waiting.pop(), scopes, order["tokens"], b"{}")
            admitted += answer.refusal is None

    try:
        await asyncio.gather(*(work() for _ in range(TASKS)))
    finally:
        await calls.aclose()
        await client.aclose()
    return admitted


def main() -> None:
    """Answer each order with the number of requests that passed."""
    for line in sys.stdin:
        print(asyncio.run(admit_all(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()

"""What exact limits cost: time and CPU of a request's two calls, and what one Redis bears."""

import asyncio
import itertools
import json
import re
import signal
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import psutil
from msgspec import structs
from redis.asyncio import Redis
from rich.table import Table

from benchmarks.systems import System, tera
from tera.config.limits import LARGEST_LIMIT, Limits, LimitsConfig, TenantLimits
from tera.local.redis_server import EmbeddedRedis
from tera.tenancy.admission import Admissions
from tera.tenancy.keys import ApiKey
from tera.tenancy.limits import Progress, Scope, scopes_of
from tera.tenancy.pipelined import PipelinedRedis
from tera.tenancy.redis import connect
from tera.tenancy.redis_limits import RedisLimiter
from tera.tenancy.usage import UsageRecord, encode_record

GOAL_ADMIT_MS, GOAL_ADMIT_CPU_MS, GOAL_REFUSED_CPU_MS = 0.3, 0.1, 0.5
TENANTS, REQUESTS_PER_TENANT_S = 10_000, 100
GOAL_AWAY_MS = 50
AWAY_REQUESTS_S = 100
TASKS = 32
TOKENS, USED_TOKENS = 1000, 600
FLOOD_CLIENTS = 16
FLOOD_VALUES = """
models:
  simulated:
    id: simulated
    engine: {kind: simulated}
gateway:
  replicas: {min: 1, max: 1}
  limits: {default: {requestsPerMinute: 0, tokensPerMinute: 1000000, concurrentRequests: 100}}
redis:
  embedded: true
"""

WIDE = LARGEST_LIMIT
LIMITS = TenantLimits(
    requests_per_minute=WIDE,
    tokens_per_minute=WIDE,
    concurrent_requests=WIDE,
    token_budget=WIDE * TOKENS,
)
KEY_LIMITS = Limits(requests_per_minute=WIDE)


def run(quick: bool) -> tuple[Table, dict[str, object]]:
    """Return the table and the figures behind it."""
    seconds = 3.0 if quick else 15.0
    figures = asyncio.run(_measure(500 if quick else 5000, seconds))
    with tera(FLOOD_VALUES) as platform:
        figures |= asyncio.run(_flood(platform, seconds))
    return _table(figures), dict(figures)


async def _measure(calls: int, seconds: float) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as directory:
        async with await EmbeddedRedis.start(Path(directory)) as server:
            client = connect(server.url, timeout_s=10)
            redis = PipelinedRedis(client.connection_pool)
            try:
                alone = await _alone(redis, calls)
                await client.flushall()
                whole = await _whole(client, calls)
                await client.flushall()
                tenants = await _memory(client, redis)
                await client.flushall()
                many = await _many(redis, server.pid, seconds)
                away = await _away(client, server.pid, seconds)
                return {**alone, **whole, **tenants, **many, **away}
            finally:
                await redis.aclose()
                await client.aclose()


async def _alone(redis: PipelinedRedis, calls: int) -> dict[str, float]:
    """Measure one request at a time: what is added to each, beside a bare round trip."""
    limiter = RedisLimiter(redis)
    scopes = scopes_of(LIMITS, KEY_LIMITS, "key_1", "llama-8b")
    blocked = [Scope("tenant", Limits(requests_per_minute=0))]
    record = _record("acme")

    async def admit(name: str) -> None:
        await limiter.admit("acme", name, scopes, TOKENS, record)

    async def settle(name: str) -> None:
        await limiter.settle("acme", name, USED_TOKENS, record)

    async def refuse(name: str) -> None:
        answer = await limiter.admit("acme", name, blocked, TOKENS, record)
        assert answer.refusal is not None
        answer.refusal.error()

    async def ping(_: str) -> Any:
        return await redis.call("PING")

    figures: dict[str, float] = {}
    work: dict[str, Callable[[str], Awaitable[Any]]] = {
        "ping": ping,
        "admit": admit,
        "settle": settle,
        "refuse": refuse,
    }
    for what, call in work.items():
        await call("warm")
        latencies_ms = []
        cpu_s = time.process_time()
        for number in range(calls):
            began = time.perf_counter()
            await call(f"req_{number:032x}")
            latencies_ms.append(1000 * (time.perf_counter() - began))
        figures[f"{what}_cpu_ms"] = 1000 * (time.process_time() - cpu_s) / calls
        latencies_ms.sort()
        figures[f"{what}_p50_ms"] = latencies_ms[calls // 2]
        figures[f"{what}_p99_ms"] = latencies_ms[calls * 99 // 100]
    return figures


async def _whole(client: Redis, calls: int) -> dict[str, float]:
    """Measure all that a request costs this process, settling included, alone and among others."""
    figures: dict[str, float] = {}
    async with _admissions(client) as admissions:
        numbers = itertools.count()

        async def settled() -> None:
            while admissions.unsettled:  # noqa: ASYNC110  it tells nobody
                await asyncio.sleep(0.001)

        async def one_after_another(count: int) -> None:
            for _ in range(count):
                await _pass(admissions, f"req_{next(numbers):032x}")

        await one_after_another(200)  # warm
        for what, tasks in (("alone", 1), ("among", TASKS)):
            await settled()
            cpu_s = time.process_time()
            await asyncio.gather(*(one_after_another(calls // tasks) for _ in range(tasks)))
            await settled()
            cpu_s = time.process_time() - cpu_s
            figures[f"whole_{what}_cpu_ms"] = 1000 * cpu_s / (calls // tasks * tasks)
    return figures


async def _memory(client: Redis, redis: PipelinedRedis) -> dict[str, float]:
    """Measure what a tenant costs Redis with one request open, and with none."""
    limiter = RedisLimiter(redis)
    scopes = scopes_of(LIMITS, KEY_LIMITS, "key_1", "llama-8b")

    async def used_bytes() -> float:
        memory: Any = await client.info("memory")
        return float(memory["used_memory"])

    async def keys_bytes(tenant: str, *names: str) -> float:
        keys = [f"tera:{{{tenant}}}:{name}" for name in names]
        return float(sum([await client.memory_usage(key) or 0 for key in keys]))

    tenants = TENANTS // 10
    empty_bytes = await used_bytes()
    for number in range(tenants):
        tenant = f"tenant-{number:05}"
        await limiter.admit(tenant, f"req_{number:032x}", scopes, TOKENS, _record(tenant))
    figures = {"tenant_open_bytes": (await used_bytes() - empty_bytes) / tenants}
    for number in range(tenants):
        tenant = f"tenant-{number:05}"
        await limiter.settle(tenant, f"req_{number:032x}", USED_TOKENS, _record(tenant))
    figures["tenant_limits_bytes"] = await keys_bytes("tenant-00001", "limits")
    figures["tenant_ledger_bytes"] = await keys_bytes("tenant-00001", "usage")
    return figures


async def _many(redis: PipelinedRedis, redis_pid: int, seconds: float) -> dict[str, float]:
    """Measure many tenants at once, as fast as this process can ask."""
    limiter = RedisLimiter(redis)
    scopes = scopes_of(LIMITS, KEY_LIMITS, "key_1", "llama-8b")
    numbers = itertools.count()
    latencies_ms: list[float] = []
    server = psutil.Process(redis_pid)
    ends = time.monotonic() + seconds

    async def one_after_another() -> None:
        while time.monotonic() < ends:
            number = next(numbers)
            # Neighbours are far apart, as requests of many tenants are.
            tenant = f"tenant-{number * 7919 % TENANTS:05}"
            request_id, record = f"req_{number:032x}", _record(tenant)
            began = time.perf_counter()
            await limiter.admit(tenant, request_id, scopes, TOKENS, record)
            latencies_ms.append(1000 * (time.perf_counter() - began))
            await limiter.settle(tenant, request_id, USED_TOKENS, record)

    cpu_before, began = server.cpu_times(), time.monotonic()
    await asyncio.gather(*(one_after_another() for _ in range(TASKS)))
    wall_s, cpu = time.monotonic() - began, server.cpu_times()
    redis_s = cpu.user + cpu.system - cpu_before.user - cpu_before.system
    requests = len(latencies_ms)
    latencies_ms.sort()
    return {
        "many_requests_per_s": requests / wall_s,
        "many_admit_p50_ms": latencies_ms[requests // 2],
        "many_admit_p99_ms": latencies_ms[requests * 99 // 100],
        "many_redis_cpu_ms": 1000 * redis_s / requests,
        "many_redis_requests_per_core_s": requests / redis_s,
        "many_redis_cores_for_all": TENANTS * REQUESTS_PER_TENANT_S * redis_s / requests,
    }


async def _away(client: Redis, redis_pid: int, seconds: float) -> dict[str, float]:
    """Freeze Redis under a steady stream of requests, and measure what each is held up by."""
    server = psutil.Process(redis_pid)
    latencies_ms: list[float] = []

    async with _admissions(client) as admissions:

        async def ask(number: int) -> None:
            latencies_ms.append(await _pass(admissions, f"req_away_{number}"))

        await ask(-1)
        latencies_ms.clear()
        server.send_signal(signal.SIGSTOP)
        try:
            tasks = []
            for number in range(int(seconds * AWAY_REQUESTS_S)):
                tasks.append(asyncio.create_task(ask(number)))
                await asyncio.sleep(1 / AWAY_REQUESTS_S)
            await asyncio.gather(*tasks)
        finally:
            server.send_signal(signal.SIGCONT)
        thawed = time.monotonic()
        while admissions.degraded:  # noqa: ASYNC110  it tells nobody
            await asyncio.sleep(0.01)
        back_s = time.monotonic() - thawed
    latencies_ms.sort()
    requests = len(latencies_ms)
    return {
        "away_p50_ms": latencies_ms[requests // 2],
        "away_p99_ms": latencies_ms[requests * 99 // 100],
        "away_back_s": back_s,
    }


async def _flood(platform: System, seconds: float) -> dict[str, float]:
    """Measure a gateway process that refuses all it is asked, by whole answers over HTTP."""
    body = json.dumps({"model": platform.model, "prompt": "Say something.", "max_tokens": 16})
    request = (
        "POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
        f"authorization: Bearer {platform.api_key}\r\ncontent-length: {len(body)}\r\n\r\n{body}"
    ).encode()

    async def ask_until(ends: float) -> int:
        refused = 0
        reader, writer = await asyncio.open_connection("127.0.0.1", platform.port)
        while time.monotonic() < ends:
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"(?i)content-length: (\d+)", head)
            assert head.startswith(b"HTTP/1.1 429"), head
            assert length is not None, head
            await reader.readexactly(int(length[1]))
            refused += 1
        writer.close()
        await writer.wait_closed()
        return refused

    await ask_until(time.monotonic() + 1.0)  # warm
    gateway = next(
        process
        for process in platform.process.children(recursive=True)
        if "ServeReplica:gateway" in " ".join(process.cmdline())
    )
    before, began = gateway.cpu_times(), time.monotonic()
    refused = sum(await asyncio.gather(*(ask_until(began + seconds) for _ in range(FLOOD_CLIENTS))))
    after, wall_s = gateway.cpu_times(), time.monotonic() - began
    cpu_s = after.user + after.system - before.user - before.system
    return {"flood_refused_per_s": refused / wall_s, "flood_cpu_ms": 1000 * cpu_s / refused}


def _admissions(client: Redis) -> Admissions:
    limits = LimitsConfig(default=LIMITS)
    return Admissions(client, _NothingStored(), lambda: limits, "one")


async def _pass(admissions: Admissions, request_id: str) -> float:
    """Have a request admitted and settled; return the milliseconds until it was admitted."""
    opening = structs.replace(_RECORD, request_id=request_id, status="lost")
    began = time.perf_counter()
    held = await admissions.admit(
        _KEY, opening, TOKENS, progress=lambda: Progress(0, 0), told=lambda _: None
    )
    waited_ms = 1000 * (time.perf_counter() - began)
    held.settle(structs.replace(opening, status="finished"))
    return waited_ms


class _NothingStored:
    def tenant_limits(self, name: str) -> TenantLimits | None:
        return None


_KEY = ApiKey("key_1", "acme", "", "", None, 0.0, limits=KEY_LIMITS)
_RECORD = UsageRecord(
    request_id="req_0123456789abcdef0123456789abcdef",
    tenant="acme",
    key_id="key_0123456789abcdef01234567",
    model="llama-8b",
    route="/v1/chat/completions",
    status="finished",
    started_s=1_800_000_000.123,
    prompt_tokens=400,
    completion_tokens=200,
    first_token_s=0.123,
    duration_s=2.345,
)


def _record(tenant: str) -> bytes:
    return encode_record(structs.replace(_RECORD, tenant=tenant))


def _table(found: dict[str, float]) -> Table:
    table = Table(
        "what",
        "p50",
        "p99",
        "CPU, gateway",
        "goal",
        title="limits: a tenant's four and a key's one, Redis on loopback with its log on disk",
        caption=f"{TASKS} tasks in one process; a tenant has {found['tenant_open_bytes']:.0f} B in "
        f"Redis with one request open, {found['tenant_limits_bytes']:.0f} B after it for a minute "
        f"and {found['tenant_ledger_bytes']:.0f} B of ledger",
    )
    goals = {
        "admit": f"p50 {_verdict(found['admit_p50_ms'], GOAL_ADMIT_MS)}, "
        f"CPU {_verdict(found['admit_cpu_ms'], GOAL_ADMIT_CPU_MS)}",
    }
    for what, name in (
        ("ping", "bare round trip"),
        ("admit", "admit"),
        ("settle", "settle (nobody waits)"),
        ("refuse", "refuse"),
    ):
        table.add_row(
            name,
            f"{found[f'{what}_p50_ms']:.2f} ms",
            f"{found[f'{what}_p99_ms']:.2f} ms",
            f"{found[f'{what}_cpu_ms']:.3f} ms",
            goals.get(what, ""),
        )
    for what, name in (("alone", "one at a time"), ("among", f"{TASKS} at once")):
        table.add_row(
            f"whole request, {name}", "", "", f"{found[f'whole_{what}_cpu_ms']:.3f} ms", ""
        )
    table.add_row(
        f"admit while Redis is frozen, {AWAY_REQUESTS_S} requests/s",
        f"{found['away_p50_ms']:.2f} ms",
        f"{found['away_p99_ms']:.2f} ms",
        "",
        f"p99 {_verdict(found['away_p99_ms'], GOAL_AWAY_MS)}; "
        f"back {found['away_back_s']:.1f} s after Redis",
    )
    table.add_row(
        f"whole 429 of a gateway process, {FLOOD_CLIENTS} clients: "
        f"{found['flood_refused_per_s']:.0f}/s",
        "",
        "",
        f"{found['flood_cpu_ms']:.3f} ms",
        f"CPU {_verdict(found['flood_cpu_ms'], GOAL_REFUSED_CPU_MS)}",
    )
    table.add_row(
        f"{TENANTS:,} tenants: {found['many_requests_per_s']:.0f} requests/s",
        f"{found['many_admit_p50_ms']:.2f} ms",
        f"{found['many_admit_p99_ms']:.2f} ms",
        "",
        f"Redis: {found['many_redis_cpu_ms']:.3f} ms each, "
        f"{found['many_redis_requests_per_core_s']:.0f} requests/s a core",
    )
    table.add_row(
        f"{TENANTS:,} tenants at {REQUESTS_PER_TENANT_S} requests/s",
        "",
        "",
        "",
        f"{found['many_redis_cores_for_all']:.0f} cores of Redis",
    )
    return table


def _verdict(found: float, goal: float) -> str:
    return f"≤ {goal:g} ms: {'met' if found <= goal else 'missed'}"

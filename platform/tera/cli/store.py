"""Connects commands to a platform's Redis."""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

from redis.asyncio import Redis

from tera.config.environment import Runtime
from tera.local.state import runtime_of
from tera.tenancy.key_store import KeyStore
from tera.tenancy.redis import connect
from tera.tenancy.tenants import TenantStore

T = TypeVar("T")

_TIMEOUT_S = 5.0


def with_keys(work: Callable[[KeyStore], Awaitable[T]]) -> T:
    """Run `work` on the API keys of the platform that `runtime_here` finds."""

    async def run() -> T:
        runtime = runtime_here()
        async with _connected(runtime) as redis:
            return await work(KeyStore(redis, runtime.key_pepper, time.time))

    return asyncio.run(run())


def with_tenants(work: Callable[[TenantStore], Awaitable[T]]) -> T:
    """Run `work` on the tenants of the platform that `runtime_here` finds."""
    return with_redis(lambda redis: work(TenantStore(redis)))


def with_redis(work: Callable[[Redis], Awaitable[T]]) -> T:
    """Run `work` on the Redis of the platform that `runtime_here` finds."""

    async def run() -> T:
        async with _connected(runtime_here()) as redis:
            return await work(redis)

    return asyncio.run(run())


def runtime_here() -> Runtime:
    """Return the platform that the environment names, or else the one running in this directory.

    Raises:
        ConfigError: the environment names none (it has no secrets), and none runs here.
    """
    runtime = Runtime.from_environment()
    return runtime if runtime.key_pepper else runtime_of(runtime.home)


@asynccontextmanager
async def _connected(runtime: Runtime) -> AsyncGenerator[Redis]:
    redis = connect(runtime.redis_url, timeout_s=_TIMEOUT_S)
    try:
        yield redis
    finally:
        await redis.aclose()

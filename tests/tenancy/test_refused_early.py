"""Refusals of requests of which nothing but the key is known: the same as later, at no cost."""

import pytest
from redis.asyncio import Redis
from tests.tenancy.conftest import RedisServer
from tests.tenancy.gateways import KEY, Gateway, counted, gateway, tenant
from tests.tenancy.waiting import until

from tera.config.limits import Limits, TenantLimits
from tera.errors import ConcurrencyLimitError, RateLimitError
from tera.tenancy.keys import ApiKey
from tera.tenancy.limits import Admission
from tera.tenancy.usage import UsageRecord


async def early(one: Gateway, key: ApiKey = KEY) -> tuple[RateLimitError, Admission] | None:
    """Return what a request is refused with before its model is known."""
    opening = UsageRecord("req_early", key.tenant, key.key_id, "", "/v1", "lost", 0.0)
    told: list[Admission] = []
    try:
        await one.admissions.refuse_early(key, opening, told=told.append)
    except RateLimitError as error:
        return error, told[0]
    assert told == []
    return None


async def later(one: Gateway, key: ApiKey = KEY) -> tuple[RateLimitError, Admission]:
    """Return what the same request is refused with once all is known of it."""
    with pytest.raises(RateLimitError) as refused:
        await one.admit(tokens=1, key=key)
    return refused.value, one.told[-1]


def words(refused: tuple[RateLimitError, Admission]) -> tuple[object, ...]:
    """Return what a client is told, but for times that pass between two requests."""
    error, admission = refused
    left = [(it.limit, it.remaining) for it in (admission.requests, admission.tokens) if it]
    return type(error), error.message.partition("Try again")[0], error.should_retry, left


BLOCKS = [
    {"requests_per_minute": 0, "tokens_per_minute": 50},
    {"tokens_per_minute": 0, "requests_per_minute": 7},
    {"concurrent_requests": 0},
    {"token_budget": 0},
]


@pytest.mark.parametrize("limits", BLOCKS, ids=str)
@pytest.mark.parametrize("whose", ["tenant", "key"])
async def test_l1_a_blocked_key_is_refused_early_as_it_would_be_later(
    redis_server: RedisServer, limits: dict[str, int], whose: str
) -> None:
    key, of_tenant = KEY, tenant(**limits)
    if whose == "key":
        key = ApiKey("key_2", "acme", "", "", None, 0.0, limits=Limits(**limits))  # type: ignore[arg-type]
        of_tenant = tenant(requests_per_minute=100)
    async with gateway(redis_server.url, default=of_tenant) as one:
        refused = await early(one, key)
        assert refused is not None
        assert words(refused) == words(await later(one, key))


async def test_l1_a_flood_of_a_blocked_key_asks_redis_once(
    redis_server: RedisServer, redis: Redis
) -> None:
    async with gateway(redis_server.url, default=tenant(requests_per_minute=0)) as one:
        before = await counted(redis)
        assert all([await early(one) for _ in range(20)])
        after = await counted(redis)
    # The first call of all is made twice: Redis does not know the script yet.
    assert after.get("evalsha", 0) - before.get("evalsha", 0) == 1


async def test_l2_over_its_requests_a_minute_a_key_is_refused_early_until_they_return(
    redis_server: RedisServer,
) -> None:
    async with gateway(redis_server.url, default=tenant(requests_per_minute=1)) as one:
        assert await early(one) is None
        await one.admit()
        assert await early(one) is None, "nobody knows yet that the next one is over it"
        over = await later(one)
        refused = await early(one)
        assert refused is not None
        assert words(refused) == words(over)
        assert refused[0].retry_after_s == pytest.approx(60, abs=2)


@pytest.mark.parametrize("whose", ["tenant", "key"])
async def test_l1_with_all_its_requests_running_here_a_key_is_refused_early(
    redis_server: RedisServer, whose: str
) -> None:
    key, of_tenant = KEY, tenant(concurrent_requests=2, requests_per_minute=10)
    if whose == "key":
        limits = Limits(concurrent_requests=2)
        key, of_tenant = ApiKey("key_2", "acme", "", "", None, 0.0, limits=limits), tenant()
    async with gateway(redis_server.url, default=of_tenant) as one:
        running = [await one.admit(key=key)]
        assert await early(one, key) is None
        running.append(await one.admit(key=key))
        refused = await early(one, key)
        assert refused is not None
        assert isinstance(refused[0], ConcurrencyLimitError)
        assert words(refused) == words(await later(one, key))
        one.finish(running.pop())
        assert await early(one, key) is None


async def test_l2_what_is_refused_early_spends_nothing(redis_server: RedisServer) -> None:
    limits = tenant(concurrent_requests=1, requests_per_minute=3)
    async with gateway(redis_server.url, default=limits) as one:
        held = await one.admit()
        assert all([await early(one) for _ in range(20)])
        one.finish(held)
        await until(lambda: not one.admissions.unsettled)
        one.finish(await one.admit())
        assert one.told[-1].requests is not None
        assert one.told[-1].requests.remaining == 1


async def test_l1_where_a_model_has_limits_of_its_own_a_key_is_not_refused_early(
    redis_server: RedisServer,
) -> None:
    blocked = TenantLimits(
        requests_per_minute=0, models={"n": Limits(requests_per_minute=5)}, tokens_per_minute=100
    )
    async with gateway(redis_server.url, default=blocked) as one:
        assert await early(one) is None, "it may be for the model that is not blocked"
        await later(one)
        assert await early(one) is None


async def test_l8_while_redis_is_away_a_blocked_key_is_refused_early_too(
    redis_server: RedisServer,
) -> None:
    async with gateway(redis_server.url, default=tenant(requests_per_minute=0)) as one:
        redis_server.stop()
        refused = await early(one)
        assert refused is not None
        assert not refused[0].should_retry

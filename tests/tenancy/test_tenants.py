# ruff: noqa: E501  a table reads best with a case a line
from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tera.config.limits import Limits, TenantLimits
from tera.errors import ConfigError, InternalError
from tera.tenancy.keys import TENANTS, VERSION
from tera.tenancy.tenants import BLOCKED, TenantNotFoundError, TenantStore, effective_limits

if TYPE_CHECKING:
    from redis.asyncio import Redis
    from tests.tenancy.conftest import RedisServer


@pytest.fixture
def tenants(redis: Redis) -> TenantStore:
    return TenantStore(redis)


def with_model(name: str, known: TenantLimits) -> TenantLimits:
    models = {**known.models, name: Limits(requests_per_minute=1)}
    return known.model_copy(update={"models": models})


class TestTenantStore:
    async def test_what_is_set_is_listed_by_name(self, tenants: TenantStore) -> None:
        beta = TenantLimits(requests_per_minute=0)
        acme = TenantLimits(token_budget=5, models={"llama-8b": Limits(concurrent_requests=1)})
        await tenants.set("beta", beta)
        await tenants.set("acme", acme)
        assert list((await tenants.list()).items()) == [("acme", acme), ("beta", beta)]
        assert await tenants.get("acme") == acme
        assert await tenants.get("gamma") is None

    async def test_redis_has_the_form_of_the_values_file(
        self, tenants: TenantStore, redis: Redis
    ) -> None:
        limits = TenantLimits(models={"llama-8b": Limits(tokens_per_minute=7)})
        await tenants.set("acme", limits)
        stored = await redis.hget(TENANTS, "acme")
        assert stored == b'{"models":{"llama-8b":{"tokensPerMinute":7}}}'

    async def test_every_change_raises_the_version(
        self, tenants: TenantStore, redis: Redis
    ) -> None:
        await tenants.set("acme", TenantLimits(requests_per_minute=1))
        await tenants.edit("acme", lambda known: known.model_copy())
        await tenants.remove("acme")
        assert await redis.get(VERSION) == b"3"
        assert await redis.keys("*") == [VERSION.encode()]

    async def test_editors_at_once_undo_nothing_of_each_other(self, tenants: TenantStore) -> None:
        await asyncio.gather(
            *(
                tenants.edit(
                    "acme",
                    partial(with_model, f"m{number}"),
                )
                for number in range(10)
            )
        )
        stored = await tenants.get("acme")
        assert stored is not None
        assert sorted(stored.models) == [f"m{number}" for number in range(10)]

    async def test_an_edit_begins_with_no_limits(self, tenants: TenantStore) -> None:
        seen = []

        def change(known: TenantLimits) -> TenantLimits:
            seen.append(known)
            return TenantLimits(requests_per_minute=1)

        assert await tenants.edit("acme", change) == TenantLimits(requests_per_minute=1)
        assert seen == [TenantLimits()]

    @pytest.mark.parametrize("name", ["", "Team", "a b", "a/b", "-a"])
    async def test_an_impossible_name_is_refused(self, tenants: TenantStore, name: str) -> None:
        with pytest.raises(ConfigError, match="tenant's name"):
            await tenants.set(name, TenantLimits())

    async def test_limits_that_readers_would_refuse_are_not_stored(
        self, tenants: TenantStore
    ) -> None:
        unchecked = TenantLimits().model_copy(update={"models": {"No Name": Limits()}})
        with pytest.raises(ConfigError, match=r"models\.No Name: "):
            await tenants.set("acme", unchecked)
        assert await tenants.list() == {}

    async def test_removing_what_is_not_there_is_a_clear_error(self, tenants: TenantStore) -> None:
        with pytest.raises(TenantNotFoundError, match="'acme'"):
            await tenants.remove("acme")

    async def test_a_damaged_record_is_told_and_can_be_removed(
        self, tenants: TenantStore, redis: Redis
    ) -> None:
        await redis.hset(TENANTS, "acme", "{")
        assert await tenants.list() == {"acme": BLOCKED}
        with pytest.raises(ConfigError, match="tenants remove"):
            await tenants.get("acme")
        with pytest.raises(ConfigError, match="tenants remove"):
            await tenants.edit("acme", lambda known: known)
        await tenants.remove("acme")
        assert await tenants.get("acme") is None

    async def test_redis_away_is_an_error_of_ours(
        self, tenants: TenantStore, redis_server: RedisServer
    ) -> None:
        redis_server.kill()
        with pytest.raises(InternalError):
            await tenants.list()
        with pytest.raises(InternalError):
            await tenants.set("acme", TenantLimits())


@pytest.mark.parametrize(
    ("stored", "from_values", "default", "expected"),
    [
        pytest.param(None, None, {}, {}, id="nothing"),
        pytest.param(None, None, {"requests_per_minute": 1}, {"requests_per_minute": 1}, id="default"),
        pytest.param(
            {"requests_per_minute": 1},
            {"requests_per_minute": 2, "tokens_per_minute": 2},
            {"requests_per_minute": 3, "tokens_per_minute": 3, "concurrent_requests": 3},
            {"requests_per_minute": 1, "tokens_per_minute": 2, "concurrent_requests": 3},
            id="limit by limit",
        ),
        pytest.param(
            {"requests_per_minute": 0}, None, {"requests_per_minute": 3}, {"requests_per_minute": 0},
            id="0 is said",
        ),
        pytest.param(
            {"requests_per_minute": 1}, {"weight": 3}, {"weight": 2},
            {"requests_per_minute": 1, "weight": 3},
            id="the weight likewise",
        ),
        pytest.param(
            {"token_budget": 9}, {"budget_period": "day"}, {"token_budget": 1},
            {"token_budget": 9, "budget_period": "day"},
            id="the period likewise",
        ),
        pytest.param(
            {"models": {"a": Limits(requests_per_minute=1)}},
            {"models": {"a": Limits(requests_per_minute=2, tokens_per_minute=2), "b": Limits(token_budget=2)}},
            {"models": {"c": Limits(concurrent_requests=3)}, "requests_per_minute": 3},
            {
                "requests_per_minute": 3,
                "models": {
                    "a": Limits(requests_per_minute=1, tokens_per_minute=2),
                    "b": Limits(token_budget=2),
                    "c": Limits(concurrent_requests=3),
                },
            },
            id="model by model",
        ),
        pytest.param(
            {"requests_per_minute": 1}, {"models": {"a": Limits(requests_per_minute=2)}}, {},
            {"requests_per_minute": 1, "models": {"a": Limits(requests_per_minute=2)}},
            id="a model's limit of the values stays beside the tenant's that is stored",
        ),
    ],
)  # fmt: skip
def test_a_limit_is_from_the_first_place_that_says_it(
    stored: dict[str, Any] | None,
    from_values: dict[str, Any] | None,
    default: dict[str, Any],
    expected: dict[str, Any],
) -> None:
    layers = [None if it is None else TenantLimits(**it) for it in (default, from_values, stored)]
    assert layers[0] is not None
    assert effective_limits(layers[0], layers[1], layers[2]) == TenantLimits(**expected)


some_limits = st.builds(
    Limits,
    requests_per_minute=st.none() | st.integers(0, 2),
    token_budget=st.none() | st.integers(0, 2),
    budget_period=st.sampled_from([None, "day", "month"]),
)
some_tenant_limits = st.builds(
    lambda limits, models: TenantLimits(**limits.model_dump(), models=models),
    some_limits,
    st.dictionaries(st.sampled_from(["a", "b"]), some_limits),
)


@settings(max_examples=50)
@given(some_tenant_limits, st.none() | some_tenant_limits, st.none() | some_tenant_limits)
def test_what_holds_is_always_one_of_what_was_said(
    default: TenantLimits, from_values: TenantLimits | None, stored: TenantLimits | None
) -> None:
    layers = [layer for layer in (stored, from_values, default) if layer is not None]
    found = effective_limits(default, from_values, stored)
    assert set(found.models) == {name for layer in layers for name in layer.models}
    for name in Limits.model_fields:
        said = [getattr(layer, name) for layer in layers if getattr(layer, name) is not None]
        assert getattr(found, name) == (said[0] if said else None)
    assert effective_limits(found, None, None) == found

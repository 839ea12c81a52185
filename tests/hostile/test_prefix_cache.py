"""What a tenant can find out of others' prompts from what they left in caches: nothing."""

from collections.abc import AsyncGenerator
from typing import Any

import pytest
import pytest_asyncio
from pydantic_core import from_json
from tests.gateway.conftest import MODEL, Client, Gateway

from tera.config.model import CacheSharing
from tera.routing.prefix_index import BLOCK_TOKENS
from tera.routing.switchboard import Route, Share, Switchboard
from tera.tenancy.keys import ApiKey

KEYS = {
    "acme": ApiKey("key_1", "acme", "", "", None, 0.0),
    "acme's other": ApiKey("key_2", "acme", "", "", None, 0.0),
    "beta": ApiKey("key_3", "beta", "", "", None, 0.0),
}
SECRET = "the people who are together over there " * 20
BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": SECRET},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": SECRET}]},
}


class Keys:
    """An `Authenticator` that knows `KEYS`."""

    def authenticate(self, authorization: str | None) -> ApiKey:
        return KEYS[str(authorization).removeprefix("Bearer ")]


@pytest_asyncio.fixture
async def gateway() -> AsyncGenerator[Gateway]:
    async with Gateway(keys=Keys()) as gateway:
        yield gateway


async def usage(
    gateway: Gateway, key: str, path: str = "/v1/completions", **fields: Any
) -> tuple[int, int]:
    """Ask for what follows the secret; return the cached tokens and the prompt's, as told."""
    client = Client({"model": MODEL, "max_tokens": 8, **BODIES[path], **fields})
    await gateway.request(client, "POST", path, key)
    assert client.status == 200, client.body
    told = from_json(client.body)["usage"]
    return told["prompt_tokens_details"]["cached_tokens"], told["prompt_tokens"]


async def finds(gateway: Gateway, key: str, path: str = "/v1/completions", **fields: Any) -> bool:
    """Return whether somebody finds the secret in the cache: all whole blocks of it, or none."""
    cached, prompt = await usage(gateway, key, path, **fields)
    assert cached == 0 or prompt - 16 <= cached < prompt
    return cached > 0


@pytest.mark.parametrize("path", BODIES)
async def test_b8_a_tenant_finds_nothing_of_what_another_one_has_sent(
    gateway: Gateway, path: str
) -> None:
    assert not await finds(gateway, "acme", path)
    assert not await finds(gateway, "beta", path)
    assert await finds(gateway, "acme", path)
    assert await finds(gateway, "acme's other", path)


@pytest.mark.parametrize(
    ("sharing", "found"),
    [
        pytest.param("tenant", {"acme", "acme's other"}, id="tenant"),
        pytest.param("key", {"acme"}, id="key"),
        pytest.param("model", {*KEYS}, id="model"),
    ],
)
async def test_b8_the_operator_says_who_shares_and_may_say_otherwise_at_any_time(
    gateway: Gateway, sharing: CacheSharing, found: set[str]
) -> None:
    """The catalog is replaced as an edit of the values does it, and the engine stays."""
    before: CacheSharing = "model" if sharing == "key" else "key"
    gateway.catalog.replace({"one": gateway.model("one", MODEL, cache_sharing=before)})
    for key in KEYS:
        await usage(gateway, key)
    gateway.catalog.replace({"one": gateway.model("one", MODEL, cache_sharing=sharing)})
    assert not await finds(gateway, "acme")
    for key in sorted(KEYS, reverse=True):  # last acme, whose it is: who asks leaves it as well
        assert await finds(gateway, key) == (key in found)


@pytest.mark.parametrize("path", BODIES)
async def test_b8_no_client_chooses_whose_cache_it_reads(gateway: Gateway, path: str) -> None:
    await usage(gateway, "acme", path, cache_salt="a salt that I know")
    (generation,) = gateway.fleet.dispatched
    for salt in ("a salt that I know", generation.cache_salt, "", None):
        extra = {"cache_salt": salt, "vllm_xargs": {"cache_salt": salt}, "user": "acme"}
        await usage(gateway, "beta", path, prompt_cache_key="acme", **extra)
    salts = {each.cache_salt for each in gateway.fleet.dispatched[1:]}
    assert len(salts) == 1
    assert generation.cache_salt not in salts


async def test_b8_what_goes_on_at_another_replica_keeps_its_salt() -> None:
    async with Gateway([3], keys=Keys()) as gateway:
        await usage(gateway, "acme", logit_bias={"256": -100})
        await usage(gateway, "acme")
        first, resumed, other = gateway.fleet.dispatched
    assert (first.resumed_tokens, resumed.resumed_tokens) == (0, 3)
    assert first.cache_salt == resumed.cache_salt == other.cache_salt != ""


def route(salt: str, block: int) -> Route:
    return Route(Share("tenant"), [block] * BLOCK_TOKENS, salt, 100)


def chosen(switchboard: Switchboard, salt: str) -> list[str]:
    """Return which replica each of many prompts goes to, one after the other."""
    found = []
    for block in range(100):
        replica_id = switchboard.take_now(route(salt, block))
        assert replica_id is not None
        switchboard.release(replica_id)
        found.append(replica_id)
    return found


def new_switchboard() -> Switchboard:
    switchboard = Switchboard()
    replicas = dict.fromkeys("abcdefgh", 8)
    switchboard.set_replicas(replicas)
    for replica_id in replicas:
        switchboard.connected(replica_id)
    return switchboard


def test_b8_where_one_tenants_prompts_have_gone_moves_none_of_another_tenants() -> None:
    alone = {salt: chosen(new_switchboard(), salt) for salt in ("acme's", "beta's")}
    switchboard = new_switchboard()
    # While others have some of the replicas, acme's prompts go elsewhere than they would.
    held = [switchboard.take_now(route("another's", block)) for block in range(40)]
    elsewhere = chosen(switchboard, "acme's")
    for replica_id in held:
        assert replica_id is not None
        switchboard.release(replica_id)
    assert chosen(switchboard, "acme's") == elsewhere != alone["acme's"]
    assert chosen(switchboard, "beta's") == alone["beta's"]

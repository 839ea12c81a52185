"""Tenants' limits: those set in Redis, and how they combine with those of the values.

`keys.py` describes the hash: tenants share the keys' version and channel, so `KeySnapshot` has
both.
"""

import logging
from collections.abc import Callable, Iterable
from typing import Any, Final

import msgspec
from redis.asyncio import Redis

from tera.config.limits import Limits, TenantLimits
from tera.errors import ConfigError, TeraError
from tera.tenancy.keys import CHANGED, TENANTS, VERSION, require_tenant
from tera.tenancy.redis import reaching

logger = logging.getLogger(__name__)

BLOCKED: Final = TenantLimits(requests_per_minute=0)
"""In force for a tenant whose record cannot be read."""

# ARGV[3]: the former record as it was read, or '' for none, so that two editors never undo each
# other's changes. A full Redis refuses a script's first write unless that write frees memory, so
# the script starts with HDEL: a tenant can be blocked even if it has filled Redis.
_SET_SCRIPT: Final = """
if (redis.call('HGET', KEYS[1], ARGV[1]) or '') ~= ARGV[3] then return 0 end
redis.call('HDEL', KEYS[1], ARGV[1])
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
redis.call('PUBLISH', ARGV[4], redis.call('INCR', KEYS[2]) .. ' tenant:' .. ARGV[1])
return 1
"""

_REMOVE_SCRIPT: Final = """
if redis.call('HDEL', KEYS[1], ARGV[1]) == 0 then return 0 end
redis.call('PUBLISH', ARGV[2], redis.call('INCR', KEYS[2]) .. ' tenant:' .. ARGV[1])
return 1
"""


class TenantNotFoundError(TeraError):
    """Nothing is stored for this tenant; the values may still give it limits."""

    status = 404
    type = "invalid_request_error"
    code = "tenant_not_found"


class TenantStore:
    """Sets and removes tenants' limits; gateway replicas follow within seconds.

    Every method raises InternalError when Redis cannot be reached.
    """

    def __init__(self, redis: Redis) -> None:
        """The caller closes `redis`."""
        self._redis = redis

    async def get(self, name: str) -> TenantLimits | None:
        """Return a tenant's stored limits; None if there are none.

        Raises:
            ConfigError: what is stored cannot be read.
        """
        return _readable(name, await self._stored(name))

    async def list(self) -> dict[str, TenantLimits]:
        """Return all stored limits, by tenant; an unreadable record is logged and `BLOCKED`."""
        async with reaching("The tenants' store"):
            stored: Any = await self._redis.hgetall(TENANTS)
        found = {
            name.decode(errors="replace"): decode_tenant(name, data) or BLOCKED
            for name, data in stored.items()
        }
        return dict(sorted(found.items()))

    async def set(self, name: str, limits: TenantLimits) -> None:
        """Store these limits in place of any others.

        Raises:
            ConfigError: the name or the limits are invalid.
        """
        require_tenant(name)
        data = _encode(limits)
        while not await self._replace(name, await self._stored(name), data):
            pass

    async def restore(self, name: str, limits: TenantLimits) -> bool:
        """Store limits of a backup unless some are stored; return whether there were none."""
        return await self._replace(name, b"", _encode(limits))

    async def edit(self, name: str, change: Callable[[TenantLimits], TenantLimits]) -> TenantLimits:
        """Apply `change` to the stored limits; return the result.

        `change` gets empty limits if none are stored. It runs again if somebody else has written
        meanwhile.

        Raises:
            ConfigError: the name or the limits are invalid, or what is stored cannot be read.
        """
        require_tenant(name)
        while True:
            stored = await self._stored(name)
            limits = change(_readable(name, stored) or TenantLimits())
            if await self._replace(name, stored, _encode(limits)):
                return limits

    async def remove(self, name: str) -> None:
        """Remove the stored limits; the values apply from now on.

        Raises:
            TenantNotFoundError: nothing is stored.
        """
        async with reaching("The tenants' store"):
            removed = await self._redis.eval(_REMOVE_SCRIPT, 2, TENANTS, VERSION, name, CHANGED)
        if not removed:
            raise TenantNotFoundError(f"No limits are stored of tenant {name!r}.")

    async def _stored(self, name: str) -> bytes:
        async with reaching("The tenants' store"):
            stored: Any = await self._redis.hget(TENANTS, name)
        return stored or b""

    async def _replace(self, name: str, stored: bytes, data: bytes) -> bool:
        async with reaching("The tenants' store"):
            done = await self._redis.eval(
                _SET_SCRIPT, 2, TENANTS, VERSION, name, data, stored, CHANGED
            )
        return bool(done)


def effective_limits(
    default: TenantLimits, from_values: TenantLimits | None, stored: TenantLimits | None
) -> TenantLimits:
    """Return a tenant's limits, each from the first source that gives it.

    The sources are what is stored, then `gateway.limits.tenants.<name>`, then
    `gateway.limits.default`; likewise for a model's limits, model by model and limit by limit.
    """
    layers = [layer for layer in (stored, from_values, default) if layer is not None]
    names = dict.fromkeys(name for layer in layers for name in layer.models)
    models = {
        name: Limits(**_first(layer.models[name] for layer in layers if name in layer.models))
        for name in names
    }
    weight = next((layer.weight for layer in layers if layer.weight is not None), None)
    return TenantLimits(**_first(layers), models=models, weight=weight)


def _first(layers: Iterable[Limits]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for layer in layers:
        for name in Limits.model_fields:
            if found.get(name) is None:
                found[name] = getattr(layer, name)
    return found


def decode_tenant(name: bytes, data: bytes) -> TenantLimits | None:
    """Return a tenant's limits from their record; None, with an error in the log, if damaged."""
    try:
        return TenantLimits.parse(msgspec.json.decode(data))
    except (msgspec.DecodeError, UnicodeDecodeError, ConfigError):
        logger.error("The record of tenant %r cannot be read; the tenant is blocked.", name)
        return None


def _readable(name: str, stored: bytes) -> TenantLimits | None:
    if not stored:
        return None
    limits = decode_tenant(name.encode(), stored)
    if limits is None:
        raise ConfigError(
            f"The record of tenant {name!r} cannot be read, so it is blocked; "
            "`tera tenants remove` removes it."
        )
    return limits


def _encode(limits: TenantLimits) -> bytes:
    values = limits.file_form(exclude_none=True)
    TenantLimits.parse(
        values
    )  # `model_copy` validates nothing, and what readers would refuse must not be stored
    return msgspec.json.encode(values)

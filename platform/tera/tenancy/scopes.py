"""The scopes that limit a key's requests for a model, cached until something changes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

from tera.config.limits import LimitsConfig, TenantLimits
from tera.tenancy.keys import ApiKey
from tera.tenancy.limits import Scope, scopes_of
from tera.tenancy.tenants import effective_limits

MAX_KNOWN: Final = 50_000
"""Pairs of key and model whose scopes are cached, about 30 MB."""


class Keyring(Protocol):
    """What admission asks of the key snapshot."""

    def tenant_limits(self, name: str) -> TenantLimits | None:
        """Return a tenant's stored limits; the same object until they change."""
        ...


@dataclass(frozen=True, slots=True)
class _Known:
    """The scopes of a key and a model, and what they were derived from."""

    config: LimitsConfig
    stored: TenantLimits | None
    key: ApiKey
    scopes: list[Scope]
    weight: int

    def made_of(self, config: LimitsConfig, stored: TenantLimits | None, key: ApiKey) -> bool:
        # Identity, not equality: comparing would cost as much as deriving them again.
        return self.config is config and self.stored is stored and self.key is key


class EffectiveScopes:
    """The scopes in force, by key and model."""

    def __init__(
        self, keyring: Keyring, config: Callable[[], LimitsConfig], most_known: int = MAX_KNOWN
    ) -> None:
        """Start with an empty cache.

        Args:
            keyring: knows what is stored about tenants.
            config: returns the limits in the values, called for each request.
            most_known: pairs of key and model that are cached; one more clears all.
        """
        self._keyring = keyring
        self._config = config
        self._most_known = most_known
        self._known: dict[tuple[str, str | None], _Known] = {}

    def of(self, key: ApiKey, model: str | None) -> list[Scope]:
        """Return the scopes of a key and model; the same list until something changes.

        Without a model they are those of all the key's requests, whatever they are for.
        """
        return self._current(key, model).scopes

    def weight(self, key: ApiKey, model: str) -> int:
        """Return the weight of the key's tenant in the queue for replicas."""
        return self._current(key, model).weight

    def most_tokens(self, key: ApiKey, model: str) -> int | None:
        """Return the most tokens that the limits can ever admit; None means no limit."""
        bounds = [
            scope.limits.tokens_per_minute
            for scope in self.of(key, model)
            if scope.limits.tokens_per_minute is not None
        ]
        return min(bounds, default=None)

    def _current(self, key: ApiKey, model: str | None) -> _Known:
        config = self._config()
        stored = self._keyring.tenant_limits(key.tenant)
        known = self._known.get((key.key_id, model))
        if known is not None and known.made_of(config, stored, key):
            return known
        tenant = effective_limits(config.default, config.tenants.get(key.tenant), stored)
        scopes = scopes_of(tenant, key.limits, key.key_id, model)
        if len(self._known) >= self._most_known:
            self._known.clear()
        known = _Known(config, stored, key, scopes, tenant.weight or 1)
        self._known[key.key_id, model] = known
        return known

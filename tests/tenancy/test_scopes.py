from __future__ import annotations

from dataclasses import dataclass, field, replace

from tera.config.limits import Limits, LimitsConfig, TenantLimits
from tera.tenancy.keys import ApiKey
from tera.tenancy.scopes import EffectiveScopes

KEY = ApiKey("key_1", "acme", "", "", None, 0.0, limits=Limits(concurrent_requests=1))


@dataclass
class Sources:
    """Where limits come from; the test changes them."""

    config: LimitsConfig = field(default_factory=LimitsConfig)
    stored: dict[str, TenantLimits] = field(default_factory=dict)

    def tenant_limits(self, name: str) -> TenantLimits | None:
        return self.stored.get(name)

    def scopes(self, most_known: int = 10) -> EffectiveScopes:
        return EffectiveScopes(self, lambda: self.config, most_known)


def test_scopes_are_one_list_until_what_they_were_made_of_changes() -> None:
    sources = Sources(LimitsConfig(default=TenantLimits(requests_per_minute=5)))
    scopes = sources.scopes()
    first = scopes.of(KEY, "m")
    assert [scope.name for scope in first] == ["tenant", "key:key_1"]
    assert scopes.of(KEY, "m") is first

    sources.stored["acme"] = TenantLimits(requests_per_minute=6)
    second = scopes.of(KEY, "m")
    assert second[0].limits.requests_per_minute == 6
    assert scopes.of(KEY, "m") is second

    sources.config = LimitsConfig()
    third = scopes.of(KEY, "m")
    assert third is not second
    assert third == second

    renewed = replace(KEY, limits=None)
    assert [scope.name for scope in scopes.of(renewed, "m")] == ["tenant"]


def test_models_and_keys_have_scopes_of_their_own() -> None:
    of_model = TenantLimits(models={"m": Limits(tokens_per_minute=7)}, tokens_per_minute=70)
    scopes = Sources(LimitsConfig(default=of_model)).scopes()
    assert scopes.most_tokens(KEY, "m") == 7
    assert scopes.most_tokens(KEY, "other") == 70
    assert [scope.name for scope in scopes.of(replace(KEY, key_id="key_2"), "m")] == [
        "model:m",
        "key:key_2",
    ]


def test_a_tenant_without_limits_may_send_any_number_of_tokens_and_has_one_share() -> None:
    scopes = Sources().scopes()
    assert scopes.most_tokens(KEY, "m") is None
    assert scopes.weight(KEY, "m") == 1


def test_a_tenants_weight_is_what_is_stored_or_in_the_values() -> None:
    sources = Sources(LimitsConfig(tenants={"acme": TenantLimits(weight=3)}))
    scopes = sources.scopes()
    assert scopes.weight(KEY, "m") == 3
    sources.stored["acme"] = TenantLimits(weight=4)
    assert scopes.weight(KEY, "m") == 4


def test_no_more_pairs_are_kept_than_told() -> None:
    scopes = Sources().scopes(most_known=2)
    first = scopes.of(KEY, "a")
    scopes.of(KEY, "b")
    assert scopes.of(KEY, "a") is first
    scopes.of(KEY, "c")
    assert scopes.of(KEY, "a") is not first

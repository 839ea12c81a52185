import re
from dataclasses import replace
from itertools import permutations

import pytest

from tera.config.model import CacheSharing
from tera.tenancy.cache_salt import cache_salt
from tera.tenancy.keys import ApiKey

SECRET = "the secret of this cluster"  # noqa: S105  of nobody else
KEY = ApiKey("key_1", "acme", "", "", None, 0.0)
OTHER_KEY = replace(KEY, key_id="key_2")
OTHER_TENANT = replace(KEY, key_id="key_3", tenant="beta")


def test_by_tenant_all_keys_of_a_tenant_have_one_salt_and_no_other_tenants() -> None:
    salt = cache_salt(SECRET, "tenant", KEY)
    assert cache_salt(SECRET, "tenant", OTHER_KEY) == salt
    assert cache_salt(SECRET, "tenant", OTHER_TENANT) != salt


def test_by_key_each_key_has_its_own_salt() -> None:
    salts = {cache_salt(SECRET, "key", each) for each in (KEY, OTHER_KEY, OTHER_TENANT)}
    assert len(salts) == 3


def test_by_model_there_is_none() -> None:
    assert {cache_salt(SECRET, "model", each) for each in (KEY, OTHER_TENANT)} == {""}


def test_a_tenant_that_is_called_like_a_key_does_not_get_the_keys_salt() -> None:
    named = replace(KEY, tenant=KEY.key_id)
    assert cache_salt(SECRET, "tenant", named) != cache_salt(SECRET, "key", KEY)


@pytest.mark.parametrize("sharing", ["tenant", "key"])
def test_a_salt_is_short_and_says_nothing_to_who_does_not_have_the_secret(
    sharing: CacheSharing,
) -> None:
    salts = [cache_salt(secret, sharing, KEY) for secret in (SECRET, f"{SECRET}.", "")]
    assert all(re.fullmatch("[0-9a-f]{32}", salt) for salt in salts)
    assert all(one != other for one, other in permutations(salts, 2))

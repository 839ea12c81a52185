"""Cache salts: what keeps callers' prompts apart in an engine's prefix cache."""

import hmac
from typing import Final

from tera.config.model import CacheSharing
from tera.tenancy.keys import ApiKey

_PURPOSE: Final = "cache salt of"
"""Keeps salts apart from what else is signed with the cluster secret; see `tera.wire`."""
_BYTES: Final = 16


def cache_salt(secret: str, sharing: CacheSharing, caller: ApiKey) -> str:
    """Return the salt of a caller's prompts; empty if all tenants of the model share the cache.

    Prompts with another salt do not find what these leave in the KV cache. It is an HMAC, so that
    nobody can guess the salt of another tenant, and engines and their logs do not learn the name.

    Args:
        secret: the cluster's; a new one makes everything that is cached unreachable.
        sharing: `cacheSharing` of the model.
        caller: the key that the prompt came with.
    """
    match sharing:
        case "model":
            return ""
        case "tenant":
            owner = f"tenant {caller.tenant}"
        case "key":
            owner = f"key {caller.key_id}"
    return hmac.digest(secret.encode(), f"{_PURPOSE} {owner}".encode(), "sha256")[:_BYTES].hex()

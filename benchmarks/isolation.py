"""What it costs in hits of the prefix cache to keep tenants, or keys, apart in it.

The load and the replicas are those of `benchmarks.routing`, with four keys to a tenant. All of a
system prompt is the same for all tenants, as where one product's agent serves many customers, or
the first third, or nothing. Salts, fingerprints and the choice of replicas are Tera's own.
"""

import random
import time
from statistics import median

import msgspec
from rich.table import Table

from benchmarks.routing import (
    CACHE_BLOCKS,
    PREFIX_TOKENS,
    TENANTS,
    Outcome,
    PrefixAffinity,
    Prompts,
    drawn_tenant,
    simulate,
)
from tera.config.model import CacheSharing
from tera.routing.prefix_index import fingerprints
from tera.tenancy.cache_salt import cache_salt
from tera.tenancy.keys import ApiKey

KEYS = 4
"""Of each tenant, all used alike."""
REPLICAS = 8
COMMON_TOKENS = (PREFIX_TOKENS, PREFIX_TOKENS // 3, 0)
"""Of a system prompt's beginning, the same for all tenants."""
SHARINGS: tuple[CacheSharing, ...] = ("model", "tenant", "key")
SECRET = "of these figures alone"  # noqa: S105  nobody's


def prompts_of_keys(sharing: CacheSharing, common_tokens: int) -> Prompts:
    """Return prompts whose beginning all tenants have in common, up to what is each one's own."""
    prefixes: dict[tuple[int, int], list[int]] = {}

    def prefix(rng: random.Random) -> list[int]:
        tenant, key = drawn_tenant(rng), rng.randrange(KEYS)
        found = prefixes.get((tenant, key))
        if found is None:
            own = [tenant + 1] * (PREFIX_TOKENS - common_tokens)
            salt = cache_salt(SECRET, sharing, caller(tenant, key))
            found = prefixes[tenant, key] = fingerprints([0] * common_tokens + own, salt)
        return found

    return prefix


def caller(tenant: int, key: int) -> ApiKey:
    """Return one of a tenant's keys."""
    return ApiKey(f"key_{tenant}_{key}", f"tenant-{tenant}", "", "", None, 0.0)


def timed_salt(rounds: int) -> float:
    """Return the µs that a request's salt takes."""
    taken = []
    for number in range(rounds):
        key = caller(number, 0)
        began = time.perf_counter()
        cache_salt(SECRET, "tenant", key)
        taken.append(time.perf_counter() - began)
    return 1e6 * median(taken)


def run(quick: bool) -> tuple[Table, dict[str, object]]:
    """Return the table and the figures behind it."""
    requests = 2_000 if quick else 10_000
    salt_us = timed_salt(10_000)
    figures: dict[str, object] = {"salt_us": salt_us}
    table = Table(
        "tokens in common",
        "cacheSharing",
        "hit ratio",
        "× model",
        "first token p50",
        "first token p99",
        title=f"isolation: {TENANTS} tenants × {KEYS} keys × {PREFIX_TOKENS:,}-token prefixes, "
        f"{REPLICAS} replicas",
        caption=f"a request's salt {salt_us:.1f} µs",
    )
    for common_tokens in COMMON_TOKENS:
        shared_by_all = 0.0
        for sharing in SHARINGS:
            policy = PrefixAffinity(REPLICAS, random.Random(5))  # noqa: S311  a simulation
            prompts = prompts_of_keys(sharing, common_tokens)
            outcome = simulate(policy, REPLICAS, requests, CACHE_BLOCKS, prompts)
            shared_by_all = shared_by_all or outcome.hit_ratio
            part = outcome.hit_ratio / shared_by_all
            figures[f"{sharing}, {common_tokens} tokens in common"] = msgspec.to_builtins(outcome)
            table.add_row(f"{common_tokens:,}", sharing, *_cells(outcome, part))
    return table, figures


def _cells(outcome: Outcome, part: float) -> tuple[str, ...]:
    return (
        f"{outcome.hit_ratio:.3f}",
        f"{part:.2f}",
        f"{outcome.first_token_p50_s:.2f} s",
        f"{outcome.first_token_p99_s:.2f} s",
    )

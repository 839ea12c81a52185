"""How much of what is cached a choice of replicas finds, and what a choice costs.

The load is that of llm-d's published benchmark: 150 customers, each with a system prompt of 6,000
tokens, ask questions of 1,200 tokens; the replicas' caches together hold 1.37 times the system
prompts at 8 replicas. Replicas are simulated, the choice is `tera.routing`'s own.
"""

import heapq
import random
import time
import tracemalloc
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median

from rich.table import Table

from tera.routing.choice import LoadBoard, choose
from tera.routing.prefix_index import BLOCK_TOKENS, PrefixIndex, fingerprints

TENANTS = 150
PREFIX_TOKENS, QUESTION_TOKENS, ANSWER_TOKENS = 6_000, 1_200, 200
ZIPF = 1.0
_WEIGHTS = [1 / (rank + 1) ** ZIPF for rank in range(TENANTS)]
CACHE_BLOCKS = round(1.37 * TENANTS * PREFIX_TOKENS / 8 / BLOCK_TOKENS)
CAPACITY = 64
PREFILL_TOKENS_PER_S, DECODE_STEP_S = 20_000.0, 0.02
REQUESTS_PER_S = 1.5
"""By replica: about 70 % of what one bears whose cache always hits."""
GATEWAYS = 2
"""Each knows of its own choices only, and of the load that replicas report."""
GOAL_HITS, GOAL_CHOICE_US = 0.9, 50.0
REPLICAS, BLOCKS = 1_000, 100_000
"""At which a choice is timed."""


@dataclass
class Replica:
    """A KV cache with least recently used eviction, and a queue behind one prefill at a time."""

    cached: OrderedDict[int, None] = field(default_factory=OrderedDict)
    ongoing: int = 0
    prefill_free_at: float = 0.0

    def hit(self, prints: Sequence[int], most: int) -> int:
        """Return how many blocks of a prompt are cached; now all are."""
        hits = 0
        for block in prints:
            if block not in self.cached:
                break
            hits += 1
        for block in reversed(prints):
            self.cached[block] = None
            self.cached.move_to_end(block)
        while len(self.cached) > most:
            self.cached.popitem(last=False)
        return hits

    def serve(self, now: float, missed_tokens: int) -> tuple[float, float]:
        """Return when the first token and the last come of a prompt that begins now."""
        prefill_from = max(now, self.prefill_free_at)
        first = prefill_from + missed_tokens / PREFILL_TOKENS_PER_S
        self.prefill_free_at = first
        return first, first + ANSWER_TOKENS * DECODE_STEP_S


Policy = Callable[[list[Replica], Sequence[int], random.Random], int]


def at_random(replicas: list[Replica], _: Sequence[int], rng: random.Random) -> int:
    """Return any replica."""
    return rng.randrange(len(replicas))


def least_loaded(replicas: list[Replica], _: Sequence[int], rng: random.Random) -> int:
    """Return the replica with the fewest requests, ties at random."""
    lowest = min(replica.ongoing for replica in replicas)
    return rng.choice([i for i, replica in enumerate(replicas) if replica.ongoing == lowest])


def two_choices(replicas: list[Replica], _: Sequence[int], rng: random.Random) -> int:
    """Return the less busy of two, as Ray Serve's own router does."""
    one, other = rng.randrange(len(replicas)), rng.randrange(len(replicas))
    return one if replicas[one].ongoing <= replicas[other].ongoing else other


class PrefixAffinity:
    """Tera's choice, by gateways that do not talk to each other."""

    def __init__(self, replicas: int, rng: random.Random) -> None:
        self._names = {f"replica-{number}": number for number in range(replicas)}
        self._gateways = [(LoadBoard(rng.random), PrefixIndex()) for _ in range(GATEWAYS)]

    def __call__(self, replicas: list[Replica], prints: Sequence[int], rng: random.Random) -> int:
        """Return what `choose` says at one of the gateways."""
        board, index = rng.choice(self._gateways)
        for name, number in self._names.items():
            board.put(name, replicas[number].ongoing, CAPACITY)
        chosen = choose(board, index, prints)
        if chosen is None:
            return least_loaded(replicas, prints, rng)
        index.add(prints, chosen)
        return self._names[chosen]


@dataclass(frozen=True)
class Outcome:
    """What a policy made of the load."""

    hit_ratio: float
    """Of all prompt tokens."""
    first_token_p50_s: float
    first_token_p99_s: float


Prompts = Callable[[random.Random], Sequence[int]]
"""Draws whose request is next; returns the fingerprints of its prompt up to the question."""


def prompts_of_tenants() -> Prompts:
    """Return prompts that begin with a system prompt of their tenant's."""
    tenants = [fingerprints([tenant] * PREFIX_TOKENS, "") for tenant in range(TENANTS)]
    return lambda rng: tenants[drawn_tenant(rng)]


def drawn_tenant(rng: random.Random) -> int:
    """Return one of the tenants, who ask as often as their rank lets them."""
    (tenant,) = rng.choices(range(TENANTS), _WEIGHTS)
    return tenant


def simulate(
    policy: Policy, replica_count: int, requests: int, cache_blocks: int, prompts: Prompts
) -> Outcome:
    """Return what a policy makes of a load whose seed is always the same."""
    rng = random.Random(7)  # noqa: S311  a simulation
    replicas = [Replica() for _ in range(replica_count)]
    ends: list[tuple[float, int]] = []
    now, hits, blocks = 0.0, 0, 0
    waits = []
    for number in range(requests):
        now += rng.expovariate(REQUESTS_PER_S * replica_count)
        while ends and ends[0][0] <= now:
            replicas[heapq.heappop(ends)[1]].ongoing -= 1
        prefix = prompts(rng)
        question = [hash((number, block)) for block in range(QUESTION_TOKENS // BLOCK_TOKENS)]
        prints = [*prefix, *question]
        chosen = policy(replicas, prints, rng)
        replica = replicas[chosen]
        hit = replica.hit(prints, cache_blocks)
        first, last = replica.serve(now, (len(prints) - hit) * BLOCK_TOKENS)
        replica.ongoing += 1
        heapq.heappush(ends, (last, chosen))
        if number >= requests // 5:  # the caches are warm
            hits, blocks = hits + hit, blocks + len(prints)
            waits.append(first - now)
    waits.sort()
    return Outcome(hits / blocks, waits[len(waits) // 2], waits[len(waits) * 99 // 100])


def timed_choice(rounds: int) -> tuple[float, float, float]:
    """Return the µs of a choice, of a prompt's fingerprints, and the MiB of the index."""
    rng = random.Random(3)  # noqa: S311  a simulation
    board = LoadBoard(rng.random)
    names = [f"replica-{number}" for number in range(REPLICAS)]
    for name in names:
        board.put(name, rng.randrange(8), CAPACITY)
    tracemalloc.start()
    index = PrefixIndex(BLOCKS)
    prompts = [[rng.randrange(50_000) for _ in range(PREFIX_TOKENS)] for _ in range(1_200)]
    printed = [fingerprints(prompt, "") for prompt in prompts]
    before, _ = tracemalloc.get_traced_memory()
    for prints in printed:
        index.add(prints, rng.choice(names))
    mib = (tracemalloc.get_traced_memory()[0] - before) / 2**20
    tracemalloc.stop()
    choices, prints_s = [], []
    for _ in range(rounds):
        number = rng.randrange(len(prompts))
        began = time.perf_counter()
        prints = fingerprints(prompts[number], "")
        printed_at = time.perf_counter()
        chosen = choose(board, index, prints)
        assert chosen is not None
        load = board.load(chosen)
        board.put(chosen, load + 1, CAPACITY)
        index.add(prints, chosen)
        choices.append(time.perf_counter() - printed_at)
        prints_s.append(printed_at - began)
        board.put(chosen, load, CAPACITY)
    return 1e6 * median(choices), 1e6 * median(prints_s), mib


def run(quick: bool) -> tuple[Table, dict[str, object]]:
    """Return the table and the figures behind it."""
    requests = 5_000 if quick else 40_000
    choice_us, prints_us, mib = timed_choice(500 if quick else 5_000)
    figures: dict[str, object] = {
        "choice_us": choice_us,
        "fingerprints_us": prints_us,
        "index_mib": mib,
    }
    met = "met" if choice_us <= GOAL_CHOICE_US else "missed"
    table = Table(
        "policy",
        "replicas",
        "hit ratio",
        "× oracle",
        "first token p50",
        "first token p99",
        title=f"routing: {TENANTS} tenants × {PREFIX_TOKENS:,}-token prefixes; "
        f"goal ≥ {GOAL_HITS} × the oracle",
        caption=f"a choice at {REPLICAS:,} replicas with {BLOCKS:,} blocks known: {choice_us:.0f} "
        f"µs (goal ≤ {GOAL_CHOICE_US:.0f}: {met}), a prompt's fingerprints {prints_us:.0f} µs, "
        f"the index {mib:.0f} MiB",
    )
    prompts = prompts_of_tenants()
    for count in (8, 64):
        rng = random.Random(5)  # noqa: S311  a simulation
        # All caches as one: nothing that is cached anywhere is ever missed.
        oracle = simulate(lambda *_: 0, 1, requests, CACHE_BLOCKS * count, prompts).hit_ratio
        table.add_row("one cache (the oracle)", str(count), f"{oracle:.3f}", "1.00", "", "")
        policies: dict[str, Policy] = {
            "prefix_affinity": PrefixAffinity(count, rng),
            "least_loaded": least_loaded,
            "two choices": two_choices,
            "random": at_random,
        }
        for name, policy in policies.items():
            outcome = simulate(policy, count, requests, CACHE_BLOCKS, prompts)
            share = outcome.hit_ratio / oracle
            figures[f"{name} at {count}"] = {"outcome": outcome, "share_of_oracle": share}
            table.add_row(
                name,
                str(count),
                f"{outcome.hit_ratio:.3f}",
                f"{share:.2f}",
                f"{outcome.first_token_p50_s:.2f} s",
                f"{outcome.first_token_p99_s:.2f} s",
            )
    return table, figures

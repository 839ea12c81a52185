"""A day of 100 models, 10,000 tenants and up to 1,000 replicas: scaled on the queue, and fixed.

A simulation in steps of one second. Each tenant uses a few models and has its own working hours;
arrivals are Poisson, with bursts. A replica serves up to `SLOTS` requests at a time, each for
an exponential time. The autoscaler is Serve's rule with Tera's default values: replicas wanted are
queued and running requests over the target, after a delay, within bounds.
"""

from dataclasses import dataclass

import numpy as np
from rich.table import Table

MODELS, TENANTS, MOST_REPLICAS = 100, 10_000, 1_000
DAY_S = 86_400
SLOTS, TARGET = 64, 16
SERVICE_S = 8.0
UPSCALE_DELAY_S, DOWNSCALE_DELAY_S, TO_ZERO_DELAY_S = 10, 300, 1800
COLD_START_S = 60
MEAN_REQUESTS_PER_S = 350.0
DECISION_S = 1

Rates = np.ndarray
"""Arrivals by second (rows) and model (columns)."""


@dataclass(frozen=True)
class Outcome:
    """What a day cost and how long requests waited."""

    replica_hours: float
    most_replicas: int
    wait_p50_s: float
    wait_p99_s: float
    waited_over_1_s: float
    """Part of the requests."""


def arrivals(seconds: int, rng: np.random.Generator) -> Rates:
    """Return a day of arrivals."""
    weights = 1 / np.arange(1, TENANTS + 1) ** 0.8
    weights /= weights.sum()
    zone = rng.choice([0, 6, 9, 12, 17], TENANTS)
    popularity = 1 / np.arange(1, MODELS + 1) ** 0.7
    popularity /= popularity.sum()
    models = rng.choice(MODELS, (TENANTS, 3), p=popularity)
    by_zone = np.zeros((24, MODELS))
    for column in range(3):
        np.add.at(by_zone, (zone, models[:, column]), weights / 3)
    hours = np.arange(seconds) / 3600
    rates = np.zeros((seconds, MODELS))
    for hour in np.flatnonzero(by_zone.any(axis=1)):
        day = 0.15 + 0.85 * np.clip(np.sin((hours - hour - 2) * np.pi / 12), 0, None) ** 2
        rates += day[:, None] * by_zone[hour][None, :]
    rates *= MEAN_REQUESTS_PER_S / rates.sum(axis=1).mean()
    # A burst: five times the load of one model, for ten minutes, twice a day each.
    for model in range(MODELS):
        for start in rng.integers(0, max(1, seconds - 600), 2):
            rates[start : start + 600, model] *= 5
    return rng.poisson(rates)


def simulate(counts: Rates, fixed: np.ndarray | None, rng: np.random.Generator) -> Outcome:
    """Return what a day comes to, with `fixed` replicas of each model or with scaled ones."""
    seconds = len(counts)
    ready = np.ones(MODELS) if fixed is None else fixed.astype(float)
    started = np.zeros((COLD_START_S, MODELS))
    up_since, down_since = np.zeros(MODELS), np.zeros(MODELS)
    queue, running = np.zeros(MODELS), np.zeros(MODELS)
    served = np.zeros((seconds + 1, MODELS))
    cost, most = 0.0, 0.0
    for second in range(seconds):
        if fixed is None:
            slot = second % COLD_START_S
            ready += started[slot]
            started[slot] = 0
            starting = started.sum(axis=0)
            wanted = np.ceil((queue + running) / TARGET)
            have = ready + starting
            up_since = np.where(wanted > have, up_since + DECISION_S, 0)
            down_since = np.where(wanted < have, down_since + DECISION_S, 0)
            # A model at zero is woken at once.
            up = (up_since >= UPSCALE_DELAY_S) | ((have == 0) & (wanted > 0))
            room = max(0.0, MOST_REPLICAS - have.sum())
            more = np.where(up, wanted - have, 0)
            if more.sum() > room:
                more = np.floor(more * room / more.sum())
            started[slot] += more
            delay = np.where(wanted == 0, TO_ZERO_DELAY_S, DOWNSCALE_DELAY_S)
            fewer = np.where(down_since >= delay, np.maximum(have - wanted, 0), 0)
            ready -= np.minimum(fewer, ready)
            most = max(most, have.sum())
            cost += ready.sum() + starting.sum() + more.sum()
        else:
            cost += ready.sum()
            most = ready.sum()
        done = rng.binomial(running.astype(int), 1 - np.exp(-1 / SERVICE_S))
        running -= done
        queue += counts[second]
        begin = np.minimum(queue, np.maximum(ready * SLOTS - running, 0))
        queue -= begin
        running += begin
        served[second + 1] = served[second] + begin
    return Outcome(float(cost) / 3600, int(most), *_waits(counts, served))


def _waits(counts: Rates, served: np.ndarray) -> tuple[float, float, float]:
    """Return the median, the 99th percentile and the part over 1 s of the waits, in s."""
    longest = 900
    histogram = np.zeros(longest + 1)
    arrived = np.cumsum(counts, axis=0)
    for model in range(counts.shape[1]):
        # First in, first out: the n-th that arrives is the n-th that begins.
        begins = np.searchsorted(served[1:, model], arrived[:, model], side="left")
        waits = np.clip(begins - np.arange(len(counts)), 0, longest)
        np.add.at(histogram, waits, counts[:, model])
    part = np.cumsum(histogram) / histogram.sum()
    median, high = (int(np.searchsorted(part, level)) for level in (0.5, 0.99))
    return float(median), float(high), float(1 - part[1])


def run(quick: bool) -> tuple[Table, dict[str, object]]:
    """Return the table and the figures behind it."""
    rng = np.random.default_rng(11)
    counts = arrivals(7_200 if quick else DAY_S, rng)
    mean = counts.mean(axis=0) * SERVICE_S / TARGET
    # What an operator who plans for the mean, or for the busiest five minutes, would set.
    window = counts[: len(counts) // 300 * 300].reshape(-1, 300, MODELS).mean(axis=1)
    peak = window.max(axis=0) * SERVICE_S / TARGET
    plans: dict[str, np.ndarray | None] = {
        "scaled on queue depth": None,
        "fixed at the mean": np.ceil(mean),
        "fixed at the peak": np.ceil(peak),
    }
    table = Table(
        "replicas",
        "replica hours",
        "most at once",
        "wait p50",
        "wait p99",
        "waited > 1 s",
        title=f"scaling: a day of {MODELS} models, {TENANTS:,} tenants, {counts.sum():,} requests",
        caption=f"{SERVICE_S:.0f} s a request, {TARGET} aimed at and {SLOTS} at the most per "
        f"replica, {COLD_START_S} s to start one",
    )
    figures: dict[str, object] = {"requests": int(counts.sum())}
    for name, fixed in plans.items():
        outcome = simulate(counts, fixed, np.random.default_rng(12))
        figures[name] = outcome
        table.add_row(
            name,
            f"{outcome.replica_hours:,.0f}",
            str(outcome.most_replicas),
            f"{outcome.wait_p50_s:.0f} s",
            f"{outcome.wait_p99_s:.0f} s",
            f"{100 * outcome.waited_over_1_s:.2f} %",
        )
    return table, figures

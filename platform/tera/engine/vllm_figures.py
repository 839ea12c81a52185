"""What vLLM reports about itself: the figures of its latest step, and its metrics."""

from collections.abc import Callable, Iterable
from typing import Any

from prometheus_client import REGISTRY, CollectorRegistry, Metric, generate_latest
from prometheus_client.registry import Collector


class StepFigures:
    """What vLLM reported after its latest step."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.running = 0
        self.kv_usage_ratio = 0.0
        self.progress_at = clock()

    def record(self, scheduler_stats: Any) -> None:
        """Record vLLM's `SchedulerStats` of a step; None if there are none."""
        self.progress_at = self._clock()
        if scheduler_stats is not None:
            self.running = scheduler_stats.num_running_reqs
            self.kv_usage_ratio = scheduler_stats.kv_cache_usage


def metrics_text() -> str:
    """Return vLLM's `vllm:` families in Prometheus text form."""
    # vLLM registers them in the process's default registry, one engine per process.
    registry = CollectorRegistry()
    registry.register(_VllmFamilies())
    return generate_latest(registry).decode()


class _VllmFamilies(Collector):
    def collect(self) -> Iterable[Metric]:
        return [family for family in REGISTRY.collect() if family.name.startswith("vllm:")]

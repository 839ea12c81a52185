"""A Serve without Ray: a controller and replicas that a test answers for."""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from ray.serve._private.common import DeploymentID, ReplicaID, ReplicaQueueLengthInfo
from ray.serve._private.replica_result import ReplicaResult
from ray.serve._private.router import RouterMetricsManager

from tera.upstream.ray_serve import ServedReplicas

ENGINES = DeploymentID("Engine", "model-demo")


class Ref:
    """A call to the controller that is not answered."""

    def _on_completed(self, callback: object) -> None:
        pass


@dataclass
class Controller:
    """Serve's controller as a router sees it: it keeps what it is told."""

    reports: list[bytes] = field(default_factory=list)

    @property
    def listen_for_change(self) -> SimpleNamespace:
        return SimpleNamespace(remote=lambda *_: Ref())

    @property
    def record_autoscaling_metrics_from_handle(self) -> SimpleNamespace:
        return SimpleNamespace(remote=self.reports.append)


class Answer(ReplicaResult):
    """What one call to a replica comes to."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error
        self.cancelled = False
        self.hangs = False
        self._callbacks: list[Callable[[object], None]] = []

    async def get_rejection_response(self) -> ReplicaQueueLengthInfo:
        return ReplicaQueueLengthInfo(accepted=True, num_ongoing_requests=1)

    async def get_async(self) -> None:
        try:
            if self.hangs:
                await asyncio.Event().wait()
            if self.error is not None:
                raise self.error
        finally:
            for callback in self._callbacks:
                callback(self.error)

    def add_done_callback(self, callback: Callable[[object], None]) -> None:
        self._callbacks.append(callback)

    def cancel(self) -> None:
        self.cancelled = True

    def get(self, timeout_s: float | None) -> None: ...
    def to_object_ref(self) -> Any: ...
    async def to_object_ref_async(self) -> Any: ...
    def to_object_ref_gen(self) -> Any: ...
    def __next__(self) -> Any: ...
    async def __anext__(self) -> Any: ...


class Replica:
    """A running replica as a router sees it."""

    is_cross_language = False
    actor_id = None

    def __init__(self, name: str, max_ongoing_requests: int = 8) -> None:
        self.replica_id = ReplicaID(name, ENGINES)
        self.max_ongoing_requests = max_ongoing_requests
        self.calls: list[tuple[str, list[object]]] = []
        self.answer = Answer(None)

    async def get_queue_len(self, *, deadline_s: float) -> int:
        return 0

    def try_send_request(self, request: Any, with_rejection: bool) -> Answer:
        self.calls.append((request.metadata.call_method, list(request.args)))
        return self.answer


@dataclass
class Served:
    """Replicas of a model, of which the installed router of Serve is told by the test."""

    replicas: ServedReplicas
    heard: list[Mapping[str, int]]
    controller: Controller

    def update(self, *replicas: Replica) -> None:
        """Tell the router which replicas run."""
        self.replicas._router.update_replicas(list(replicas))  # type: ignore[arg-type]

    @property
    def counts(self) -> RouterMetricsManager:
        return self.replicas._counts

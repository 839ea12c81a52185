"""Adapter: Ray Serve's handle, its router and its errors behind `ModelHandle`.

Serve has no way to give an application's only deployment a router of its own while HAProxy is in
front, so the handle is made with one here. What Serve's own does besides choosing stays with Serve:
sending, cancelling, and counting what waits, by which it scales.
"""

import asyncio
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any
from uuid import uuid4

from ray.exceptions import ActorDiedError, RayActorError, RayError, RayTaskError
from ray.serve._private import default_impl
from ray.serve._private.common import DeploymentHandleSource, DeploymentID, ReplicaID
from ray.serve._private.router import CurrentLoopRouter, RouterMetricsManager
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponse
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from tera.autoscaling.idle_first import GENERATIONS
from tera.errors import EngineError, ReplicaLostError, TeraError
from tera.generation import Generation
from tera.routing.channel import Inbox, TokenReceiver
from tera.routing.resume import resume
from tera.routing.switchboard import Route, Switchboard

log = logging.getLogger(__name__)

PROBE_INTERVAL_S = 1.0
PROBE_DEADLINE_S = 1.0

_route: ContextVar[Route] = ContextVar("route")
"""Of the call that is being made; Serve's task for it begins with a copy of the context."""


class ServeModelHandle:
    """Sends generations of one model through Serve to the replicas that a switchboard chooses."""

    def __init__(
        self, deployment: str, application: str, switchboard: Switchboard, receiver: TokenReceiver
    ) -> None:
        self._counts: RouterMetricsManager

        def create_router(
            handle_id: str, deployment_id: DeploymentID, handle_options: Any
        ) -> CurrentLoopRouter:
            router = default_impl.create_router(handle_id, deployment_id, handle_options)
            assert isinstance(router, CurrentLoopRouter), (
                "RAY_SERVE_THROUGHPUT_OPTIMIZED is not set"
            )
            chooser = SwitchboardRouter(deployment_id, switchboard, receiver)
            # Before Serve's first word on the deployment, with which it would make its own.
            router._asyncio_router._request_router = chooser
            router._asyncio_router._request_router_initialized.set()
            self._counts = router._asyncio_router._metrics_manager
            return router

        self.switchboard = switchboard
        self._receiver = receiver
        self._handle: DeploymentHandle[object] = DeploymentHandle(
            deployment,
            application,
            _create_router=create_router,
            _handle_id=f"{GENERATIONS}{uuid4().hex}",
        )
        self._generate = self._handle.generate  # makes the router

    async def resume(self, generation: Generation, inbox: Inbox, route: Route) -> bool:
        """Send a generation over the token channel; see `ModelHandle`."""
        return await resume(
            self.switchboard, self._receiver, generation, inbox, route, self._counted
        )

    async def generate(self, generation: bytes, route: Route) -> bytes:
        """Return the replica's answer; see `ModelHandle`."""
        _route.set(route)  # this coroutine is a task's of its own
        try:
            response = self._generate.remote(generation)
            assert isinstance(response, DeploymentResponse)
            try:
                answer: bytes = await response
            except asyncio.CancelledError:
                # Dropping the response would leave the engine generating.
                response.cancel()  # type: ignore[no-untyped-call]
                raise
        except Exception as error:
            raise translated(error) from error
        return answer

    @contextmanager
    def _counted(self, name: str) -> Iterator[None]:
        """Have a generation counted that Serve did not send: it scales by it as by its own."""
        replica_id = ReplicaID(name, self._handle.deployment_id)
        self._counts.inc_num_running_requests_for_replica(replica_id)
        try:
            yield
        finally:
            self._counts.dec_num_running_requests_for_replica(replica_id)


class SwitchboardRouter(RequestRouter):
    """Asks a switchboard where Serve's own router would ask replicas."""

    def __init__(
        self, deployment_id: DeploymentID, switchboard: Switchboard, receiver: TokenReceiver
    ) -> None:
        super().__init__(
            deployment_id,
            DeploymentHandleSource.REPLICA,
            use_replica_queue_len_cache=True,
            create_replica_wrapper_func=RunningReplica,
        )
        self._switchboard = switchboard
        self._receiver = receiver
        self._by_name: dict[str, RunningReplica] = {}
        self._probes: set[asyncio.Task[None]] = set()
        switchboard.on_suspect = self._probe_soon

    async def _choose_replica_for_request(
        self, pending_request: PendingRequest, *, is_retry: bool = False
    ) -> RunningReplica:
        route = _route.get()
        while True:
            name = await self._switchboard.take(route, again=is_retry)
            replica = self._by_name.get(name)
            if replica is not None:
                route.offered(name)
                return replica
            is_retry = True  # it left between the choice and now

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Return all replicas: no call of ours comes here."""
        return [candidate_replicas]

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Take note of the running replicas; a draining one is none of them."""
        super().update_replicas(replicas)
        by_name = {replica.replica_id.unique_id: replica for replica in replicas}
        for gone in self._by_name.keys() - by_name.keys():
            self._receiver.watch(gone, None)
        for name in by_name.keys() - self._by_name.keys():
            self._receiver.watch(name, self._switchboard)
        self._by_name = by_name
        self._switchboard.set_replicas(_capacities(by_name))

    def on_new_queue_len_info(self, replica_id: ReplicaID, num_ongoing_requests: int) -> None:
        """Take note of what a replica says when it accepts or refuses a call."""
        super().on_new_queue_len_info(replica_id, num_ongoing_requests)
        self._switchboard.counted(replica_id.unique_id, num_ongoing_requests)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """Take note that a call has ended, was refused or could not be made."""
        self._switchboard.release(replica_id.unique_id)

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        """Forget a replica whose process is gone."""
        super().on_replica_actor_died(replica_id)
        self._by_name.pop(replica_id.unique_id, None)
        self._receiver.watch(replica_id.unique_id, None)
        self._switchboard.drop(replica_id.unique_id)

    def on_replica_actor_unavailable(self, replica_id: ReplicaID) -> None:
        """Doubt a replica that a call did not reach."""
        super().on_replica_actor_unavailable(replica_id)
        self._switchboard.suspect(replica_id.unique_id)

    def _probe_soon(self, name: str) -> None:
        probe = asyncio.get_running_loop().create_task(self._probe(name))
        self._probes.add(probe)
        probe.add_done_callback(self._probes.discard)

    async def _probe(self, name: str) -> None:
        """Ask a replica that may be lost until it answers, or Serve has taken it away."""
        while (replica := self._by_name.get(name)) is not None:
            try:
                async with asyncio.timeout(PROBE_DEADLINE_S):
                    await replica.get_queue_len(deadline_s=PROBE_DEADLINE_S)
            except ActorDiedError:
                self.on_replica_actor_died(replica.replica_id)
                return
            except (TimeoutError, RayError) as error:
                log.debug("Replica %s does not answer: %r", name, error)
            else:
                self._switchboard.trust(name)
                return
            await asyncio.sleep(PROBE_INTERVAL_S)


def _capacities(replicas: Mapping[str, RunningReplica]) -> dict[str, int]:
    return {name: replica.max_ongoing_requests for name, replica in replicas.items()}


def translated(error: Exception) -> TeraError:
    """Return the error of ours that a Ray error stands for.

    With gRPC between replicas a dead one shows as `ActorUnavailableError`, without as
    `ActorDiedError`: both are `RayActorError`.
    """
    if isinstance(error, TeraError):
        return error
    if isinstance(error, RayTaskError):
        cause = error.cause
        if isinstance(cause, TeraError):
            return cause
        return EngineError("The engine replica failed.")
    if isinstance(error, RayActorError):
        return ReplicaLostError("The engine replica was lost.")
    if isinstance(error, RayError | RayServeException):
        return EngineError("The engine replica could not be reached.")
    return EngineError("The engine replica failed in an unknown way.")

"""What Tera uses of Ray Serve that is private there: its handles' router and counts, and a port.

Serve has no way to give an application's only deployment a router of its own while HAProxy is in
front, and none to count work that it does not carry. So a handle is made here with a router of
ours, from which three things are taken: which replicas run, a way to call one of them, and the
count of what waits. What runs is counted by each replica; see `ongoing`.

Each name is checked where it is used first, and `tests/upstream` holds it against the installed
Ray: see docs/upgrading-ray-and-vllm.md.
"""

import asyncio
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from ray import serve
from ray._common.tls_utils import add_port_to_grpc_server
from ray.exceptions import ActorDiedError, RayActorError, RayError, RayTaskError
from ray.serve._private import default_impl
from ray.serve._private import replica as serve_replica
from ray.serve._private.common import (
    RUNNING_REQUESTS_KEY,
    DeploymentHandleSource,
    DeploymentID,
    ReplicaID,
)
from ray.serve._private.router import CurrentLoopRouter, RouterMetricsManager
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponse
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from tera.errors import ConfigError, EngineError, ReplicaLostError, TeraError

log = logging.getLogger(__name__)

REFUSED_PAUSE_S = 0.05
"""Before a replica is asked again that had no room for a call; calls are rare and short."""
PEER_TIMEOUT_S = 2.0

UPGRADING = "see docs/upgrading-ray-and-vllm.md"

_target: ContextVar[str] = ContextVar("target")
"""The replica that the call being made is for; Serve's task for it begins with a copy of it."""


class ServedReplicas:
    """The replicas of one model's deployment that Serve runs, and its count of what waits for one.

    Replicas go by the unique part of their Serve id.
    """

    def __init__(
        self,
        deployment: str,
        application: str,
        changed: Callable[[Mapping[str, int]], None],
    ) -> None:
        """`changed` hears which replicas run, with how many generations each may run at a time.

        A replica that Serve takes away is none of them from the moment it is told to drain.
        """
        self._counts: RouterMetricsManager
        self._router: _Router

        def create_router(
            handle_id: str, deployment_id: DeploymentID, handle_options: Any
        ) -> CurrentLoopRouter:
            router = default_impl.create_router(handle_id, deployment_id, handle_options)
            if not isinstance(router, CurrentLoopRouter):
                raise ConfigError(f"RAY_SERVE_THROUGHPUT_OPTIMIZED is not set; {UPGRADING}")
            self._router = _Router(deployment_id, changed)
            # Before Serve's first word on the deployment, with which it would make its own.
            router._asyncio_router._request_router = self._router
            router._asyncio_router._request_router_initialized.set()
            self._counts = router._asyncio_router._metrics_manager
            return router

        self._handle: DeploymentHandle[object] = DeploymentHandle(
            deployment,
            application,
            _create_router=create_router,
        )
        self._connect = self._handle.connect  # makes the router

    async def connect(self, replica: str, host: str, port: int) -> None:
        """Have a replica connect to the token channel at an address; see `EngineReplica`.

        Raises:
            ReplicaLostError: the replica's process is gone, or Serve has taken it away.
            EngineError: it could not be reached, or could not connect.
        """
        _target.set(replica)  # nobody else's: this runs in a task of its own
        try:
            response = self._connect.remote(host, port)
            assert isinstance(response, DeploymentResponse)
            try:
                await response
            except asyncio.CancelledError:
                response.cancel()  # type: ignore[no-untyped-call]
                task = asyncio.current_task()
                if task is not None and task.cancelling():
                    raise
                # Nobody has cancelled us: a call that the replica's end cancels shows so, too.
                raise EngineError("The engine replica ended the call.") from None
        except Exception as error:
            raise translated(error) from error

    @contextmanager
    def queued(self) -> Iterator[None]:
        """Have one more generation counted as waiting while the block runs.

        With no replica at all Serve hears of it at once, not at the next report.
        """
        running = len(self._router.curr_replicas)
        with self._counts.wrap_queued_request(is_retry=False, num_curr_replicas=running):
            yield


class _Router(RequestRouter):
    """Sends each call to the replica that it names, where Serve's own would choose one."""

    def __init__(
        self, deployment_id: DeploymentID, changed: Callable[[Mapping[str, int]], None]
    ) -> None:
        super().__init__(
            deployment_id,
            DeploymentHandleSource.REPLICA,
            use_replica_queue_len_cache=True,
            create_replica_wrapper_func=RunningReplica,
        )
        self._changed = changed
        self._by_name: dict[str, RunningReplica] = {}

    async def _choose_replica_for_request(
        self, pending_request: PendingRequest, *, is_retry: bool = False
    ) -> RunningReplica:
        if is_retry:
            await asyncio.sleep(REFUSED_PAUSE_S)
        replica = self._by_name.get(_target.get())
        if replica is None:
            raise ReplicaLostError("The engine replica was taken away.")
        return replica

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
        self._by_name = {replica.replica_id.unique_id: replica for replica in replicas}
        self._tell()

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        """Forget a replica whose process is gone, before Serve's controller says so."""
        super().on_replica_actor_died(replica_id)
        self._by_name.pop(replica_id.unique_id, None)
        self._tell()

    def _tell(self) -> None:
        self._changed(
            {name: replica.max_ongoing_requests for name, replica in self._by_name.items()}
        )


def ongoing(count: int) -> dict[str, float]:
    """Return what a replica's `record_autoscaling_stats` tells Serve of the work that it runs.

    A replica of an application's only deployment reports how many calls of Serve run there, beside
    figures of its own. No call carries a generation, so that is 0, and the figure of the same name
    takes its place: Serve's autoscaling then counts generations, those of all gateways.
    """
    return {RUNNING_REQUESTS_KEY: count}


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
    if isinstance(error, ActorDiedError):
        return ReplicaLostError("The engine replica was lost.")
    if isinstance(error, RayActorError | RayError | RayServeException):
        return EngineError("The engine replica could not be reached.")
    return EngineError("The engine replica failed in an unknown way.")


async def ask_all(deployment: str, application: str, method: str) -> list[Any]:
    """Return what each replica of a deployment answers; who does not within 2 s is left out."""
    handle: Any = serve.get_deployment_handle(deployment, application)
    try:
        async with asyncio.timeout(PEER_TIMEOUT_S):
            # Not `results_async`: with one replica that does not answer, it has no answer at all.
            asked = await handle.broadcast(method)._fetch_replica_results_async()
    except (TimeoutError, RayError, RayServeException) as error:
        log.warning("The replicas of %s could not be asked: %r", application, error)
        return []
    answers = await asyncio.gather(
        *(asyncio.wait_for(each.get_async(), PEER_TIMEOUT_S) for each in asked),
        return_exceptions=True,
    )
    silent = [answer for answer in answers if isinstance(answer, BaseException)]
    if silent:
        log.warning("%d replicas of %s did not answer: %r", len(silent), application, silent[0])
    return [answer for answer in answers if not isinstance(answer, BaseException)]


def stay_on_loopback() -> None:
    """Make the gRPC server that Serve starts next in this replica listen on loopback only.

    The server unpickles whatever it receives, without authentication. It listens on all interfaces
    and Serve has no setting for that. On one machine only local processes need it; in a cluster,
    network policies protect it.
    """

    def add_port(server: Any, address: str) -> int:
        address = address.replace("[::]", "127.0.0.1")
        port: int = add_port_to_grpc_server(server, address)  # type: ignore[no-untyped-call]
        return port

    # Serve looks the name up when it starts the server.
    serve_replica.add_port_to_grpc_server = add_port  # type: ignore[attr-defined]  # an import there

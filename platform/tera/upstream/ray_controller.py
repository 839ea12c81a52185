"""What Tera uses of Ray Serve's controller that is private there: who goes in a scale-down.

Serve's scheduler takes the newest replicas of the emptiest nodes, whatever they do, and has no
setting for it. What each replica runs is known in the same process, Serve's controller: the
gateways' handles report it once a second, for autoscaling. Here one is led by the other.

Where Serve is not as expected its own choice stays, and that is logged once: the controller's loop
must not fail for it. `tests/upstream` says so before, for the installed Ray: see
docs/upgrading-ray-and-vllm.md.
"""

import logging
from collections.abc import Callable, Set
from functools import cache, wraps
from typing import Any
from weakref import WeakValueDictionary

from ray.serve._private.autoscaling_state import DeploymentAutoscalingState
from ray.serve._private.common import RUNNING_REQUESTS_KEY, DeploymentID, ReplicaID
from ray.serve._private.constants import SERVE_LOGGER_NAME
from ray.serve._private.deployment_scheduler import DeploymentScheduler
from ray.serve.config import AutoscalingContext

from tera.upstream.ray_serve import GENERATIONS

log = logging.getLogger(SERVE_LOGGER_NAME)  # whose lines are in the controller's file

BusyReplicas = Callable[[DeploymentID], Set[ReplicaID]]
Choice = Callable[
    [Callable[[int], set[ReplicaID]], int, Set[ReplicaID]],
    set[ReplicaID],
]
"""Which replicas to take, by another choice, how many, and who is busy; see `idle_first`."""


def watch(context: AutoscalingContext, choice: Choice) -> None:
    """Have a deployment's replicas taken by a choice, from now on, in this process."""
    try:
        total: Any = context._total_num_requests_value  # a method of the state that has the reports
        _watched(choice)[context.deployment_id] = total.__self__
    except Exception:  # noqa: BLE001  whatever it is, the controller's loop goes on
        _complain()


def busy_replicas(state: DeploymentAutoscalingState) -> set[ReplicaID]:
    """Return the replicas that had a generation when a gateway replica last counted."""
    counts: list[tuple[str, float]] = []
    for handle_id, columns in state._handle_store.columnar.items():
        if handle_id.startswith(GENERATIONS):
            counts += (
                (replica, columns.running.source(number).values[-1])
                for number, replica in enumerate(columns.running_keys)
            )
    for handle_id, report in state._handle_store.objects.items():
        if handle_id.startswith(GENERATIONS):
            running = report.metrics.get(RUNNING_REQUESTS_KEY, {})
            counts += ((replica, points[-1].value) for replica, points in running.items() if points)
    busy = {replica for replica, count in counts if count > 0}
    return {ReplicaID.from_full_id_str(replica) for replica in busy}


def choose_by(choice: Choice, scheduler: type[DeploymentScheduler], busy: BusyReplicas) -> None:
    """Let a scheduler take replicas by a choice; gangs, which go as one, stay as Serve says."""
    serves_own = scheduler._get_replicas_to_stop

    @wraps(serves_own)
    def replicas_to_stop(
        self: DeploymentScheduler,
        deployment_id: DeploymentID,
        max_num_to_stop: int,
        *gangs: Any,
        **named_gangs: Any,
    ) -> set[ReplicaID]:
        def taken(count: int) -> set[ReplicaID]:
            return serves_own(self, deployment_id, count, *gangs, **named_gangs)

        if any((*gangs, *named_gangs.values())):
            return taken(max_num_to_stop)
        try:
            return choice(taken, max_num_to_stop, busy(deployment_id))
        except Exception:  # noqa: BLE001  whatever it is, the controller's loop goes on
            _complain()
            return taken(max_num_to_stop)

    scheduler._get_replicas_to_stop = replicas_to_stop  # type: ignore[method-assign]


@cache
def _watched(choice: Choice) -> WeakValueDictionary[DeploymentID, DeploymentAutoscalingState]:
    """Return what is watched in this process, whose scheduler has heard of it by then."""
    states: WeakValueDictionary[DeploymentID, DeploymentAutoscalingState] = WeakValueDictionary()

    def busy(deployment_id: DeploymentID) -> set[ReplicaID]:
        state = states.get(deployment_id)
        return set() if state is None else busy_replicas(state)

    choose_by(choice, DeploymentScheduler, busy)
    return states


@cache
def _complain() -> None:
    log.warning("Scale-downs take busy replicas as well as idle ones.", exc_info=True)

"""What Tera uses of Ray Serve's controller that is private there: who goes in a scale-down.

Serve's scheduler takes the newest replicas of the emptiest nodes, whatever they do, and has no
setting for it. What each replica runs is known in the same process, Serve's controller: replicas
report it once a second, for autoscaling. Here one is led by the other.

Where Serve is not as expected its own choice stays, and that is logged once: the controller's loop
must not fail for it. `tests/upstream` says so before, for the installed Ray: see
docs/upgrading-ray-and-vllm.md.
"""

import logging
from collections.abc import Callable, Set
from functools import cache, wraps
from typing import Any

from ray.serve._private.common import RUNNING_REQUESTS_KEY, DeploymentID, ReplicaID
from ray.serve._private.constants import SERVE_LOGGER_NAME
from ray.serve._private.deployment_scheduler import DeploymentScheduler
from ray.serve.config import AutoscalingContext

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
        _contexts(choice)[context.deployment_id] = context
    except Exception:  # noqa: BLE001  whatever it is, the controller's loop goes on
        _complain()


def busy_replicas(context: AutoscalingContext) -> set[ReplicaID]:
    """Return the replicas that ran a generation when they last reported."""
    running = (context.raw_metrics or {}).get(RUNNING_REQUESTS_KEY, {})
    return {replica for replica, points in running.items() if points and points[-1].value > 0}


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
def _contexts(choice: Choice) -> dict[DeploymentID, AutoscalingContext]:
    """Return the latest context of each deployment, by which the scheduler chooses from now on.

    A policy is called ten times a second, and the scheduler acts just after it. Reports are read
    when some have to go, and not at each call: that takes 10 ms for 1,000 replicas. A deployment
    that is gone leaves its last context, and the replicas in it are none that another one has.
    """
    contexts: dict[DeploymentID, AutoscalingContext] = {}

    def busy(deployment_id: DeploymentID) -> set[ReplicaID]:
        context = contexts.get(deployment_id)
        return set() if context is None else busy_replicas(context)

    choose_by(choice, DeploymentScheduler, busy)
    return contexts


@cache
def _complain() -> None:
    log.warning("Scale-downs take busy replicas as well as idle ones.", exc_info=True)

"""Derives a model's status from Serve's status of its application."""

from collections.abc import Mapping

from tera.contract.common import ModelStatus


def model_status(
    application_status: str | None,
    replica_states: Mapping[str, int] | None,
    *,
    least_replicas: int,
) -> ModelStatus:
    """Return whether a model answers, and if not, whether it will.

    Args:
        application_status: Serve's, such as DEPLOY_FAILED; None while Serve knows no application.
        replica_states: how many engine replicas are in each of Serve's states, such as RUNNING;
            None while Serve knows no such deployment.
        least_replicas: the smallest number of replicas that the values allow.
    """
    states = replica_states or {}
    if states.get("RUNNING", 0):
        return "ready"  # requests are answered, whatever else fails
    if application_status == "DEPLOY_FAILED":
        return "failed"
    if replica_states is not None and least_replicas == 0 and not sum(states.values()):
        return "scaled_to_zero"
    return "starting"

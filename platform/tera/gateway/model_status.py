"""What a model's status is, by what Serve says of its application."""

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
        replica_states: how many engine replicas are in which of Serve's states, such as RUNNING;
            None while Serve knows no such deployment.
        least_replicas: how many the values keep at the least.
    """
    states = replica_states or {}
    if states.get("RUNNING", 0):
        return "ready"  # whatever else fails: requests are answered
    if application_status == "DEPLOY_FAILED":
        return "failed"
    if replica_states is not None and least_replicas == 0 and not sum(states.values()):
        return "scaled_to_zero"
    return "starting"

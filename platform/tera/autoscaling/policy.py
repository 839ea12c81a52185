"""The autoscaling policy that the Serve config names.

Serve pickles what this module defines by value, for its controller, and what is imported here by
reference: so it holds no state, and its parts are elsewhere.
"""

from typing import Any

from ray.serve.autoscaling_policy import replica_queue_length_autoscaling_policy
from ray.serve.config import AutoscalingContext

from tera.autoscaling.idle_first import idle_first
from tera.upstream.ray_controller import watch


def idle_replicas_first(context: AutoscalingContext) -> tuple[int | float, dict[str, Any]]:
    """Return how many replicas Serve's own policy wants; see `idle_first` for which ones go."""
    watch(context, idle_first)
    return replica_queue_length_autoscaling_policy(context)

"""Adapter: Ray Serve's handle and its errors behind `ModelHandle`."""

import asyncio

from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponse

from tera.errors import EngineError, ReplicaLostError, TeraError


class ServeModelHandle:
    """Sends generations through Serve's own router."""

    def __init__(self, handle: DeploymentHandle[object]) -> None:
        self._handle = handle.generate

    async def generate(self, generation: bytes) -> bytes:
        """Return the replica's answer; see `ModelHandle`."""
        try:
            response = self._handle.remote(generation)
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

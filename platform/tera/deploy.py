"""Composition root inside the cluster: what Ray Serve imports and calls to build applications.

`manifest.py` names these functions in the Serve config; their arguments are the part of the
platform whose change restarts the application, and nothing else.
"""

from dataclasses import dataclass
from typing import Any

import ray
from ray import serve
from ray.serve import Application

from tera.config.environment import Runtime
from tera.config.model import EngineConfig, GpuSharing, Parallelism, engine_args
from tera.config.names import ENGINE_DEPLOYMENT, GATEWAY_DEPLOYMENT
from tera.config.section import Section
from tera.config.source import ModelSource
from tera.engine.base import TextEngine
from tera.engine.deployment import EngineReplica
from tera.engine.simulated import SimulatedEngine
from tera.engine.turns import Sleeper, Turn, TurnTakingEngine
from tera.engine.vllm import VllmEngine
from tera.generation import ENGINE_STALL_S


class ModelArgs(Section):
    """The settings an engine is created from; editing any of them reloads this model."""

    source: str
    engine: EngineConfig
    parallelism: Parallelism
    gpu_sharing: GpuSharing


@dataclass(frozen=True)
class EngineStarter:
    """Starts a model's engine inside a replica."""

    args: ModelArgs

    async def __call__(self) -> TextEngine:
        """Return the loaded engine."""
        sharing = self.args.gpu_sharing
        if not sharing.is_shared:
            return await self._start()
        # Without a GPU, replicas that share one take turns as if this machine had one.
        gpu = "-".join(map(str, ray.get_gpu_ids())) or "none"
        turn = Turn(Runtime.from_environment().home / "gpus" / gpu)
        return await TurnTakingEngine.launch(self._start, turn, sharing.turn_seconds)

    async def _start(self) -> Sleeper:
        engine, parallelism = self.args.engine, self.args.parallelism
        if engine.kind == "simulated":
            return await SimulatedEngine.launch(engine.args, stall_s=ENGINE_STALL_S)
        source = ModelSource.parse(self.args.source)
        return await VllmEngine.launch(
            source.engine_path(Runtime.from_environment().home, engine.dtype),
            {**source.revision_args(), **engine_args(engine.args)},
            tensor_parallel=parallelism.tensor,
            pipeline_parallel=parallelism.pipeline,
            sleeps=self.args.gpu_sharing.is_shared,
            stall_s=ENGINE_STALL_S,
        )


def build_model(args: dict[str, Any]) -> Application:
    """Return the application of one model; `args` is a `ModelArgs` in its file form."""
    starter = EngineStarter(ModelArgs.parse(args))
    return serve.deployment(name=ENGINE_DEPLOYMENT)(EngineReplica).bind(starter)


def build_gateway(args: dict[str, Any]) -> Application:
    """Return the gateway's application; it takes no arguments, so that no edit restarts it."""
    # Here, since it takes half a second of CPU, which no replica of a model has to spend.
    from tera.gateway.deployment import GatewayReplica

    assert not args
    return serve.deployment(name=GATEWAY_DEPLOYMENT)(serve.ingress()(GatewayReplica)).bind()

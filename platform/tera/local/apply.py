"""`tera apply`: applies edited values to the platform that runs on this machine."""

import asyncio
from pathlib import Path
from urllib.parse import urlsplit

from tera.config.platform import PlatformConfig
from tera.errors import ConfigError
from tera.local.cluster import attached
from tera.local.serve import (
    Console,
    check_engines,
    check_memory,
    make_models,
    stage,
    until_up,
    vllm_replicas,
)
from tera.local.state import LocalSecrets, LocalState
from tera.manifest import serve_config
from tera.plan import Plan


def check_plan(plan: Plan) -> None:
    """Refuse a plan with edits that cannot be applied to a running platform.

    Raises:
        ConfigError: one line per value, each beginning with its path.
    """
    refused = [
        f"{path}: {change.note}"
        for change in plan.changes
        if change.effect == "not_taken"
        for path in change.paths
    ]
    if refused:
        raise ConfigError("\n".join(refused))


async def apply(new: PlatformConfig, home: Path, console: Console) -> None:
    """Apply `new` to the platform that runs in `home`, and return when all of it runs.

    Raises:
        ConfigError: none runs here, or `new` cannot run on one machine; nothing has changed.
        UnreachableError: the running platform does not answer; nothing has changed.
        StartError: there is too little memory, and nothing has changed; or an engine did not
            start.
    """
    state, local_secrets = LocalState.read(home), LocalSecrets.of(home)
    check_engines(new)
    check_memory(max(0, vllm_replicas(new) - vllm_replicas(state.platform)))
    await make_models(new, home, console)
    where = urlsplit(state.base_url)
    assert where.hostname is not None
    assert where.port is not None
    config = serve_config(new, host=where.hostname, port=where.port)
    with stage(console, "Engines and gateway"), attached(state, local_secrets) as client:
        from ray.serve.schema import ServeDeploySchema

        await asyncio.to_thread(client.deploy_apps, ServeDeploySchema.model_validate(config))
        # From here on these values are in force, whether or not all of it starts.
        state.model_copy(update={"platform": new}).write(home)
        await until_up(config, console)

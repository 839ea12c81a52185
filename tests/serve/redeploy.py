"""Hands other values to a running platform: `redeploy.py HOME VALUES PORT`, as its own process.

Ray takes its settings from the environment when it is imported.
"""

import sys
from pathlib import Path

from tera.config import load_platform, set_environment
from tera.local.state import LocalSecrets, LocalState
from tera.manifest import serve_config


def main(home: Path, values: Path, port: int) -> None:
    set_environment(LocalSecrets.of(home).ray_environment())
    import ray
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ServeDeploySchema

    ray.init(address=LocalState.read(home).ray_address, namespace="serve", log_to_driver=False)
    client = _get_global_client()
    assert client is not None
    config = serve_config(load_platform(values), port=port)
    client.deploy_apps(ServeDeploySchema.model_validate(config))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))

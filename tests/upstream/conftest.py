from collections.abc import Mapping
from types import SimpleNamespace

import pytest
import pytest_asyncio
import ray
from ray._private import auto_init_hook
from ray.serve import handle as handle_module
from ray.serve._private import default_impl, router
from ray.serve._private.common import DeploymentHandleSource
from ray.serve._private.handle_options import InitHandleOptions
from tests.upstream.fake_serve import ENGINES, Controller, Served

from tera.upstream.ray_serve import ServedReplicas


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have nothing here start a Ray, which Serve does where it finds none."""
    monkeypatch.setattr(auto_init_hook, "enable_auto_connect", False)
    assert not ray.is_initialized()


@pytest_asyncio.fixture
async def served(no_ray: None, monkeypatch: pytest.MonkeyPatch) -> Served:
    controller = Controller()
    client = SimpleNamespace(_controller=controller)
    monkeypatch.setattr("ray.serve.context._get_global_client", lambda: client)
    monkeypatch.setattr(default_impl, "get_current_actor_id", lambda: "gateway")
    monkeypatch.setattr(default_impl, "_get_node_id_and_az", lambda: ("node", None))
    monkeypatch.setattr(default_impl, "inside_ray_client_context", lambda: False)
    # As `RAY_SERVE_THROUGHPUT_OPTIMIZED`, which Serve reads when it is imported, has it.
    options = InitHandleOptions(
        _run_router_in_separate_loop=False, _source=DeploymentHandleSource.REPLICA
    )
    monkeypatch.setattr(handle_module, "create_init_handle_options", lambda: options)
    shared = SimpleNamespace(register=lambda _: None)
    monkeypatch.setattr(router.SharedRouterLongPollClient, "get_or_create", lambda *_: shared)
    heard: list[Mapping[str, int]] = []
    replicas = ServedReplicas(ENGINES.name, ENGINES.app_name, heard.append)
    return Served(replicas, heard, controller)

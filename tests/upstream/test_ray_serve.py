"""What Tera uses of Ray Serve's handles that is private there, in the installed Ray.

Red after an upgrade of Ray: see docs/upgrading-ray-and-vllm.md. No Ray runs here.
"""

import asyncio
import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import grpc
import psutil
import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError, TaskCancelledError
from ray.serve._private import default_impl
from ray.serve._private import replica as replica_module
from ray.serve._private.common import ReplicaID
from ray.serve._private.config import DeploymentConfig
from ray.serve._private.handle_options import InitHandleOptions
from ray.serve._private.metrics_utils import InMemoryMetricsStore
from ray.serve._private.replica import ReplicaMetricsManager, UserCallableWrapper
from ray.serve._private.replica_result import ReplicaResult
from ray.serve._private.router import AsyncioRouter, CurrentLoopRouter, RouterMetricsManager
from ray.serve.config import AutoscalingConfig
from ray.serve.exceptions import BackPressureError, RequestCancelledError
from ray.serve.handle import DeploymentBroadcastResponse, DeploymentHandle, DeploymentResponse
from ray.serve.request_router import RequestRouter, RunningReplica
from tests.routing.conftest import until
from tests.upstream.fake_serve import ENGINES, Answer, Replica, Served

from tera.engine.deployment import EngineReplica
from tera.errors import ConfigError, EngineError, InvalidValueError, ReplicaLostError, TeraError
from tera.upstream import ray_serve
from tera.upstream.ray_serve import ServedReplicas, ask_all, ongoing, translated


def parameters(of: Callable[..., Any]) -> list[str]:
    """Return the names of a function's parameters, in order."""
    return [name for name in inspect.signature(of).parameters if name != "self"]


def raised(cause: Exception) -> RayTaskError:
    """Return what arrives of an error that a replica raised."""
    return RayTaskError("connect", "traceback", cause)  # type: ignore[no-untyped-call]


class TestSymbols:
    """Each name by itself, so that what an upgrade has changed is read from what is red."""

    def test_a_handle_may_be_given_what_makes_its_router_and_its_id(self) -> None:
        assert {"_create_router", "_handle_id"} <= set(parameters(DeploymentHandle))
        assert parameters(DeploymentHandle)[:2] == ["deployment_name", "app_name"]

    def test_a_router_is_made_of_the_handles_id_the_deployment_and_options(self) -> None:
        made = parameters(default_impl.create_router)
        assert made[:3] == ["handle_id", "deployment_id", "handle_options"]
        wanted = parameters(default_impl.CreateRouterCallable.__call__)
        assert wanted == ["handle_id", "deployment_id", "handle_options"]

    def test_the_router_of_one_loop_wraps_one_that_has_what_is_replaced(self) -> None:
        source = inspect.getsource(CurrentLoopRouter.__init__)
        assert "self._asyncio_router = AsyncioRouter(" in source
        source = inspect.getsource(AsyncioRouter)
        for name in ("_request_router", "_request_router_initialized", "_metrics_manager"):
            assert f"self.{name} = " in source or f"self.{name}: " in source

    def test_a_request_router_is_made_of_these(self) -> None:
        wanted = {
            "deployment_id",
            "handle_source",
            "use_replica_queue_len_cache",
            "create_replica_wrapper_func",
        }
        assert wanted <= set(parameters(RequestRouter.__init__))

    @pytest.mark.parametrize(
        ("method", "expected"),
        [
            ("_choose_replica_for_request", ["pending_request", "is_retry"]),
            ("choose_replicas", ["candidate_replicas", "pending_request"]),
            ("update_replicas", ["replicas"]),
            ("on_replica_actor_died", ["replica_id"]),
        ],
    )
    def test_a_request_router_has_what_ours_overrides(
        self, method: str, expected: list[str]
    ) -> None:
        assert parameters(getattr(RequestRouter, method)) == expected
        assert parameters(getattr(ray_serve._Router, method)) == expected

    def test_a_request_router_says_which_replicas_there_are(self) -> None:
        assert isinstance(inspect.getattr_static(RequestRouter, "curr_replicas"), property)

    @pytest.mark.parametrize("name", ["replica_id", "max_ongoing_requests"])
    def test_a_running_replica_says_who_it_is_and_what_it_takes(self, name: str) -> None:
        assert isinstance(inspect.getattr_static(RunningReplica, name), property)

    def test_a_replica_id_is_a_name_at_a_deployment(self) -> None:
        replica = ReplicaID("a", ENGINES)
        assert (replica.unique_id, replica.deployment_id) == ("a", ENGINES)

    def test_what_waits_is_counted_by(self) -> None:
        expected = ["is_retry", "num_curr_replicas"]
        assert parameters(RouterMetricsManager.wrap_queued_request) == expected

    def test_a_replica_is_asked_for_figures_of_its_own(self) -> None:
        source = inspect.getsource(UserCallableWrapper)
        assert f'"{EngineReplica.record_autoscaling_stats.__name__}"' in source

    def test_a_response_is_awaited_and_cancelled(self) -> None:
        assert inspect.isfunction(DeploymentResponse.__await__)
        assert parameters(DeploymentResponse.cancel) == []

    def test_a_broadcast_gives_each_replicas_answer_apart(self) -> None:
        assert inspect.iscoroutinefunction(DeploymentBroadcastResponse._fetch_replica_results_async)
        assert inspect.iscoroutinefunction(ReplicaResult.get_async)
        assert parameters(DeploymentHandle.broadcast)[0] == "method_name"

    def test_the_setting_that_keeps_the_router_in_the_callers_loop_is_there(self) -> None:
        from ray.serve._private import constants

        source = inspect.getsource(constants)
        assert '"RAY_SERVE_THROUGHPUT_OPTIMIZED"' in source
        assert "_run_router_in_separate_loop" in InitHandleOptions.__dataclass_fields__


class TestReplicas:
    async def test_it_hears_which_replicas_run_and_how_much_each_takes(
        self, served: Served
    ) -> None:
        assert served.heard == []
        served.update(Replica("a", 8), Replica("b", 4))
        served.update(Replica("a", 9))
        assert served.heard == [{"a": 8, "b": 4}, {"a": 9}]

    async def test_it_hears_of_a_dead_one_before_the_controller_says_so(
        self, served: Served
    ) -> None:
        served.update(Replica("a"), Replica("b"))
        served.replicas._router.on_replica_actor_died(ReplicaID("a", ENGINES))
        assert served.heard[-1] == {"b": 8}
        with pytest.raises(ReplicaLostError):
            await served.replicas.connect("a", "host", 1)

    async def test_without_the_setting_it_says_how_to_set_it(
        self, no_ray: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(default_impl, "create_router", lambda *_: object())
        with pytest.raises(ConfigError, match="RAY_SERVE_THROUGHPUT_OPTIMIZED"):
            ServedReplicas(ENGINES.name, ENGINES.app_name, lambda _: None)


class TestCounts:
    async def test_what_waits_is_counted_as_serves_own_calls_are(self, served: Served) -> None:
        with served.replicas.queued(), served.replicas.queued():
            assert served.counts.num_queued_requests == 2
        assert served.counts.num_queued_requests == 0

    async def test_who_leaves_is_counted_no_more(self, served: Served) -> None:
        with pytest.raises(asyncio.CancelledError), served.replicas.queued():
            raise asyncio.CancelledError
        assert served.counts.num_queued_requests == 0

    async def test_what_a_replica_runs_takes_the_place_of_serves_own_count(self) -> None:
        manager: Any = ReplicaMetricsManager.__new__(ReplicaMetricsManager)
        manager._metrics_store = InMemoryMetricsStore()  # type: ignore[no-untyped-call]
        manager._num_ongoing_requests = 0
        manager._autoscaling_config = AutoscalingConfig()
        manager._ingress = True
        manager._checked_custom_metrics = False
        manager.user_autoscaling_stats_latency_tracker = SimpleNamespace(observe=lambda _: None)

        async def running() -> dict[str, float]:
            return ongoing(3)

        manager._custom_metrics_enabled = True
        manager._record_autoscaling_stats_fn = running
        await manager._add_autoscaling_metrics_point_async()
        (points,) = manager._metrics_store.data.values()
        assert [point.value for point in points] == [3]

    @pytest.mark.parametrize(("replicas", "told"), [(0, 1), (1, 0)])
    async def test_with_no_replica_serve_hears_at_once_of_who_waits(
        self, served: Served, replicas: int, told: int
    ) -> None:
        served.update(*(Replica(f"replica-{number}") for number in range(replicas)))
        autoscaling = DeploymentConfig(autoscaling_config=AutoscalingConfig())
        served.counts.update_deployment_config(autoscaling, replicas)
        served.controller.reports.clear()
        with served.replicas.queued():
            assert len(served.controller.reports) == told
        await served.counts.shutdown()  # type: ignore[no-untyped-call]


class TestConnect:
    async def test_the_replica_that_is_meant_is_called(self, served: Served) -> None:
        replicas = [Replica(name) for name in "abc"]
        served.update(*replicas)
        await served.replicas.connect("b", "host", 7)
        assert [each.calls for each in replicas] == [[], [("connect", ["host", 7])], []]
        await until(lambda: not any(served.counts.num_requests_sent_to_replicas.values()))
        assert served.counts.num_queued_requests == 0

    async def test_calls_at_the_same_time_go_where_each_is_meant_to(self, served: Served) -> None:
        replicas = {name: Replica(name) for name in "abcdefgh"}
        served.update(*replicas.values())
        connects = (
            asyncio.create_task(served.replicas.connect(name, name, 1)) for name in replicas
        )
        await asyncio.gather(*connects)
        for name, replica in replicas.items():
            assert replica.calls == [("connect", [name, 1])]

    async def test_one_that_is_not_there_is_lost(self, served: Served) -> None:
        served.update(Replica("a"))
        with pytest.raises(ReplicaLostError):
            await served.replicas.connect("gone", "host", 1)

    async def test_what_the_replica_raises_arrives(self, served: Served) -> None:
        replica = Replica("a")
        served.update(replica)
        cause = ReplicaLostError("The gateway's token channel cannot be reached.")
        replica.answer = Answer(raised(cause))
        with pytest.raises(ReplicaLostError) as failed:
            await served.replicas.connect("a", "host", 1)
        assert failed.value is cause

    async def test_who_gives_up_takes_the_call_back(self, served: Served) -> None:
        replica = Replica("a")
        replica.answer.hangs = True
        served.update(replica)
        connecting = asyncio.create_task(served.replicas.connect("a", "host", 1))
        await until(lambda: bool(replica.calls))
        connecting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await connecting
        await until(lambda: replica.answer.cancelled)

    async def test_a_call_that_the_replica_ended_failed_and_nobody_was_cancelled(
        self, served: Served
    ) -> None:
        replica = Replica("a")
        replica.answer = Answer(asyncio.CancelledError())
        served.update(replica)
        async with asyncio.timeout(10):
            with pytest.raises(EngineError):
                await served.replicas.connect("a", "host", 1)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        pytest.param(
            raised(InvalidValueError("no", param="x")),
            InvalidValueError,
            id="of ours, raised by a replica",
        ),
        pytest.param(
            raised(KeyError("x")),
            EngineError,
            id="a defect of a replica",
        ),
        pytest.param(ReplicaLostError("gone"), ReplicaLostError, id="of ours, raised here"),
        pytest.param(ActorDiedError(), ReplicaLostError, id="a dead process"),
        pytest.param(
            ActorUnavailableError("a break", b"\x01" * 16), EngineError, id="out of reach"
        ),
        pytest.param(TaskCancelledError(), EngineError, id="ended by Ray"),
        pytest.param(RequestCancelledError("1"), EngineError, id="ended by Serve"),
        pytest.param(
            BackPressureError(num_queued_requests=1, max_queued_requests=1),
            EngineError,
            id="refused by Serve",
        ),
        pytest.param(RuntimeError("odd"), EngineError, id="anything else"),
    ],
)
def test_a_ray_error_stands_for_one_of_ours(error: Exception, expected: type[TeraError]) -> None:
    found = translated(error)
    assert type(found) is expected
    assert "traceback" not in found.message


class TestAskAll:
    def handle(self, monkeypatch: pytest.MonkeyPatch, *answers: object) -> None:
        """Have each replica of every deployment answer so; None never does."""

        class Result:
            def __init__(self, answer: object) -> None:
                self.answer = answer

            async def get_async(self) -> object:
                if self.answer is None:
                    await asyncio.Event().wait()
                if isinstance(self.answer, Exception):
                    raise self.answer
                return self.answer

        async def results() -> list[Result]:
            return [Result(answer) for answer in answers]

        handle = SimpleNamespace(
            broadcast=lambda _: SimpleNamespace(_fetch_replica_results_async=results)
        )
        monkeypatch.setattr("ray.serve.get_deployment_handle", lambda *_: handle)
        monkeypatch.setattr(ray_serve, "PEER_TIMEOUT_S", 0.05)

    async def test_each_replicas_answer_is_there(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.handle(monkeypatch, "one", "two")
        assert await ask_all("Engine", "model-demo", "metrics") == ["one", "two"]

    async def test_one_that_fails_or_is_silent_is_left_out_and_logged(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        self.handle(monkeypatch, "one", None, ActorDiedError(), "four")
        assert await ask_all("Engine", "model-demo", "metrics") == ["one", "four"]
        (line,) = caplog.records
        assert "2 replicas of model-demo did not answer" in line.getMessage()

    async def test_a_name_that_serve_has_changed_is_no_empty_answer(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        handle = SimpleNamespace(broadcast=lambda _: SimpleNamespace())
        monkeypatch.setattr("ray.serve.get_deployment_handle", lambda *_: handle)
        with pytest.raises(AttributeError):
            await ask_all("Engine", "model-demo", "metrics")


async def test_a_replicas_grpc_server_can_be_kept_on_loopback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started = inspect.getsource(replica_module.Replica._on_initialized)
    assert 'add_port_to_grpc_server(self._server, "[::]:0")' in started
    own = vars(replica_module)["add_port_to_grpc_server"]
    monkeypatch.setattr(replica_module, "add_port_to_grpc_server", own)  # so that it is put back
    ray_serve.stay_on_loopback()
    server = grpc.aio.server()
    port = vars(replica_module)["add_port_to_grpc_server"](server, "[::]:0")
    await server.start()
    try:
        listening = {
            it.laddr.ip
            for it in psutil.Process().net_connections(kind="tcp")
            if it.laddr.port == port and it.status == psutil.CONN_LISTEN
        }
        assert {it.removeprefix("::ffff:") for it in listening} == {"127.0.0.1"}
    finally:
        await server.stop(None)

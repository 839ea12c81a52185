"""The Ray Serve deployment of the gateway: builds a replica's parts and keeps them up to date."""

import asyncio
import gc
import logging
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import AsyncExitStack, suppress
from functools import partial
from typing import Any

from ray import serve
from ray.util import get_node_ip_address
from starlette.types import ASGIApp

from tera.background import Background
from tera.config.environment import Runtime
from tera.config.gateway import GatewayConfig, RequestLimits
from tera.config.model import ModelConfig
from tera.config.names import (
    ENGINE_DEPLOYMENT,
    GATEWAY_APPLICATION,
    GATEWAY_DEPLOYMENT,
    application_name,
)
from tera.contract.common import ModelStatus
from tera.errors import ConfigError
from tera.gateway.app import build_app
from tera.gateway.catalog import Catalog, LoadingModel
from tera.gateway.failure import last_line, reason_of, shortened
from tera.gateway.grammars import Grammars
from tera.gateway.loop_lag import LoopLag
from tera.gateway.model_status import model_status
from tera.gateway.pipeline import Pipeline
from tera.gateway.render import TextModel
from tera.gateway.simulated_text import SimulatedTextModel
from tera.gateway.text_loader import TextLoader, TextLoaders
from tera.gateway.text_pool import TextPool
from tera.gateway.vllm_text import VllmTextModel
from tera.observability import Metrics, log_json_lines, merge_expositions
from tera.routing.fleet import Fleet
from tera.routing.link import ReplicaLinks
from tera.routing.run import Dispatcher, DispatchLimits
from tera.routing.switchboard import Switchboard
from tera.tenancy.admission import Admissions
from tera.tenancy.cache_salt import cache_salt
from tera.tenancy.key_store import KeyStore
from tera.tenancy.keys_file import KeysFile
from tera.tenancy.redis import connect, refuse_cluster
from tera.tenancy.redis_memory import RedisMemory
from tera.tenancy.snapshot import KeySnapshot
from tera.tenancy.usage_export import UsageExporter
from tera.upstream.ray_serve import ServedReplicas, ask_all, stay_on_loopback

log = logging.getLogger(__name__)

SWITCH_INTERVAL_S = 0.0005
"""How long a thread of the text pool may keep the GIL while the event loop wants it: a tenth of
Python's default, after which other tenants' tokens waited two and a half times as long beside
bodies of ten megabytes."""

STATUS_INTERVAL_S, STEADY_STATUS_INTERVAL_S = 1.0, 5.0
"""Intervals at which Serve's status is read, which costs 30 ms of CPU; the longer one applies while
every model is ready and the replicas that have sent tokens are connected."""
REDIS_TIMEOUT_S = 1.0
LOADING_S = 20.0
"""Longest that a replica waits for the models of a new catalog before it says that it serves them;
what takes longer is loaded while requests for the other models are answered."""


class GatewayReplica:
    """One replica: authenticates, renders, dispatches and relays.

    The catalog arrives through `reconfigure`, so that changing it restarts nothing.
    """

    async def __init__(self) -> None:  # type: ignore[misc]  # Serve awaits it
        log_json_lines()
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        # Read here, not when the application is built: Serve stores its arguments, and these are
        # secret.
        self._runtime = runtime = Runtime.from_environment()
        if runtime.on_one_machine:
            stay_on_loopback()
        self._config = GatewayConfig()
        self._replica_id = serve.get_replica_context().replica_id.unique_id
        self._metrics = Metrics()
        self._catalog = Catalog()
        self._refused: dict[str, str] = {}
        """Why models that the catalog leaves out cannot be served, by id."""
        self._fleets: dict[str, Fleet] = {}
        """By model. They outlive a change of its settings, since they know what its replicas have
        cached, and the removal of the model, since Serve keeps notifying them if it comes back."""
        self._stack = AsyncExitStack()
        await self._stack.enter_async_context(LoopLag(self._metrics.loop_lag_s.observe))
        self._links = await self._stack.enter_async_context(
            ReplicaLinks(runtime.channel_host or _node_address(), runtime.cluster_secret)
        )
        redis = connect(runtime.redis_url, timeout_s=REDIS_TIMEOUT_S)
        self._stack.push_async_callback(redis.aclose)
        await refuse_cluster(redis)  # one that comes later is looked at by who follows the keys
        self._keys_file: KeysFile | None = None
        if runtime.keys_file is not None:
            store = KeyStore(redis, runtime.key_pepper, time.time)
            self._keys_file = await self._stack.enter_async_context(
                KeysFile(runtime.keys_file, store)
            )
        self._keys = await self._stack.enter_async_context(
            KeySnapshot(
                redis,
                runtime.key_pepper,
                time.time,
                stale_s=lambda: self._config.limits.stale_keys_seconds,
            )
        )
        # A separate client: no other traffic may delay the admission of a request.
        limits = connect(runtime.redis_url, timeout_s=REDIS_TIMEOUT_S)
        self._stack.push_async_callback(limits.aclose)
        self._admissions = await self._stack.enter_async_context(
            Admissions(limits, self._keys, lambda: self._config.limits, self._replica_id)
        )
        await self._stack.enter_async_context(UsageExporter(redis, lambda: self._config.usage))
        self._grammars = Grammars()
        self._stack.callback(self._grammars.close)
        self._redis_memory = await self._stack.enter_async_context(RedisMemory(redis))
        self._statuses = StatusWatcher(self._catalog)
        self._links.on_lost = self._statuses.look_soon
        await self._stack.enter_async_context(self._statuses)
        self._importing = threading.Lock()
        self._texts = TextLoaders(self._load_text, changed=self._statuses.look_soon)
        self._stack.push_async_callback(self._texts.aclose)
        pool = TextPool()
        self._stack.callback(pool.close)
        self._pipeline = Pipeline(
            self._catalog, self._keys, self._admissions, self._statuses.status, self._metrics, pool
        )

    async def __serve_build_asgi_app__(self) -> ASGIApp:
        """Return the application that Serve puts behind HTTP."""
        return build_app(self._pipeline, self, self._metrics, lambda: self._config)

    async def reconfigure(self, user_config: Mapping[str, Any]) -> None:
        """Serve another catalog; running requests keep the one they began with.

        A model that cannot be loaded is marked as failed and tried again; all others are served.

        Raises:
            ConfigError: the gateway's own part is refused; the old catalog stays.
        """
        gateway = GatewayConfig.parse(user_config["gateway"])
        configs = self._parsed(user_config["models"])
        loaders = await self._texts.follow(configs)
        models = {
            name: LoadingModel(
                name,
                config,
                loaders[name],
                self._dispatcher(name, config, gateway.requests),
                partial(cache_salt, self._runtime.cluster_secret, config.cache_sharing),
            )
            for name, config in configs.items()
        }
        self._config = gateway
        first = not self._catalog.models
        self._catalog.replace(models)
        self._statuses.look_soon()
        with suppress(TimeoutError):
            async with asyncio.timeout(LOADING_S):
                await asyncio.gather(*(loader.tried() for loader in loaders.values()))
        if first:
            _spare_collections()  # now: later it would stall streams for as long as it takes

    def _parsed(self, models: Mapping[str, Any]) -> dict[str, ModelConfig]:
        """Return the settings of those models whose settings are right."""
        parsed, self._refused = {}, {}
        for name, values in models.items():
            try:
                parsed[name] = ModelConfig.parse(values)
            except ConfigError as error:
                log.error("The settings of %s are refused: %s", name, error)
                self._refused[name] = reason_of(error)
        return parsed

    def _load_text(self, config: ModelConfig) -> TextModel:
        """Load the text side of a model in this thread; takes seconds."""
        if config.engine.kind == "simulated":
            return SimulatedTextModel(config.engine.args)
        source = config.weights
        assert source is not None  # a vllm model has one
        path = source.engine_path(self._runtime.home, config.engine.dtype)
        args = {**source.revision_args(), **config.engine.args}
        with self._importing:  # in parallel, one thread could see what another has half imported
            VllmTextModel.prepare()
        return VllmTextModel.load(path, args, self._grammars)

    def _dispatcher(self, name: str, config: ModelConfig, requests: RequestLimits) -> Dispatcher:
        fleet = self._fleets.get(name)
        if fleet is None:
            serve_view = partial(ServedReplicas, ENGINE_DEPLOYMENT, application_name(name))
            fleet = self._fleets[name] = Fleet(self._links, Switchboard(), serve_view)
        fleet.switchboard.prefix_affinity = config.routing == "prefix_affinity"
        limits = DispatchLimits(
            deadline_s=requests.deadline_seconds,
            first_token_deadline_s=requests.first_token_deadline_seconds,
            cold_start_deadline_s=config.scaling.cold_start_deadline_seconds,
            retries=requests.retries,
            most_queued=config.scaling.max_queued_requests,
        )
        return Dispatcher(fleet, self._links, limits)

    async def readiness(self) -> tuple[bool, dict[str, Any]]:
        """Return whether this replica can serve: it has the keys, and a model can answer."""
        statuses = {
            model.config.id: self._statuses.status(name)
            for name, model in self._catalog.models.items()
        }
        knows_keys = self._keys.ready and (self._keys_file is None or self._keys_file.ready)
        ready = knows_keys and (self._statuses.any_answered or not statuses)
        details = {"models": statuses, "redis": "away" if self._degraded else "ok"}
        failures = self._failures()
        return ready, {**details, "failures": failures} if failures else details

    def _failures(self) -> dict[str, str]:
        """Return why models cannot be loaded or started, by their names in the values."""
        found = {name: self._statuses.failure(name) for name in self._catalog.models}
        return {**self._refused, **{name: reason for name, reason in found.items() if reason}}

    @property
    def _degraded(self) -> bool:
        return self._keys.degraded or self._admissions.degraded

    def own_exposition(self) -> str:
        """Return this replica's metrics as Prometheus text."""
        metrics = self._metrics
        failures = self._failures()
        metrics.model_failed.clear()  # of models that have gone
        for name in (*self._catalog.models, *self._refused):
            metrics.model_failed.labels(name).set(name in failures)
        metrics.redis_degraded.set(self._degraded)
        metrics.redis_outages.set(self._admissions.outages)
        metrics.redis_used_bytes.set(self._redis_memory.memory.used_bytes)
        metrics.redis_max_bytes.set(self._redis_memory.memory.max_bytes)
        metrics.usage_unsettled.set(self._admissions.unsettled)
        metrics.usage_given_up.set(self._admissions.given_up)
        return metrics.exposition()

    async def exposition(self) -> str:
        """Return the metrics of all gateway and engine replicas as one text."""
        parts = await asyncio.gather(
            ask_all(GATEWAY_DEPLOYMENT, GATEWAY_APPLICATION, "metrics"),
            *(
                ask_all(ENGINE_DEPLOYMENT, application_name(name), "metrics")
                for name in self._catalog.models
                if self._statuses.runs(name)
            ),
        )
        return merge_expositions(part for group in parts for part in group)

    async def metrics(self) -> tuple[str, str]:
        """Return this replica's id and its own metrics as Prometheus text."""
        return self._replica_id, self.own_exposition()

    async def __del__(self) -> None:
        """Close Redis and the token channel once the replica has drained."""
        stack = getattr(self, "_stack", None)
        if stack is not None:
            await stack.aclose()


def _spare_collections() -> None:
    """Exempt permanent objects from garbage collection, and make it run less often.

    A request leaves few cycles or none, and looking for them costs 10 % of its CPU here.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


def _node_address() -> str:
    address: str = get_node_ip_address()  # type: ignore[no-untyped-call]
    return address


class StatusWatcher(Background):
    """Knows from Serve which models have running replicas, as long as its block runs.

    A model whose text side could not be loaded has failed, whatever its replicas do.
    """

    def __init__(
        self,
        catalog: Catalog,
        *,
        interval_s: float = STATUS_INTERVAL_S,
        steady_interval_s: float = STEADY_STATUS_INTERVAL_S,
    ) -> None:
        """The longer interval applies while every model is ready."""
        self._catalog = catalog
        self._interval_s = interval_s
        self._steady_interval_s = steady_interval_s
        self._statuses: dict[str, ModelStatus] = {}
        self._failures: dict[str, str] = {}
        self._look = asyncio.Event()
        self.any_answered = False
        """Whether any model has ever been ready, so that requests can be answered or held."""

    def status(self, name: str) -> ModelStatus:
        """Return a model's status; that of its replicas is at most some seconds old."""
        served = self._statuses.get(name, "starting")
        loader = self._loader(name)
        return served if loader is None else loader.status(served)

    def failure(self, name: str) -> str:
        """Return why a model cannot be loaded or started, for operators; empty if it can."""
        loader = self._loader(name)
        return (loader is not None and loader.failure) or self._failures.get(name, "")

    def runs(self, name: str) -> bool:
        """Return whether a model has running replicas, even if it cannot be used for now."""
        return self._statuses.get(name) == "ready"

    def _loader(self, name: str) -> TextLoader | None:
        model = self._catalog.models.get(name)
        return model.loader if isinstance(model, LoadingModel) else None

    def look_soon(self) -> None:
        """Read the status again within a second: something has changed."""
        self._look.set()

    async def _run(self) -> None:
        while True:
            began = time.monotonic()
            self._look.clear()
            try:
                applications = (await asyncio.to_thread(serve.status)).applications
            except Exception:
                log.warning("Serve's status could not be read.", exc_info=True)
            else:
                self._statuses = {
                    name: _status(applications.get(application_name(name)), model.config)
                    for name, model in self._catalog.models.items()
                }
                self._failures = {
                    name: _failure(applications.get(application_name(name)))
                    for name in self._catalog.models
                }
                self.any_answered |= any(
                    self.status(name) in ("ready", "scaled_to_zero") for name in self._statuses
                )
            await asyncio.sleep(max(0.0, self._interval_s - (time.monotonic() - began)))
            if self._statuses and all(status == "ready" for status in self._statuses.values()):
                with suppress(TimeoutError):
                    async with asyncio.timeout(self._steady_interval_s - self._interval_s):
                        await self._look.wait()


def _status(application: Any, config: ModelConfig) -> ModelStatus:
    deployment = application and application.deployments.get(ENGINE_DEPLOYMENT)
    return model_status(
        application and application.status,
        deployment and deployment.replica_states,
        least_replicas=config.replicas.min,
    )


def _failure(application: Any) -> str:
    """Return why Serve could not deploy an application; empty if it could, or is still trying."""
    if application is None or application.status != "DEPLOY_FAILED":
        return ""
    return shortened(last_line(application)) or "Its replicas do not start."

"""`tera serve`: a whole platform on one machine, in the foreground."""

import asyncio
import signal
import socket
import time
from collections.abc import AsyncGenerator, Awaitable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast, get_args

import psutil
from filelock import FileLock, Timeout
from redis.asyncio import Redis
from redis.exceptions import RedisError

from tera.config.environment import Runtime, set_environment
from tera.config.model import engine_args
from tera.config.platform import PlatformConfig
from tera.engine.vllm_args import check_args
from tera.errors import ConfigError, StartError
from tera.haproxy import MAX_CONNECTIONS, MAX_CONNECTIONS_PER_SOURCE
from tera.local.cluster import LocalCluster, wait_until_deployed
from tera.local.demo_model import Dtype, ensure_demo_model
from tera.local.gateway import is_ready
from tera.local.private_file import write_private
from tera.local.processes import ProcessId, ProcessRecord, on_record
from tera.local.redis_server import EmbeddedRedis
from tera.local.state import LocalSecrets, LocalState
from tera.local.status import telling_status
from tera.manifest import serve_config
from tera.tenancy.key_store import KeyStore
from tera.tenancy.redis import connect, refuse_cluster

LOCAL_TENANT = "local"
ENGINE_DEADLINE_S = 900.0
REDIS_TIMEOUT_S = 5.0
ENGINE_BYTES = 2 * 1024**3
"""The most memory that one vLLM replica of the demo model and its share of the gateway use."""

T = TypeVar("T")


class Console(Protocol):
    """Where progress is shown."""

    def stage(self, name: str) -> None:
        """Show that a stage begins."""
        ...

    def progress(self, text: str, done_ratio: float | None = None) -> None:
        """Show how far the current stage has got."""
        ...

    def done(self, text: str = "") -> None:
        """Show that the current stage has succeeded."""
        ...

    def failed(self) -> None:
        """Show that the current stage has failed."""
        ...

    def ready(self, platform: "RunningPlatform") -> None:
        """Show, after all stages, how to use the platform."""
        ...


@dataclass(frozen=True)
class RunningPlatform:
    """How to reach a platform that is ready."""

    base_url: str
    """Without `/v1`."""
    api_key: str
    model: str
    """Id of the first model; empty if there is none."""
    seconds: float
    """Time from the start until it was ready."""


async def serve(
    platform: PlatformConfig, home: Path, host: str, port: int, console: Console
) -> None:
    """Run the platform until SIGINT, SIGTERM or SIGHUP, then stop everything it started.

    Raises:
        ConfigError: its values cannot run on one machine, or an engine would refuse them.
        StartError: a part of it does not start; the message says what to do.
    """
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    main = asyncio.current_task()
    assert main is not None

    def stop() -> None:
        # During the start this cancels it; afterwards it ends the wait below.
        if not stopping.is_set():
            stopping.set()
            main.cancel()

    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # ignored under `nohup`
        numbers.append(signal.SIGHUP)
    for number in numbers:
        loop.add_signal_handler(number, stop)
    with suppress(
        asyncio.CancelledError
    ):  # by `stop`; a cancellation by others is raised again below
        async with running(platform, home, host, port, console) as ready:
            # Ray sets handlers of its own when it starts.
            for number in numbers:
                loop.add_signal_handler(number, stop)
            console.ready(ready)
            await stopping.wait()
    if not stopping.is_set():
        raise asyncio.CancelledError


@asynccontextmanager
async def running(
    platform: PlatformConfig, home: Path, host: str, port: int, console: Console
) -> AsyncGenerator[RunningPlatform]:
    """Start a platform, stage by stage, and stop it when the block ends.

    Raises:
        ConfigError: its values cannot run on one machine, or an engine would refuse them.
        StartError: a part of it does not start; the message says what to do.
    """
    began = time.monotonic()
    check_engines(platform)
    async with AsyncExitStack() as stack:
        stack.enter_context(_lock(home))
        # Before the checks of port and memory: a killed platform's processes may hold both.
        await _clear_leftovers(home, console)
        _check_port(host, port)
        check_memory(vllm_replicas(platform))
        # These end in reverse order, each even if ending another one fails.
        scratch = await stack.enter_async_context(on_record(home))
        await make_models(platform, home, console)
        redis_url, redis_pid = await _start_redis(platform, home, stack, console)
        local_secrets = LocalSecrets.of(home)
        runtime = local_secrets.runtime(redis_url, home)
        set_environment({**runtime.to_environment(), **local_secrets.ray_environment()})
        set_environment(_proxy_environment(platform))
        set_environment(_engine_environment(platform), keep_existing=True)
        cluster = LocalCluster(host, port, scratch)
        await stack.enter_async_context(_started(cluster, console))
        base_url = f"http://{host}:{port}"
        state = LocalState(
            process=ProcessId.current(),
            base_url=base_url,
            ray_address=cluster.ray_address,
            status_socket=cluster.status_socket,
            redis_url=redis_url,
            redis_pid=redis_pid,
            platform=platform,
        )
        stack.callback((home / "state.json").unlink, missing_ok=True)
        state.write(home)
        with stage(console, "Engines and gateway"):
            config = serve_config(platform, host=host, port=port)
            await _uninterrupted(asyncio.to_thread(cluster.deploy, config))
            await stack.enter_async_context(telling_status(state))
            await until_up(config, console)
            await _until_ready(base_url)

        ready = RunningPlatform(
            base_url=base_url,
            api_key=await _local_key(runtime),
            model=next((model.id for model in platform.deployed_models().values()), ""),
            seconds=time.monotonic() - began,
        )
        stack.callback((home / "local.env").unlink, missing_ok=True)
        write_private(home / "local.env", _env_file(ready))
        yield ready


@asynccontextmanager
async def _started(cluster: LocalCluster, console: Console) -> AsyncGenerator[None]:
    try:
        with stage(console, "Ray"):
            await _uninterrupted(asyncio.to_thread(cluster.start))
        yield
    finally:
        with stage(console, "Shutdown"):
            await cluster.stop()


async def until_up(config: dict[str, Any], console: Console) -> None:
    """Return once every application of a Serve config runs; show each one that starts.

    Raises:
        StartError: an application failed, or the deadline has passed; the message says why.
    """
    names = {application["name"] for application in config["applications"]}
    await wait_until_deployed(
        names, lambda name: console.progress(f"{name} is up"), ENGINE_DEADLINE_S
    )


@contextmanager
def stage(console: Console, name: str) -> Iterator[None]:
    """Show a stage while the block runs."""
    console.stage(name)
    try:
        yield
    except BaseException:
        console.failed()
        raise
    console.done()


async def _uninterrupted(work: Awaitable[T]) -> T:
    """Wait for work in a thread to end, even if cancelled: only finished work can be undone."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        raise


def check_engines(platform: PlatformConfig) -> None:
    """Refuse arguments that an engine would refuse; Serve would retry its start for minutes first.

    Raises:
        ConfigError: one line per fault, each beginning with the path of the value.
    """
    for name, model in platform.deployed_models().items():
        if model.engine.kind == "vllm":
            check_args(engine_args(model.engine.args), f"models.{name}.engine.args")


def _check_port(host: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise StartError(
                f"Port {port} on {host} cannot be used ({error.strerror}). "
                "Stop what listens there, or choose another with TERA_PORT or --port."
            ) from error


def vllm_replicas(platform: PlatformConfig) -> int:
    """Return the smallest number of replicas with a model in memory that a platform runs."""
    models = platform.deployed_models().values()
    return sum(model.replicas.min for model in models if model.engine.kind == "vllm")


def check_memory(replicas: int) -> None:
    """Refuse more vLLM replicas than there is memory for.

    Raises:
        StartError: says how much is missing.
    """
    available = psutil.virtual_memory().available
    if available < replicas * ENGINE_BYTES:
        raise StartError(
            f"{replicas} vLLM replica(s) need about {replicas * ENGINE_BYTES / 1024**3:.0f} GiB of "
            f"free memory and {available / 1024**3:.1f} GiB are free. Free some, or lower "
            "replicas.min."
        )


@contextmanager
def _lock(home: Path) -> Iterator[None]:
    """Lock `home`, created if missing, so that one platform at a time runs there.

    Raises:
        StartError: a platform already runs there, or it cannot be written to.
    """
    try:
        home.mkdir(parents=True, exist_ok=True)
        held = FileLock(home / "serve.lock").acquire(blocking=False)
    except Timeout as error:
        raise StartError(
            f"A platform already runs in {home}. Stop it, or use another directory by "
            "setting TERA_HOME."
        ) from error
    except OSError as error:
        raise StartError(
            f"{home} cannot be used ({error.strerror}). Name another directory in TERA_HOME."
        ) from error
    with held:
        yield


async def _clear_leftovers(home: Path, console: Console) -> None:
    left = ProcessRecord.read(home)
    if left is not None:
        with stage(console, "Cleaning up after a killed platform"):
            await left.clear(home)


async def make_models(platform: PlatformConfig, home: Path, console: Console) -> None:
    """Build the platform's demo models that have not been built yet."""
    wanted: dict[tuple[str, Dtype], None] = {}
    for model in platform.deployed_models().values():
        if model.weights is not None and model.weights.scheme == "demo":
            dtype = model.engine.dtype
            if dtype not in get_args(Dtype):
                raise ConfigError(f"{model.id}: a demo model's dtype is bfloat16 or float32")
            wanted[model.weights.location, cast(Dtype, dtype)] = None
    for name, dtype in wanted:
        with stage(console, f"Model {name} in {dtype}"):
            await asyncio.to_thread(
                ensure_demo_model, name, home / "models", dtype, console.progress
            )


async def _start_redis(
    platform: PlatformConfig, home: Path, stack: AsyncExitStack, console: Console
) -> tuple[str, int | None]:
    """Return the URL of the Redis to use, and its process id if it is ours."""
    if platform.redis.embedded:
        with stage(console, "Redis"):
            server = await stack.enter_async_context(await EmbeddedRedis.start(home / "redis"))
        return server.url, server.pid
    external = platform.redis.external
    url = f"{'rediss' if external.tls else 'redis'}://{external.address}/0"
    with stage(console, f"Redis at {external.address}"):
        async with _connected(url) as redis:
            try:
                await redis.ping()
                await refuse_cluster(redis)
            except RedisError as error:
                raise StartError(
                    f"redis.external.address: {external.address} does not answer: {error}"
                ) from error
    return url, None


def _proxy_environment(platform: PlatformConfig) -> dict[str, str]:
    """Return environment variables for `tera.haproxy`."""
    connections = platform.gateway.connections
    return {
        MAX_CONNECTIONS: str(connections.max),
        MAX_CONNECTIONS_PER_SOURCE: str(connections.per_source),
    }


def _engine_environment(platform: PlatformConfig) -> dict[str, str]:
    """Return environment variables for vLLM; those that the user has set are kept."""
    variables = {
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; vLLM would take half of the machine
    }
    if not any(model.needs_hub for model in platform.deployed_models().values()):
        variables["HF_HUB_OFFLINE"] = "1"
    return variables


async def _until_ready(base_url: str, deadline_s: float = 60.0) -> None:
    end = time.monotonic() + deadline_s
    while not await asyncio.to_thread(is_ready, base_url):
        if time.monotonic() > end:
            raise StartError(f"The gateway was not ready {deadline_s:.0f} s after its start.")
        await asyncio.sleep(0.1)


async def _local_key(runtime: Runtime) -> str:
    """Create a key of the local tenant for this start, and revoke those of earlier starts."""
    async with _connected(runtime.redis_url) as redis:
        store = KeyStore(redis, runtime.key_pepper, time.time)
        for record in await store.list():
            if record.tenant == LOCAL_TENANT:
                await store.revoke(record.key_id)
        return (await store.create(LOCAL_TENANT)).key


@asynccontextmanager
async def _connected(url: str) -> AsyncGenerator[Redis]:
    redis = connect(url, timeout_s=REDIS_TIMEOUT_S)
    try:
        yield redis
    finally:
        await redis.aclose()


def _env_file(ready: RunningPlatform) -> str:
    values = {
        "TERA_BASE_URL": ready.base_url,
        "TERA_API_KEY": ready.api_key,
        "TERA_MODEL": ready.model,
        "TERA_SPEECH_MODEL": "",
    }
    return "".join(f"{name}={value}\n" for name, value in values.items())

import asyncio
import json
import re
import shutil
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing
from pathlib import Path

import pytest
import pytest_asyncio
import uvloop
from pydantic import JsonValue
from safetensors import safe_open
from safetensors.numpy import save_file
from tests.engine.gateways import NAME, FakeGateway
from tests.engine.streams import streamed
from tests.routing.conftest import SECRET, RecordingWorker

from tera.engine.base import TextEngine
from tera.engine.link import GatewayLinks
from tera.engine.simulated import SimulatedEngine
from tera.engine.simulated_vocabulary import Vocabulary
from tera.engine.turns import Sleeper
from tera.engine.vllm import VllmEngine
from tera.generation import Generation, Sampling, TokenDelta

LAYERS = 2
"""Of the thirty that the demo model has: what an engine promises of tokens holds for any model, and
a step of this one takes a third of the time."""


VLLM_ARGS: dict[str, JsonValue] = {
    "enforce_eager": True,
    "dtype": "float32",
    "max_model_len": 2048,
    "max_num_seqs": 16,
    "served_model_name": "demo",
    # A model without sense may go on with blanks for ever, which JSON allows.
    "structured_outputs_config": {"disable_any_whitespace": True},
}


STALL_S = 60
"""Without a step, until the engine counts as stalled."""


VLLM_MARKS = [
    pytest.mark.slow,
    pytest.mark.vllm,
    # What vLLM's imports warn of is not ours to mend.
    pytest.mark.filterwarnings("ignore::Warning"),
]


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    factories = {"asyncio": asyncio.new_event_loop}
    if item.path.name.startswith(("test_link", "test_runs")):
        # Serve's replicas run uvloop, whose transports differ from asyncio's.
        factories["uvloop"] = uvloop.new_event_loop
    return factories


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Asker:
    """Asks one engine for generations; token ids below 256 mean something to every engine."""

    def __init__(self, engine: TextEngine) -> None:
        self.engine = engine
        self._next_id = 0

    def generation(
        self,
        token_ids: list[int],
        sampling: Sampling,
        resumed_tokens: int = 0,
        cache_salt: str = "",
    ) -> Generation:
        self._next_id += 1
        name = f"request-{self._next_id}"
        return Generation(self._next_id, name, token_ids, sampling, resumed_tokens, cache_salt)

    async def deltas(
        self,
        token_ids: list[int],
        sampling: Sampling,
        resumed_tokens: int = 0,
        cache_salt: str = "",
    ) -> list[TokenDelta]:
        generation = self.generation(token_ids, sampling, resumed_tokens, cache_salt)
        async with aclosing(streamed(self.engine, generation)) as stream:
            return [delta async for delta in stream]

    async def tokens(
        self, token_ids: list[int], sampling: Sampling, resumed_tokens: int = 0
    ) -> list[int]:
        deltas = await self.deltas(token_ids, sampling, resumed_tokens)
        return [token_id for delta in deltas for token_id in delta.token_ids]


async def until(condition: Callable[[], bool], timeout_s: float = 30) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110  an engine's figures come without an event
            await asyncio.sleep(0.005)


@pytest.fixture(scope="session")
def model_path(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The demo model's first layers: a model that speaks its tokens, if without sense."""
    directory = tmp_path_factory.mktemp("layers")
    for file in demo_model.iterdir():
        if not file.name.endswith(".safetensors"):
            shutil.copy(file, directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "num_hidden_layers": LAYERS}))
    with safe_open(demo_model / "model.safetensors", framework="np") as weights:
        kept = {name: weights.get_tensor(name) for name in filter(_is_kept, weights.keys())}
    save_file(kept, directory / "model.safetensors", metadata={"format": "pt"})
    return str(directory)


def _is_kept(name: str) -> bool:
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    return layer is None or int(layer[1]) < LAYERS


@pytest.fixture(scope="session")
def vllm_environment() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        patch.setenv("VLLM_NO_USAGE_STATS", "1")
        patch.setenv("VLLM_LOGGING_LEVEL", "WARNING")
        # Eager or not, vLLM compiles what ranks logprobs at their first use, for a quarter minute.
        patch.setenv("TORCH_COMPILE_DISABLE", "1")
        yield


@pytest.fixture(scope="session")
def vllm_clock() -> Clock:
    """How far the engine's clock is ahead of this machine's."""
    return Clock()


@pytest_asyncio.fixture(loop_scope="session", scope="session")
async def vllm_engine(
    model_path: str, vllm_environment: None, vllm_clock: Clock
) -> AsyncGenerator[VllmEngine]:
    def now() -> float:
        return time.monotonic() + vllm_clock()

    engine = await VllmEngine.launch(model_path, VLLM_ARGS, stall_s=STALL_S, clock=now)
    yield engine
    await engine.close()


@pytest_asyncio.fixture(loop_scope="session")
async def simulated_engine() -> AsyncGenerator[SimulatedEngine]:
    profile = {"decode_step_s": 0, "prefill_tokens_per_s": 0, "max_running": 16}
    profile["context_tokens"] = 2048
    engine = await SimulatedEngine.launch({"profile": dict(profile)}, stall_s=60)
    yield engine
    await engine.close()


@pytest.fixture(
    params=[
        pytest.param("simulated_engine", id="simulated"),
        pytest.param("vllm_engine", id="vllm", marks=VLLM_MARKS),
    ]
)
def engine(request: pytest.FixtureRequest) -> Sleeper:
    found: Sleeper = request.getfixturevalue(request.param)
    return found


@pytest.fixture
def asker(engine: TextEngine) -> Asker:
    return Asker(engine)


@pytest.fixture
def eos_id(engine: TextEngine) -> int:
    return Vocabulary.eos_id if isinstance(engine, SimulatedEngine) else 2


@pytest.fixture
def worker() -> RecordingWorker:
    return RecordingWorker()


@pytest_asyncio.fixture
async def links(worker: RecordingWorker) -> AsyncGenerator[GatewayLinks]:
    links = GatewayLinks(NAME, SECRET, worker)
    yield links
    await links.close()


@pytest_asyncio.fixture
async def gateway() -> AsyncGenerator[FakeGateway]:
    async with FakeGateway() as gateway:
        yield gateway

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing
from pathlib import Path

import pytest
import pytest_asyncio
import uvloop
from pydantic import JsonValue
from tests.engine.streams import streamed

from tera.engine.base import TextEngine
from tera.engine.simulated import SimulatedEngine
from tera.engine.simulated_vocabulary import Vocabulary
from tera.engine.turns import Sleeper
from tera.engine.vllm import VllmEngine
from tera.generation import Generation, Sampling, TokenDelta
from tera.local.demo_model import ensure_demo_model

MODELS_DIR = Path(__file__).parents[2] / ".tera" / "models"
VLLM_ARGS: dict[str, JsonValue] = {
    "enforce_eager": True,
    "dtype": "float32",
    "max_model_len": 2048,
    "max_num_seqs": 16,
    "served_model_name": "demo",
}

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
    if item.path.name in ("test_link.py", "test_runs.py"):
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
def model_path() -> str:
    model = ensure_demo_model("smollm2-135m-instruct", MODELS_DIR, "float32", lambda *_: None)
    return str(model)


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


@pytest_asyncio.fixture(loop_scope="session", scope="session")
async def vllm_engine(model_path: str, vllm_environment: None) -> AsyncGenerator[VllmEngine]:
    engine = await VllmEngine.launch(model_path, VLLM_ARGS, stall_s=60)
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

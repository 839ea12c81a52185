"""One platform of each kind for all folders' slow tests: starting one takes 40 seconds of CPU."""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

import hypothesis
import pytest
from tests.serve.conftest import SIMULATED_VALUES, VLLM_VALUES, Platform

from tera.local.demo_model import ensure_demo_model

DEMO_MODELS = Path(__file__).parents[1] / ".tera" / "models"

# xdist sets it for its workers, and a console that finds it when it is made keeps it for good.
os.environ.pop("COLUMNS", None)  # noqa: TID251  no process is configured by it

# How long an example takes says more of the machine's other work than of the code.
hypothesis.settings.register_profile("tera", deadline=None)
hypothesis.settings.load_profile("tera")


_SHARED = ("operated", "simulated", "behind_haproxy", "vllm", "_real")
"""The fixtures of shared platforms and of what is built on them, in the order of their turns."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let tests that share a platform come last and together: one platform is up at a time."""
    items.sort(key=_turn)


def _turn(item: pytest.Item) -> int:
    fixtures = set(getattr(item, "fixturenames", ()))
    callspec = getattr(item, "callspec", None)
    if callspec is not None:
        fixtures.update(value for value in callspec.params.values() if isinstance(value, str))
    return max((_SHARED.index(name) + 1 for name in fixtures.intersection(_SHARED)), default=0)


class Stage:
    """Where one shared platform runs, until another one takes its place."""

    def __init__(self) -> None:
        self._stack = ExitStack()

    def give_to(self, running: AbstractContextManager[Platform]) -> Platform:
        """End the platform that is up, and return the one that is up from now on."""
        self.clear()
        return self._stack.enter_context(running)

    def clear(self) -> None:
        """End the platform that is up, if any."""
        self._stack.close()


@pytest.fixture(scope="session")
def stage() -> Iterator[Stage]:
    """For one platform at a time: an idle one would take time from the tests of another."""
    stage = Stage()
    yield stage
    stage.clear()


@pytest.fixture(scope="session")
def operated(stage: Stage, tmp_path_factory: pytest.TempPathFactory) -> Platform:
    """One without models of its own: each module of tests applies the values that it needs."""
    home = tmp_path_factory.mktemp("operated") / "home"
    return stage.give_to(Platform.running(home, "models: {}\n"))


@pytest.fixture(scope="session")
def simulated(stage: Stage, tmp_path_factory: pytest.TempPathFactory) -> Platform:
    """Two simulated models: `sim/small` on two replicas, and `sim/slow`."""
    home = tmp_path_factory.mktemp("simulated") / "home"
    return stage.give_to(Platform.running(home, SIMULATED_VALUES))


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The demo model in float32, made once for all runs in this checkout."""
    return ensure_demo_model("smollm2-135m-instruct", DEMO_MODELS, "float32", lambda *_: None)


@pytest.fixture(scope="session")
def vllm(stage: Stage, demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Platform:
    """The demo model in float32, on one replica: greedy text does not depend on the batch."""
    home = tmp_path_factory.mktemp("vllm") / "home"
    home.mkdir()
    (home / "models").symlink_to(demo_model.parent)
    with pytest.MonkeyPatch.context() as patch:
        # Eager or not, vLLM compiles what ranks logprobs at their first use, for a quarter minute.
        patch.setenv("TORCH_COMPILE_DISABLE", "1")
        return stage.give_to(Platform.running(home, VLLM_VALUES))

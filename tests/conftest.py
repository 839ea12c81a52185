"""One platform of each kind for all folders' slow tests: starting one takes a minute."""

import os
from collections.abc import Iterator
from contextlib import ExitStack

import hypothesis
import pytest
from tests.serve.conftest import DEMO_MODELS, SIMULATED_VALUES, VLLM_VALUES, Platform

# xdist sets it for its workers, and a console that finds it when it is made keeps it for good.
os.environ.pop("COLUMNS", None)  # noqa: TID251  no process is configured by it

# How long an example takes says more of the machine's other work than of the code.
hypothesis.settings.register_profile("tera", deadline=None)
hypothesis.settings.load_profile("tera")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let tests that share a platform come last: nothing else is started beside it then."""
    items.sort(key=_shares_a_platform)


def _shares_a_platform(item: pytest.Item) -> bool:
    fixtures = set(getattr(item, "fixturenames", ()))
    callspec = getattr(item, "callspec", None)
    if callspec is not None:
        fixtures.update(value for value in callspec.params.values() if isinstance(value, str))
    return not fixtures.isdisjoint(("simulated", "behind_haproxy", "vllm", "_real"))


@pytest.fixture(scope="session")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    """Two simulated models: `sim/small` on two replicas, and `sim/slow`."""
    home = tmp_path_factory.mktemp("simulated") / "home"
    with Platform.running(home, SIMULATED_VALUES) as platform:
        yield platform


@pytest.fixture(scope="session")
def vllm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    """The demo model in float32, on one replica: greedy text does not depend on the batch."""
    home = tmp_path_factory.mktemp("vllm") / "home"
    home.mkdir()
    if DEMO_MODELS.exists():
        (home / "models").symlink_to(DEMO_MODELS)
    with ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:
            # Eager or not, vLLM compiles what ranks logprobs at their first use, for a quarter
            # minute.
            patch.setenv("TORCH_COMPILE_DISABLE", "1")
            platform = stack.enter_context(Platform.running(home, VLLM_VALUES))
        yield platform

"""The contract, rule by rule, against every gateway that a rule applies to."""

from collections.abc import Iterator

import pytest
from tests.conformance.gateways import Gateway, InProcessGateway, PlatformGateway
from tests.serve.conftest import Platform

from tera.engine.simulated_vocabulary import Vocabulary


@pytest.fixture(scope="session")
def _in_process() -> Iterator[InProcessGateway]:
    gateway = InProcessGateway()
    yield gateway
    gateway.close()


@pytest.fixture
def in_process(_in_process: InProcessGateway) -> Iterator[InProcessGateway]:
    """The gateway in this process, configured by default whatever the last test changed."""
    yield _in_process
    _in_process.config = _in_process.default_config


@pytest.fixture(scope="session")
def behind_haproxy(simulated: Platform) -> Iterator[PlatformGateway]:
    """A platform with simulated engines."""
    gateway = PlatformGateway(simulated, "sim/small", Vocabulary().size, 1_048_576)
    yield gateway
    gateway.close()


@pytest.fixture(scope="session")
def _real(vllm: Platform) -> Iterator[PlatformGateway]:
    gateway = PlatformGateway(vllm, "HuggingFaceTB/SmolLM2-135M-Instruct", 49152, 10 * 1024 * 1024)
    yield gateway
    gateway.close()


_IN_PROCESS = pytest.param("in_process", id="in-process")
_HAPROXY = pytest.param("behind_haproxy", id="haproxy", marks=pytest.mark.slow)
_VLLM = pytest.param("_real", id="vllm", marks=[pytest.mark.slow, pytest.mark.vllm])


@pytest.fixture(params=[_IN_PROCESS, _HAPROXY])
def gateway(request: pytest.FixtureRequest) -> Gateway:
    """Gateways of simulated engines."""
    found: Gateway = request.getfixturevalue(request.param)
    return found


@pytest.fixture(params=[_IN_PROCESS, _HAPROXY, _VLLM])
def text_gateway(request: pytest.FixtureRequest) -> Gateway:
    """Gateways of simulated engines and of a real one, for what depends on text."""
    found: Gateway = request.getfixturevalue(request.param)
    return found

from typing import Any

import pytest

from tera.config.gateway import GatewayConfig
from tera.config.limits import LARGEST_BUDGET, LARGEST_LIMIT, Limits, TenantLimits
from tera.config.model import ModelConfig
from tera.config.platform import PlatformConfig
from tera.config.section import Section
from tera.config.values_file import default_values_file, load_platform
from tera.errors import ConfigError


def default_model() -> ModelConfig:
    (model,) = load_platform(default_values_file()).models.values()
    return model


@pytest.mark.parametrize(
    "section",
    [
        pytest.param(PlatformConfig(), id="platform"),
        pytest.param(GatewayConfig(), id="gateway"),
        pytest.param(default_model(), id="model"),
        pytest.param(TenantLimits(weight=3, models={"m": Limits(token_budget=1)}), id="limits"),
    ],
)
def test_a_section_comes_back_from_its_file_form(section: Section) -> None:
    assert type(section).parse(section.file_form()) == section
    assert type(section).parse(section.file_form(exclude_none=True)) == section
    assert type(section).parse(section.file_form(exclude_defaults=True)) == section


@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("requestsPerMinute", LARGEST_LIMIT),
        ("tokensPerMinute", LARGEST_LIMIT),
        ("concurrentRequests", LARGEST_LIMIT),
        ("tokenBudget", LARGEST_BUDGET),
    ],
)
def test_a_limit_is_a_number_that_redis_counts_exactly(name: str, most: int) -> None:
    def values(number: int) -> dict[str, Any]:
        limits = {"tenants": {"acme": {"models": {"m": {name: number}}}}}
        model = {"id": "m", "engine": {"kind": "simulated"}}
        return {"models": {"m": model}, "gateway": {"limits": limits}}

    PlatformConfig.parse(values(most))
    with pytest.raises(ConfigError) as raised:
        PlatformConfig.parse(values(most + 1))
    assert raised.value.message == (
        f"gateway.limits.tenants.acme.models.m.{name}: "
        f"Input should be less than or equal to {most} (got {most + 1})"
    )

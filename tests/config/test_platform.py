# ruff: noqa: E501  a table reads best with a case a line
from typing import Any

import pytest
import yaml

from tera.config.platform import PlatformConfig
from tera.errors import ConfigError


def platform(**model: Any) -> dict[str, Any]:
    """Return values with one simulated model, changed as told."""
    return {"models": {"demo": {"id": "org/demo", "engine": {"kind": "simulated"}, **model}}}


def refused(values: Any) -> list[str]:
    with pytest.raises(ConfigError) as raised:
        PlatformConfig.parse(values)
    return raised.value.message.splitlines()


@pytest.mark.parametrize(
    ("values", "beginning"),
    [
        pytest.param(platform(replicas={"mni": 1}), "models.demo.replicas.mni: unknown", id="typo"),
        pytest.param({"model": {}}, "model: unknown key", id="unknown section"),
        pytest.param({"modelDefaults": {"x": 1}}, "modelDefaults.x: unknown", id="defaults"),
        pytest.param(
            platform(scaling={"max_ongoing_requests": 4}),
            "models.demo.scaling.max_ongoing_requests: unknown",
            id="snake case is Python's",
        ),
        pytest.param(platform(replicas={"min": "1"}), "models.demo.replicas.min: ", id="a string"),
        pytest.param(platform(replicas={"min": True}), "models.demo.replicas.min: ", id="a boolean"),
        pytest.param(platform(replicas={"min": 1.5}), "models.demo.replicas.min: ", id="a fraction"),
        pytest.param(platform(replicas={"min": -1}), "models.demo.replicas.min: ", id="negative"),
        pytest.param(
            platform(replicas={"min": 3, "max": 2}), "models.demo.replicas: min (3) is greater", id="order"
        ),
        pytest.param(platform(enabled="yes"), "models.demo.enabled: ", id="no boolean"),
        pytest.param(platform(id=""), "models.demo.id: ", id="empty id"),
        pytest.param(platform(aliases="default"), "models.demo.aliases: ", id="alias no list"),
        pytest.param(platform(aliases=[1]), "models.demo.aliases.0: ", id="alias no string"),
        pytest.param(platform(capabilities=["vision"]), "models.demo.capabilities.0: ", id="capability"),
        pytest.param(platform(engine={"kind": "vlm"}), "models.demo.engine.kind: ", id="engine"),
        pytest.param(platform(source="ftp://x"), "models.demo: source 'ftp://x'", id="scheme"),
        pytest.param(platform(source="hf://"), "models.demo: source 'hf://'", id="empty source"),
        pytest.param(platform(engine={"kind": "vllm"}), "models.demo: source is missing", id="source"),
        pytest.param({"models": {"demo": {"engine": {"kind": "simulated"}}}}, "models.demo.id: is missing", id="no id"),
        pytest.param({"models": {"Demo": {"id": "x"}}}, "models.Demo: ", id="name in capitals"),
        pytest.param({"models": {"a" * 41: {"id": "x"}}}, f"models.{'a' * 41}: ", id="long name"),
        pytest.param({"models": {"demo-": {"id": "x"}}}, "models.demo-: ", id="name ends in a dash"),
        pytest.param({"models": []}, "models: ", id="models no mapping"),
        pytest.param({"models": {"demo": None}}, "models.demo: ", id="model is null"),
        pytest.param([], "values: ", id="a list"),
        pytest.param("models", "values: ", id="a text"),
        pytest.param({"gateway": {"requests": {"retries": -1}}}, "gateway.requests.retries: ", id="retries"),
        pytest.param(
            {"gateway": {"requests": {"keepAliveSeconds": 15.5}}},
            "gateway.requests.keepAliveSeconds: ",
            id="keep-alive over the contract's 15 s",
        ),
        pytest.param({"redis": {"embedded": False}}, "redis: external.address is missing", id="no Redis"),
        pytest.param(
            {"redis": {"embedded": True, "external": {"address": "redis:6379"}}},
            "redis: external.address is set",
            id="two Redis",
        ),
    ],
)  # fmt: skip
def test_refusal_begins_with_the_path_of_the_value(values: Any, beginning: str) -> None:
    assert any(line.startswith(beginning) for line in refused(values))


@pytest.mark.parametrize(
    ("values", "line"),
    [
        pytest.param(
            {"models": {"qwen2.5": {"id": "Qwen/Qwen2.5", "engine": {"kind": "simulated"}}}},
            "models.qwen2.5: must be 1 to 40 lower-case letters, digits and hyphens, beginning with a letter; "
            "clients send the model's id or an alias, which may be any text (got 'qwen2.5')",
            id="a name with a dot",
        ),
        pytest.param(
            {"models": {"demo": None}},
            "models.demo: is null; give it entries, indented below it, or remove the key",
            id="null",
        ),
        pytest.param(
            platform(source="hf://org/demo", engine={"args": {"max_model_length": 2048}}),
            "models.demo.engine.args.max_model_length: vLLM has no such argument; max_model_len is nearest",
            id="a typo in an argument",
        ),
        pytest.param(
            {"redis": {"embedded": False, "external": {"address": "redis://redis:6379"}}},
            "redis.external.address: must be host:port, without a scheme, user or password (got 'redis://redis:6379')",
            id="a URL for an address",
        ),
    ],
)  # fmt: skip
def test_refusal_says_what_would_be_right(values: Any, line: str) -> None:
    assert refused(values) == [line]


def test_a_simulated_models_arguments_are_not_vllms() -> None:
    PlatformConfig.parse(platform(engine={"kind": "simulated", "args": {"profile": {}}}))


def test_all_faults_are_told_at_once() -> None:
    lines = refused({**platform(replicas={"mni": 1}, id=""), "gatway": {}})
    assert {line.split(":")[0] for line in lines} == {
        "models.demo.replicas.mni",
        "models.demo.id",
        "gatway",
    }


@pytest.mark.parametrize(
    ("first", "second"),
    [
        pytest.param({"id": "x"}, {"id": "x"}, id="two ids"),
        pytest.param({"id": "x"}, {"id": "y", "aliases": ["x"]}, id="id and alias"),
        pytest.param(
            {"id": "x", "aliases": ["z"]}, {"id": "y", "aliases": ["z"]}, id="two aliases"
        ),
    ],
)
def test_two_models_cannot_answer_to_one_name(
    first: dict[str, Any], second: dict[str, Any]
) -> None:
    engine = {"engine": {"kind": "simulated"}}
    lines = refused({"models": {"one": {**first, **engine}, "two": {**second, **engine}}})
    assert len(lines) == 1
    assert "models.one" in lines[0]
    assert "models.two" in lines[0]


def test_names_are_case_sensitive() -> None:
    engine = {"engine": {"kind": "simulated"}}
    PlatformConfig.parse({"models": {"one": {"id": "X", **engine}, "two": {"id": "x", **engine}}})


class TestModelDefaults:
    def merged(self, defaults: dict[str, Any], **model: Any) -> Any:
        return PlatformConfig.parse({"modelDefaults": defaults, **platform(**model)}).models["demo"]

    def test_model_that_says_nothing_inherits(self) -> None:
        model = self.merged({"replicas": {"min": 2, "max": 3}, "enabled": False})
        assert (model.replicas.min, model.replicas.max, model.enabled) == (2, 3, False)

    def test_model_overrides_key_by_key(self) -> None:
        defaults = {"scaling": {"maxOngoingRequests": 8, "maxQueuedRequests": 9}}
        model = self.merged(defaults, scaling={"maxQueuedRequests": 10})
        assert model.scaling.max_ongoing_requests == 8
        assert model.scaling.max_queued_requests == 10

    def test_merged_bounds_are_checked_and_named(self) -> None:
        values = {"modelDefaults": {"replicas": {"max": 3}}, **platform(replicas={"min": 4})}
        assert refused(values)[0].startswith(
            "models.demo.replicas: min (4) is greater than max (3)"
        )

    def test_a_fault_of_the_defaults_names_the_defaults(self) -> None:
        lines = refused({"modelDefaults": {"parallelism": {"tensor": 0}}, **platform()})
        assert any(line.startswith("modelDefaults.parallelism.tensor: ") for line in lines)

    def test_parsing_changes_no_input(self) -> None:
        values = {"modelDefaults": {"scaling": {"maxOngoingRequests": 8}}, **platform()}
        before = yaml.safe_dump(values)
        PlatformConfig.parse(values)
        assert yaml.safe_dump(values) == before


def test_disabled_and_replicaless_models_are_not_deployed() -> None:
    engine = {"engine": {"kind": "simulated"}}
    models = {
        "off": {"id": "a", "enabled": False, **engine},
        "none": {"id": "b", "replicas": {"min": 0, "max": 0}, **engine},
        "idle": {"id": "c", "replicas": {"min": 0, "max": 1}, **engine},
        "on": {"id": "d", **engine},
    }
    assert list(PlatformConfig.parse({"models": models}).deployed_models()) == ["idle", "on"]


def test_platform_is_immutable() -> None:
    with pytest.raises(ValueError, match="frozen"):
        PlatformConfig().models = {}

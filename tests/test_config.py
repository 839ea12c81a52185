# ruff: noqa: E501  a table reads best with a case a line
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml

from tera.config import (
    KeyEntry,
    Limits,
    PlatformConfig,
    Runtime,
    ServeOptions,
    default_values_file,
    load_keys_file,
    load_platform,
    model_directory,
    parse_platform,
    revision_args,
    set_environment,
)
from tera.errors import ConfigError


def platform(**model: Any) -> dict[str, Any]:
    """Return values with one simulated model, changed as told."""
    return {"models": {"demo": {"id": "org/demo", "engine": {"kind": "simulated"}, **model}}}


def refused(values: Any) -> list[str]:
    with pytest.raises(ConfigError) as raised:
        parse_platform(values)
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
            platform(replicas={"min": 3, "max": 2}), "models.demo.replicas: min (3) is over", id="order"
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
    parse_platform({"models": {"one": {"id": "X", **engine}, "two": {"id": "x", **engine}}})


class TestModelDefaults:
    def merged(self, defaults: dict[str, Any], **model: Any) -> Any:
        return parse_platform({"modelDefaults": defaults, **platform(**model)}).models["demo"]

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
        assert refused(values)[0].startswith("models.demo.replicas: min (4) is over max (3)")

    def test_a_fault_of_the_defaults_names_the_defaults(self) -> None:
        lines = refused({"modelDefaults": {"parallelism": {"tensor": 0}}, **platform()})
        assert any(line.startswith("modelDefaults.parallelism.tensor: ") for line in lines)

    def test_parsing_changes_no_input(self) -> None:
        values = {"modelDefaults": {"scaling": {"maxOngoingRequests": 8}}, **platform()}
        before = yaml.safe_dump(values)
        parse_platform(values)
        assert yaml.safe_dump(values) == before


def test_disabled_and_replicaless_models_are_not_deployed() -> None:
    engine = {"engine": {"kind": "simulated"}}
    models = {
        "off": {"id": "a", "enabled": False, **engine},
        "none": {"id": "b", "replicas": {"min": 0, "max": 0}, **engine},
        "idle": {"id": "c", "replicas": {"min": 0, "max": 1}, **engine},
        "on": {"id": "d", **engine},
    }
    assert list(parse_platform({"models": models}).deployed_models()) == ["idle", "on"]


def test_platform_is_immutable() -> None:
    with pytest.raises(ValueError, match="frozen"):
        PlatformConfig().models = {}  # type: ignore[misc]


class TestFile:
    def load(self, directory: Path, text: str | bytes) -> PlatformConfig:
        path = directory / "values.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return load_platform(path)

    def test_empty_file_is_the_default_platform(self, tmp_path: Path) -> None:
        assert self.load(tmp_path, "# nothing\n") == PlatformConfig()

    @pytest.mark.parametrize(
        ("text", "complaint"),
        [
            pytest.param("redis: {}\nredis: {}\n", "'redis' is written twice", id="top"),
            pytest.param(
                "gateway:\n  replicas:\n    min: 1\n    min: 2\n",
                "'min' is written twice",
                id="nested",
            ),
            pytest.param(
                "redis: {embedded: true, embedded: false}", "written twice", id="in one line"
            ),
            pytest.param("models: [", "no valid YAML", id="syntax"),
            pytest.param("a: !!python/object:os.system {}", "no valid YAML", id="code"),
            pytest.param(b"\xff\xfe\xff", "cannot be read", id="not UTF-8"),
        ],
    )
    def test_text_that_could_be_misread_is_refused(
        self, tmp_path: Path, text: str | bytes, complaint: str
    ) -> None:
        with pytest.raises(ConfigError, match=complaint) as raised:
            self.load(tmp_path, text)
        assert "values.yaml" in raised.value.message

    def test_missing_file_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"absent\.yaml: cannot be read"):
            load_platform(tmp_path / "absent.yaml")

    def test_later_files_go_over_earlier_ones_as_helm_merges_them(self, tmp_path: Path) -> None:
        texts = [
            "gateway: {cors: {origins: [a, b]}, requests: {retries: 1, keepAliveSeconds: 5}}",
            "# nothing",
            "gateway: {cors: {origins: [c]}, requests: {retries: 3}}",
        ]
        paths = [tmp_path / f"{number}.yaml" for number in range(len(texts))]
        for path, text in zip(paths, texts, strict=True):
            path.write_text(text)
        gateway = load_platform(*paths).gateway
        assert gateway.cors.origins == ("c",)
        assert (gateway.requests.retries, gateway.requests.keep_alive_seconds) == (3, 5)
        assert load_platform(*reversed(paths)).gateway.cors.origins == ("a", "b")

    def test_file_that_is_no_map_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"values\.yaml: values: must be a map"):
            self.load(tmp_path, "- models")

    def test_default_values_load(self) -> None:
        platform = load_platform(default_values_file())
        assert len(platform.deployed_models()) == 1


class TestKeysFile:
    def load(self, directory: Path, text: str) -> tuple[KeyEntry, ...]:
        path = directory / "keys.yaml"
        path.write_text(text)
        return load_keys_file(path)

    def test_all_that_can_be_said_of_a_key(self, tmp_path: Path) -> None:
        entries = self.load(
            tmp_path,
            """
            - tenant: acme
              key: sk-tera-one
              models: [org/demo]
              expires: 2027-01-31
              limits: {requestsPerMinute: 60, tokenBudget: 1000, budgetPeriod: day}
            - {tenant: beta, keyHash: abc}
            """,
        )
        assert entries == (
            KeyEntry(
                tenant="acme",
                key="sk-tera-one",
                models=("org/demo",),
                expires=datetime(2027, 1, 31, tzinfo=UTC),
                limits=Limits(requests_per_minute=60, token_budget=1000, budget_period="day"),
            ),
            KeyEntry(tenant="beta", key_hash="abc"),
        )

    @pytest.mark.parametrize("text", ["", "# nothing", "[]"])
    def test_an_empty_file_has_no_keys(self, tmp_path: Path, text: str) -> None:
        assert self.load(tmp_path, text) == ()

    @pytest.mark.parametrize(
        ("written", "hour"),
        [
            pytest.param("2027-01-31", 0, id="date"),
            pytest.param("2027-01-31T12:00:00Z", 12, id="UTC"),
            pytest.param("2027-01-31T12:00:00+02:00", 10, id="another zone"),
            pytest.param("2027-01-31 12:00:00", 12, id="no zone is UTC"),
            pytest.param("'2027-01-31T12:00:00Z'", 12, id="text"),
        ],
    )
    def test_a_moment_is_in_utc_unless_it_says_otherwise(
        self, tmp_path: Path, written: str, hour: int
    ) -> None:
        (entry,) = self.load(tmp_path, f"[{{tenant: a, key: k, expires: {written}}}]")
        assert entry.expires == datetime(2027, 1, 31, hour, tzinfo=UTC)

    @pytest.mark.parametrize(
        ("text", "fault"),
        [
            pytest.param("[{key: SECRET}]", "0.tenant: is missing", id="no tenant"),
            pytest.param("[{tenant: A, key: SECRET}]", "0.tenant: ", id="tenant"),
            pytest.param("[{tenant: a}]", "0: give one of key and keyHash", id="no key"),
            pytest.param("[{tenant: a, key: SECRET, keyHash: b}]", "0: give one of", id="both"),
            pytest.param("[{tenant: a, key: [SECRET]}]", "0.key: ", id="key no text"),
            pytest.param("[{tenant: a, SECRET: b, key: c}]", "0.SECRET: unknown", id="unknown"),
            pytest.param("[{tenant: a, key_hash: SECRET}]", "0.key_hash: unknown", id="snake case"),
            pytest.param("[{tenant: a, key: SECRET, expires: soon}]", "0.expires: give a", id="soon"),
            pytest.param("[{tenant: a, key: SECRET, expires: 3}]", "0.expires: ", id="a number"),
            pytest.param("[{tenant: a, key: SECRET, limits: {tokenBudget: '3'}}]", "0.limits.tokenBudget: ", id="text"),
            pytest.param("[{tenant: a, key: b, models: SECRET}]", "0.models: ", id="models no list"),
            pytest.param(
                "[{tenant: a, key: SECRET, limits: {requestsPerMinute: -1}}]",
                "0.limits.requestsPerMinute: ",
                id="negative limit",
            ),
            pytest.param(
                "[{tenant: a, key: SECRET}, {tenant: b, key: SECRET}]", "1: the same key as 0", id="twice"
            ),
            pytest.param("{tenant: a, key: SECRET}", "values: ", id="no list"),
            pytest.param("- tenant: a\n  key: 'SECRET", "no valid YAML in line 2", id="syntax"),
            pytest.param("[{SECRET: a, SECRET: b}]", "no valid YAML in line 1", id="key twice"),
        ],
    )  # fmt: skip
    def test_a_fault_has_its_path_and_shows_no_key(
        self, tmp_path: Path, text: str, fault: str
    ) -> None:
        with pytest.raises(ConfigError) as raised:
            self.load(tmp_path, text)
        assert raised.value.message.startswith(f"{tmp_path / 'keys.yaml'}: {fault}")
        assert "SECRET" not in raised.value.message or "SECRET" in fault

    def test_a_missing_file_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"absent\.yaml: cannot be read"):
            load_keys_file(tmp_path / "absent.yaml")


def test_model_directory(tmp_path: Path) -> None:
    def directory(source: str, **args: Any) -> str:
        values = platform(source=source, engine={"kind": "vllm", "args": args})
        return model_directory(parse_platform(values).models["demo"], tmp_path)

    assert directory("hf://org/name") == "org/name"
    assert directory("hf://org/name@v1") == "org/name"
    assert directory("s3://bucket/model") == "s3://bucket/model"
    assert directory("file:///models/x") == "/models/x"
    assert directory("demo://tiny", dtype="float32") == str(tmp_path / "models/tiny-float32")


def test_a_sources_revision_is_told_to_vllm() -> None:
    assert revision_args("hf://org/name@v1") == {"revision": "v1", "tokenizer_revision": "v1"}
    assert revision_args("hf://org/name") == revision_args("file:///a@b") == {}


def test_runtime_comes_back_from_the_environment_it_made(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    runtime = Runtime(
        redis_url="redis://elsewhere:1/0",
        key_pepper="pepper",
        cluster_secret="secret",  # noqa: S106  no real one
        channel_host="10.0.0.1",
        keys_file=tmp_path / "keys.yaml",
        home=tmp_path,
    )
    for name, value in runtime.to_environment().items():
        monkeypatch.setenv(name, value)
    assert Runtime.from_environment() == runtime


def test_set_environment_can_keep_what_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERA_HOST", "first")
    set_environment({"TERA_HOST": "second"}, keep_existing=True)
    assert ServeOptions.from_environment().host == "first"
    set_environment({"TERA_HOST": "second"})
    assert ServeOptions.from_environment().host == "second"


@pytest.mark.parametrize("port", ["0", "65536", "-1", "http", "", "8000 "])
def test_port_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, port: str) -> None:
    monkeypatch.setenv("TERA_PORT", port)
    with pytest.raises(ConfigError, match="TERA_PORT"):
        ServeOptions.from_environment()

from pathlib import Path

import pytest

from tera.config.environment import ClientOptions, Runtime, ServeOptions, set_environment
from tera.errors import ConfigError


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


def test_runtime_of_an_empty_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in Runtime().to_environment():
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    runtime = Runtime.from_environment()
    assert (runtime.keys_file, runtime.home) == (None, tmp_path / ".tera")
    assert runtime.key_pepper == runtime.cluster_secret == ""


def test_an_empty_keys_file_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERA_KEYS_FILE", "")
    assert Runtime.from_environment().keys_file is None


def test_variables_are_case_sensitive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TERA_HOST", raising=False)
    monkeypatch.setenv("tera_host", "10.0.0.1")
    assert ServeOptions.from_environment().host == "127.0.0.1"


def test_secrets_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERA_KEY_PEPPER", "SECRET")
    monkeypatch.setenv("TERA_CLUSTER_SECRET", "SECRET")
    monkeypatch.setenv("TERA_BASE_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("TERA_API_KEY", "SECRET")
    assert "SECRET" not in repr((Runtime.from_environment(), ClientOptions.from_environment()))


class TestClient:
    @pytest.fixture(autouse=True)
    def nothing_is_set(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("TERA_BASE_URL", "")
        monkeypatch.setenv("TERA_API_KEY", "")
        monkeypatch.setenv("TERA_HOME", str(tmp_path))

    @pytest.fixture
    def platform(self, tmp_path: Path) -> None:
        """What `tera serve` leaves."""
        text = "TERA_BASE_URL=http://here:1\nTERA_API_KEY=sk-here\nTERA_MODEL=m\n"
        (tmp_path / "local.env").write_text(text)

    @pytest.mark.usefixtures("platform")
    def test_the_platform_that_runs_here_is_asked(self) -> None:
        found = ClientOptions.from_environment()
        assert (found.base_url, found.api_key) == ("http://here:1", "sk-here")

    @pytest.mark.usefixtures("platform")
    def test_its_key_is_for_no_other_address(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert ClientOptions.from_environment("http://there:1").api_key == ""
        monkeypatch.setenv("TERA_BASE_URL", "http://there:1")
        assert ClientOptions.from_environment().api_key == ""

    @pytest.mark.usefixtures("platform")
    def test_another_key_may_be_given_for_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TERA_API_KEY", " sk-other\n")
        assert ClientOptions.from_environment().api_key == "sk-other"

    def test_an_argument_goes_before_the_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TERA_BASE_URL", "http://there:1")
        assert ClientOptions.from_environment("http://given:1/v1/").base_url == "http://given:1"

    def test_nobody_is_asked_without_an_address(self) -> None:
        with pytest.raises(ConfigError, match="TERA_BASE_URL is not set"):
            ClientOptions.from_environment()

    def test_a_key_that_cannot_be_sent_is_not_repeated(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("TERA_API_KEY", "sk-SECRET\nx: y")
        with pytest.raises(ConfigError) as raised:
            ClientOptions.from_environment("http://there:1")
        assert raised.value.message == "TERA_API_KEY: is not a valid key"

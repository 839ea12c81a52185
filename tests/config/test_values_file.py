from pathlib import Path

import pytest

from tera.config.platform import PlatformConfig
from tera.config.values_file import default_values_file, load_platform
from tera.errors import ConfigError


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
            pytest.param("redis: {}\nredis: {}\n", "duplicate key 'redis'", id="top"),
            pytest.param(
                "gateway:\n  replicas:\n    min: 1\n    min: 2\n",
                "duplicate key 'min'",
                id="nested",
            ),
            pytest.param(
                "redis: {embedded: true, embedded: false}", "duplicate key", id="in one line"
            ),
            pytest.param("models: [", "invalid YAML", id="syntax"),
            pytest.param("a: !!python/object:os.system {}", "invalid YAML", id="code"),
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

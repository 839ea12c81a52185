# ruff: noqa: E501  a table reads best with a case a line
from datetime import UTC, datetime
from pathlib import Path

import pytest

from tera.config.keys_file import KeyEntry, load_keys_file
from tera.config.limits import Limits
from tera.errors import ConfigError


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
            pytest.param("[{tenant: a}]", "0: give either key or keyHash", id="no key"),
            pytest.param("[{tenant: a, key: SECRET, keyHash: b}]", "0: give either", id="both"),
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
            pytest.param("- tenant: a\n  key: 'SECRET", "invalid YAML in line 2", id="syntax"),
            pytest.param("[{SECRET: a, SECRET: b}]", "invalid YAML in line 1", id="key twice"),
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

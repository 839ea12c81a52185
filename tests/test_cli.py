# ruff: noqa: E501  a table reads best with a case a line
"""The commands that need a Redis and no platform."""

import asyncio
import csv
import json
import os
import pty
import socket
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from subprocess import Popen
from typing import Any

import pytest
from redis import Redis
from tests.tenancy.conftest import RedisServer
from tests.tenancy.test_usage import append, record
from typer.testing import CliRunner, Result

from tera.cli import app
from tera.config.platform import PlatformConfig
from tera.local.processes import ProcessId
from tera.local.state import LocalSecrets, LocalState
from tera.tenancy.redis import connect
from tera.tenancy.usage import UsageRecord
from tera.tenancy.usage_export import LOCK, read_export

TERA = Path(sys.executable).with_name("tera")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    server.start()
    try:
        yield server
    finally:
        server.kill()


@pytest.fixture(autouse=True)
def redis(server: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Redis]:
    """Give each test an empty Redis, named by the environment."""
    monkeypatch.setenv("TERA_REDIS_URL", server.url)
    monkeypatch.setenv("TERA_KEY_PEPPER", "test-pepper")
    monkeypatch.setenv("TERA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "200")
    with Redis.from_url(server.url) as client:
        client.flushall()
        yield client


def state_of(home: Path, redis_url: str, platform: PlatformConfig) -> LocalState:
    """Return what this process would leave if it were a platform."""
    return LocalState(
        process=ProcessId.current(),
        base_url="http://127.0.0.1:1",
        ray_address="",
        status_socket=home / "status.sock",
        redis_url=redis_url,
        redis_pid=None,
        platform=platform,
    )


def tera(*arguments: str, code: int = 0) -> Result:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == code, (result.output, result.exception)
    return result


def answer(*arguments: str) -> Any:
    return json.loads(tera(*arguments, "--json").stdout)


def ledger_of(server: RedisServer, *records: UsageRecord) -> None:
    async def write() -> None:
        redis = connect(server.url, timeout_s=5)
        await append(redis, *records)
        await redis.aclose()

    asyncio.run(write())


class TestKeys:
    def test_a_key_has_the_limits_that_it_is_made_with(self) -> None:
        made = answer(
            *("keys", "create", "--tenant", "acme", "--requests-per-minute", "60"),
            *("--tokens-per-minute", "1000", "--concurrent-requests", "0"),
            *("--token-budget", "5000", "--budget-period", "day", "--models", "a,b"),
        )
        assert made.keys() == {"key", "key_id", "tenant"}
        (row,) = answer("keys", "list")
        assert (row["key_id"], row["models"], row["replaced_by"]) == (
            *(made["key_id"], ["a", "b"]),
            None,
        )
        assert row["limits"] == {
            "requestsPerMinute": 60,
            "tokensPerMinute": 1000,
            "concurrentRequests": 0,
            "tokenBudget": 5000,
            "budgetPeriod": "day",
        }
        table = tera("keys", "list").stdout
        assert "60 requests/min, 1,000 tokens/min, 0 concurrent, 5,000 a day" in table
        assert made["key_id"] in table
        assert made["key"] not in table

    def test_keys_of_one_tenant_are_listed(self) -> None:
        for tenant in ("acme", "beta"):
            answer("keys", "create", "--tenant", tenant)
        assert [row["tenant"] for row in answer("keys", "list", "--tenant", "acme")] == ["acme"]
        assert "beta" not in tera("keys", "list", "--tenant", "acme").stdout
        assert len(answer("keys", "list")) == 2

    def test_a_table_on_a_narrow_terminal_has_whole_ids(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("COLUMNS", "80")
        made = answer("keys", "create", "--tenant", "acme")
        assert made["key_id"] in tera("keys", "list").stdout

    def test_rotating_makes_another_key_and_ends_the_first(self) -> None:
        old = answer("keys", "create", "--tenant", "acme", "--requests-per-minute", "5")
        new = answer("keys", "rotate", old["key_id"], "--grace", "1h")
        assert new.keys() == {"key", "key_id", "tenant", "old_key_id", "old_expires"}
        assert (new["tenant"], new["old_key_id"]) == ("acme", old["key_id"])
        assert new["old_expires"] == pytest.approx(time.time() + 3600, abs=60)
        rows = {row["key_id"]: row for row in answer("keys", "list")}
        assert rows[old["key_id"]]["expires"] == new["old_expires"]
        assert rows[old["key_id"]]["replaced_by"] == new["key_id"]
        assert rows[new["key_id"]]["limits"] == {"requestsPerMinute": 5}
        again = tera("keys", "rotate", old["key_id"], code=2)
        assert new["key_id"] in again.stderr

    @pytest.mark.parametrize("grace", ["0", "0s"])
    def test_rotating_without_grace_ends_the_first_at_once(self, grace: str) -> None:
        old = answer("keys", "create", "--tenant", "acme")
        done = tera("keys", "rotate", old["key_id"], "--grace", grace)
        assert done.stdout.startswith("sk-tera-")
        assert "is revoked" in done.stderr
        assert [row["key_id"] for row in answer("keys", "list")] != [old["key_id"]]

    def test_revoking_does_not_ask_where_nobody_can_answer(self) -> None:
        made = answer("keys", "create", "--tenant", "acme")
        tera("keys", "revoke", made["key_id"])
        assert answer("keys", "list") == []
        assert made["key_id"] in tera("keys", "revoke", made["key_id"], code=1).stderr

    @pytest.mark.parametrize(
        ("options", "typed", "code", "left"),
        [
            pytest.param([], b"n\n", 1, 1, id="no"),
            pytest.param([], b"y\n", 0, 0, id="yes"),
            pytest.param(["--yes"], b"", 0, 0, id="told"),
        ],
    )
    def test_revoking_asks_on_a_terminal(
        self, options: list[str], typed: bytes, code: int, left: int
    ) -> None:
        made = answer("keys", "create", "--tenant", "acme")
        keyboard, terminal = pty.openpty()
        try:
            arguments = [str(TERA), "keys", "revoke", made["key_id"], *options]
            with Popen(arguments, stdin=terminal, stdout=terminal, stderr=terminal) as process:  # noqa: S603  our own program
                os.write(keyboard, typed)
                assert process.wait(timeout=30) == code
        finally:
            os.close(keyboard)
            os.close(terminal)
        assert len(answer("keys", "list")) == left


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        pytest.param(["keys", "create", "--tenant", "a", "--requests-per-minute", "-1"], "requests-per-minute", id="negative"),
        pytest.param(["keys", "create", "--tenant", "a", "--token-budget", "-1"], "token-budget", id="negative budget"),
        pytest.param(["keys", "create", "--tenant", "a", "--tokens-per-minute", "1.5"], "tokens-per-minute", id="fraction"),
        pytest.param(["keys", "create", "--tenant", "a", "--budget-period", "week", "--token-budget", "1"], "budget-period", id="period"),
        pytest.param(["keys", "create", "--tenant", "a", "--budget-period", "day"], "--token-budget", id="period alone"),
        pytest.param(["keys", "create", "--tenant", "No Name"], "tenant's name", id="tenant"),
        pytest.param(["keys", "create", "--tenant", "a", "--expires", "-3d"], "--expires", id="negative lifetime"),
        pytest.param(["keys", "create", "--tenant", "a", "--expires", "0d"], "positive", id="no lifetime"),
        pytest.param(["keys", "rotate", "key_1", "--grace", "-1h"], "--grace", id="negative grace"),
        pytest.param(["tenants", "set", "a"], "at least one limit", id="nothing to set"),
        pytest.param(["tenants", "set", "a", "--requests-per-minute", "-1"], "--requests-per-minute", id="negative of a tenant"),
        pytest.param(["tenants", "set", "a", "--tokens-per-minute", "many"], "--tokens-per-minute", id="no number"),
        pytest.param(["tenants", "set", "a", "--tokens-per-minute", "²"], "--tokens-per-minute", id="no digit"),
        pytest.param(["tenants", "set", "a", "--weight", "0"], "weight", id="no weight"),
        pytest.param(["tenants", "set", "a", "--weight", "2", "--model", "m"], "--weight", id="weight of a model"),
        pytest.param(["tenants", "set", "a", "--budget-period", "week"], "budget-period", id="period of a tenant"),
        pytest.param(["tenants", "set", "No Name", "--token-budget", "1"], "tenant's name", id="tenant to set"),
        pytest.param(["tenants", "set", "a", "--model", "org/name", "--token-budget", "1"], "models.org/name", id="model"),
        pytest.param(["tenants", "show", "No Name"], "tenant's name", id="tenant to show"),
        pytest.param(["tenants", "show", "a", "-f", "absent.yaml"], "absent.yaml", id="no values file"),
        pytest.param(["usage", "--since", "-1h"], "--since", id="negative time"),
        pytest.param(["usage", "--since", "yesterday"], "--since", id="no time"),
        pytest.param(["usage", "--json", "--csv"], "not both", id="two forms"),
        pytest.param(["usage", "export"], "--directory", id="no directory"),
        pytest.param(["usage", "export", "--directory", "x", "--retention-days", "0"], "retention-days", id="no retention"),
    ],
)  # fmt: skip
def test_wrong_usage_is_told(arguments: list[str], complaint: str, redis: Redis) -> None:
    assert complaint in tera(*arguments, code=2).stderr
    assert redis.keys("*") == []


class TestTenants:
    def test_limits_are_set_one_by_one_and_removed_by_none(self) -> None:
        tera("tenants", "set", "acme", "--requests-per-minute", "60", "--token-budget", "5")
        tera("tenants", "set", "acme", "--weight", "3")
        tera("tenants", "set", "acme", "--weight", "none")
        tera("tenants", "set", "acme", "--model", "llama-8b", "--tokens-per-minute", "0")
        done = answer("tenants", "set", "acme", "--requests-per-minute", "none")
        expected = {"tokenBudget": 5, "models": {"llama-8b": {"tokensPerMinute": 0}}}
        assert done == {"tenant": "acme", "stored": expected}
        assert answer("tenants", "list") == [done]
        tera("tenants", "set", "acme", "--model", "llama-8b", "--tokens-per-minute", "none")
        assert answer("tenants", "list") == [{"tenant": "acme", "stored": {"tokenBudget": 5}}]

    def test_tables_are_for_people(self) -> None:
        tera("tenants", "set", "acme", "--requests-per-minute", "6000")
        tera("tenants", "set", "acme", "--model", "llama-8b", "--token-budget", "50000")
        table = tera("tenants", "list").stdout
        assert "6,000" in table
        assert "llama-8b" in table
        assert "50,000 a month" in table

    def test_removing_leaves_nothing(self, redis: Redis) -> None:
        tera("tenants", "set", "acme", "--requests-per-minute", "60")
        tera("tenants", "remove", "acme")
        assert answer("tenants", "list") == []
        assert "acme" in tera("tenants", "remove", "acme", code=1).stderr

    def test_what_is_in_force_is_shown_with_where_it_is_from(self, tmp_path: Path) -> None:
        file = tmp_path / "values.yaml"
        file.write_text("""
gateway:
  limits:
    default: {requestsPerMinute: 1, tokensPerMinute: 1, concurrentRequests: 1}
    tenants: {acme: {requestsPerMinute: 2, tokensPerMinute: 2}}
""")
        tera("tenants", "set", "acme", "--requests-per-minute", "3")
        shown = answer("tenants", "show", "acme", "-f", str(file))
        assert shown == {
            "tenant": "acme",
            "stored": {"requestsPerMinute": 3},
            "values": {"requestsPerMinute": 2, "tokensPerMinute": 2},
            "default": {"requestsPerMinute": 1, "tokensPerMinute": 1, "concurrentRequests": 1},
            "effective": {"requestsPerMinute": 3, "tokensPerMinute": 2, "concurrentRequests": 1},
        }
        table = tera("tenants", "show", "acme", "-f", str(file)).stdout
        assert [row for row in ("set here", "values", "default", "in force") if row in table] == [
            *("set here", "values", "default", "in force")
        ]

    def test_without_values_only_what_is_set_is_shown(self) -> None:
        shown = answer("tenants", "show", "acme")
        assert shown["effective"] is None
        assert shown["stored"] is None
        assert "-f" in tera("tenants", "show", "acme").stderr

    def test_the_values_are_those_of_the_platform_that_runs_here(
        self, server: RedisServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        home = tmp_path / "home"
        home.mkdir()
        LocalSecrets.of(home)
        platform = PlatformConfig.parse(
            {"gateway": {"limits": {"default": {"requestsPerMinute": 7}}}}
        )
        state_of(home, server.url, platform).write(home)
        monkeypatch.delenv("TERA_KEY_PEPPER")
        monkeypatch.delenv("TERA_REDIS_URL")
        assert answer("tenants", "show", "acme")["effective"] == {"requestsPerMinute": 7}


class TestStatus:
    @pytest.mark.parametrize("told", [None, b"", b'{"models": ['], ids=["no", "empty", "half"])
    def test_a_platform_that_does_not_answer_is_said_in_one_line(
        self, tmp_path: Path, server: RedisServer, told: bytes | None
    ) -> None:
        home = tmp_path / "home"
        home.mkdir()
        state_of(home, server.url, PlatformConfig()).write(home)
        with ExitStack() as stack:
            if told is not None:
                listening = stack.enter_context(socket.socket(socket.AF_UNIX))
                listening.bind(str(home / "status.sock"))
                listening.listen()

                def tell() -> None:
                    with listening.accept()[0] as asking:
                        asking.sendall(told)

                stack.enter_context(ThreadPoolExecutor()).submit(tell)
            failed = tera("status", code=1)
        assert failed.stderr == "error: The platform at http://127.0.0.1:1 does not answer.\n"


class TestUsage:
    @pytest.fixture(autouse=True)
    def ledger(self, server: RedisServer, redis: Redis) -> None:
        now_s = time.time()
        ledger_of(
            server,
            record("r1", now_s - 40 * 86400),
            record("r2", now_s - 3 * 86400, status="failed"),
            record("r3", now_s - 5, prompt_tokens=1_000_000, cached_tokens=7),
            record("r4", now_s - 5, tenant="beta", model="other", status="lost"),
            record("r3", now_s - 5, prompt_tokens=2_000_000, cached_tokens=7),
        )

    def test_sums_are_of_the_last_day_unless_said(self) -> None:
        rows = answer("usage")
        assert [(row["tenant"], row["model"], row["prompt_tokens"]) for row in rows] == [
            ("acme", "llama-8b", 2_000_000),
            ("beta", "other", 10),
        ]
        assert rows[0].keys() == {
            *("tenant", "model", "day", "requests", "prompt_tokens", "cached_tokens"),
            *("completion_tokens", "failed", "cancelled", "lost"),
        }
        assert sum(row["requests"] for row in answer("usage", "--since", "30d")) == 3
        assert [row["tenant"] for row in answer("usage", "--tenant", "beta")] == ["beta"]

    def test_csv_has_the_same(self) -> None:
        done = tera("usage", "--since", "30d", "--csv").stdout
        rows = list(csv.DictReader(done.splitlines()))
        assert [{**row} for row in rows] == [
            {name: str(value) for name, value in row.items()}
            for row in answer("usage", "--since", "30d")
        ]

    def test_the_table_ends_with_totals(self) -> None:
        last = tera("usage", "--since", "30d").stdout.splitlines()[-2]
        cells = [cell.strip() for cell in last.strip("│").split("│")]
        assert cells == ["total", "", "", "3", "2,000,020", "7", "15", "1", "0", "1"]

    def test_an_export_by_hand_is_one_pass(self, redis: Redis, tmp_path: Path) -> None:
        directory = tmp_path / "usage"
        done = tera("usage", "export", "--directory", str(directory))
        assert "5 entries" in done.stdout
        assert sorted(one.request_id for one in read_export(directory)) == ["r1", "r2", "r3", "r4"]
        assert "0 entries" in tera("usage", "export", "--directory", str(directory)).stdout
        assert len(answer("usage", "--since", "60d")) == 3  # what is older than 35 days is gone

    def test_an_export_beside_another_is_refused(self, redis: Redis, tmp_path: Path) -> None:
        redis.set(LOCK, "another")
        done = tera("usage", "export", "--directory", str(tmp_path), code=1)
        assert "Another exporter" in done.stderr

    def test_an_export_to_nowhere_says_so(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        done = tera("usage", "export", "--directory", str(tmp_path / "file"), code=1)
        assert "cannot be written" in done.stderr


@pytest.mark.parametrize(
    "arguments", [["keys", "list"], ["tenants", "list"], ["usage"]], ids=" ".join
)
def test_redis_away_is_told(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERA_REDIS_URL", "redis://127.0.0.1:1/0")
    assert "cannot be reached" in tera(*arguments, code=1).stderr


@pytest.mark.parametrize(
    "arguments", [["keys", "list"], ["tenants", "list"], ["usage"]], ids=" ".join
)
def test_without_a_platform_it_is_told(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TERA_KEY_PEPPER")
    assert "tera serve" in tera(*arguments, code=2).stderr

"""The `tera` command beside a running platform, and without one."""

import json
from pathlib import Path

import psutil
import pytest
import yaml
from tests.serve.conftest import SIMULATED_VALUES, Platform, tera

pytestmark = pytest.mark.slow


def test_keys_are_made_listed_and_revoked(simulated: Platform) -> None:
    made = json.loads(
        simulated.tera(
            *("keys", "create", "--tenant", "acme", "--models", "sim/small,sim/slow"),
            *("--expires", "30d", "--json"),
        ).stdout
    )
    assert made.keys() == {"key", "key_id", "tenant"}
    assert made["tenant"] == "acme"

    listing = simulated.tera("keys", "list", "--json").stdout
    assert made["key"] not in listing
    rows = {row["key_id"]: row for row in json.loads(listing)}
    row = rows[made["key_id"]]
    assert (row["tenant"], row["models"]) == ("acme", ["sim/small", "sim/slow"])
    assert row["expires"] - row["created"] == pytest.approx(30 * 86400, abs=1)
    assert row["hint"].startswith(made["key"][:12])

    assert simulated.tera("keys", "revoke", made["key_id"]).returncode == 0
    rows = {
        row["key_id"]: row for row in json.loads(simulated.tera("keys", "list", "--json").stdout)
    }
    assert made["key_id"] not in rows
    again = simulated.tera("keys", "revoke", made["key_id"])
    assert again.returncode != 0
    assert made["key_id"] in again.stderr


def test_a_bad_lifetime_is_wrong_usage(simulated: Platform) -> None:
    done = simulated.tera("keys", "create", "--tenant", "acme", "--expires", "soon")
    assert done.returncode == 2
    assert "30d" in done.stderr


def test_status_names_living_processes(simulated: Platform) -> None:
    status = simulated.status()
    assert status.keys() == {"models", "gateway", "redis"}
    assert [(model["name"], model["id"]) for model in status["models"]] == [
        ("small", "sim/small"),
        ("slow", "sim/slow"),
    ]
    assert [len(model["replicas"]) for model in status["models"]] == [2, 1]
    counts = [(model["wanted"], model["running"], model["starting"]) for model in status["models"]]
    assert counts == [(2, 2, 0), (1, 1, 0)]
    replicas = [replica for model in status["models"] for replica in model["replicas"]]
    for replica in replicas:
        assert replica.keys() == {
            "replica_id",
            "pid",
            "running",
            "waiting",
            "asleep",
            "draining",
        }
        assert replica["asleep"] is replica["draining"] is False
    assert all(replica.keys() == {"replica_id", "pid"} for replica in status["gateway"])
    assert status["redis"].keys() == {"address", "pid", "state"}
    assert status["redis"]["state"] == "ok"
    owned = {process.pid for process in simulated.descendants()}
    assert {replica["pid"] for replica in (*replicas, *status["gateway"])} <= owned
    assert status["redis"]["pid"] in owned
    assert all(psutil.pid_exists(pid) for pid in owned)


def test_status_is_a_table_for_people(simulated: Platform) -> None:
    done = simulated.tera("status")
    assert done.returncode == 0
    assert "sim/small" in done.stdout
    assert "2 of 2" in done.stdout
    assert "redis ok" in done.stdout


def test_probe_asks_the_platform_that_runs_here(simulated: Platform) -> None:
    done = simulated.tera("probe", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["base_url"], found["status"]) == (simulated.base_url, "ready")
    assert [(model["id"], model["status"]) for model in found["models"]] == [
        ("sim/small", "ready"),
        ("sim/slow", "ready"),
    ]
    answer = found["answer"]
    assert answer["model"] == "sim/small"
    assert answer["characters"] > 0
    assert 0 < answer["time_to_first_token_s"] <= answer["duration_s"]


def test_commands_without_a_platform_say_so(tmp_path: Path) -> None:
    for arguments in (["status", "--json"], ["keys", "list"]):
        done = tera(tmp_path / "home", *arguments)
        assert done.returncode == 2
        assert "tera serve" in done.stderr
        assert "Traceback" not in done.stderr


def test_config_check_and_render(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.yaml", tmp_path / "bad.yaml"
    good.write_text(SIMULATED_VALUES)
    bad.write_text("models:\n  small:\n    id: x\n    engine: {kind: simulated}\n    replica: 2\n")
    home = tmp_path / "home"
    assert tera(home, "config", "check", "-f", str(good)).returncode == 0
    rendered = tera(home, "config", "render", "-f", str(good))
    assert rendered.returncode == 0
    names = [application["name"] for application in yaml.safe_load(rendered.stdout)["applications"]]
    assert names == ["model-small", "model-slow", "gateway"]
    for verb in ("check", "render"):
        refused = tera(home, "config", verb, "-f", str(bad))
        assert refused.returncode == 2
        assert "models.small.replica" in refused.stderr
        assert refused.stdout == ""
    assert tera(home, "config", "check", "-f", str(tmp_path / "none.yaml")).returncode == 2

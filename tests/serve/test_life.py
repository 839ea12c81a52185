"""Starting and stopping: clear words, and nothing left behind."""

import json
import os
import re
import signal
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from tests.serve.conftest import (
    SIMULATED_VALUES,
    START_DEADLINE_S,
    STOP_DEADLINE_S,
    Platform,
    listens,
    tera,
    until,
)

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
ONE_MODEL = "models: {one: {id: sim/one, engine: {kind: simulated}}}\n"


def assert_ends_whole(platform: Platform, number: signal.Signals) -> None:
    """Send a signal, and see that the command succeeds and leaves nothing behind."""
    family = platform.descendants()
    assert family
    scratch = _scratch(platform)
    assert scratch.exists()
    if number == signal.SIGHUP:
        os.killpg(platform.process.pid, number)  # the kernel sends it to all of the foreground
    else:
        platform.process.send_signal(number)
    assert platform.process.wait(STOP_DEADLINE_S) == 0
    until(lambda: not any(process.is_running() for process in family))
    assert not listens(platform.port)
    assert not scratch.exists()
    assert not (platform.home / "local.env").exists()
    assert not (platform.home / "state.json").exists()


def _scratch(platform: Platform) -> Path:
    """Return the platform's temporary directory, which is its HAProxy's too."""
    written = json.loads((platform.home / "processes.json").read_text())
    return Path(written["scratch"])


def test_a_signal_while_engines_load_stops_all(tmp_path: Path) -> None:
    values = ONE_MODEL.replace("simulated}", "simulated, args: {profile: {startup_s: 600}}}")
    platform = Platform.launch(tmp_path / "home", values)
    until(lambda: "Engines and gateway" in platform.output, timeout_s=60)
    family = platform.descendants()
    platform.process.send_signal(signal.SIGINT)
    platform.process.wait(20)
    until(lambda: not any(process.is_running() for process in family))


def test_the_next_start_clears_what_a_killed_one_left_and_ends_with_its_terminal(
    tmp_path: Path,
) -> None:
    killed = Platform.launch(tmp_path / "home", ONE_MODEL).wait_until_ready()
    family = killed.descendants()
    # One that does not notice that it is alone, as an engine that is busy may not.
    psutil.Process(killed.replicas("one")[0]["pid"]).suspend()
    killed.process.kill()
    killed.process.wait()

    # Whoever got the id of one that is gone by now.
    with subprocess.Popen(["sleep", "600"]) as stranger:  # noqa: S607
        record = killed.home / "processes.json"
        written = json.loads(record.read_text())
        written["processes"].append({"pid": stranger.pid, "startedTicks": 1})
        record.write_text(json.dumps(written))
        again = Platform.launch(killed.home, ONE_MODEL, port=killed.port)
        try:
            until(lambda: "Ready in" in again.output, timeout_s=START_DEADLINE_S)
            again.wait_until_ready()
            until(lambda: not any(process.is_running() for process in family))
            assert not Path(written["scratch"]).exists()
            with again.http() as client:
                asked = {"model": "sim/one", "prompt": "Once", "max_tokens": 5}
                assert client.post("/v1/completions", json=asked).status_code == 200
            assert stranger.poll() is None
            assert_ends_whole(again, signal.SIGHUP)
        finally:
            stranger.kill()
            again.stop()


def overlay() -> str:
    """Return what the page tells to lay over the production values."""
    page = (ROOT / "docs/install.md").read_text()
    found = re.search(r"## Try the values on one machine\n.*?```yaml\n(.*?)```", page, re.DOTALL)
    assert found is not None
    return found[1]


def test_production_values_run_on_one_machine_and_end_though_an_engine_is_frozen(
    tmp_path: Path,
) -> None:
    production = ROOT / "helm/tera/values-production.yaml"
    with Platform.running(tmp_path / "home", overlay(), over=[production]) as running:
        models = yaml.safe_load(production.read_text())["models"]
        status = running.status()
        assert [each["name"] for each in status["models"]] == list(models)
        counts = {each["name"]: len(each["replicas"]) for each in status["models"]}
        assert counts == {name: each["replicas"]["min"] for name, each in models.items()}
        assert len(status["gateway"]) == 3
        with running.http() as http:
            for name in ("default", *(each["id"] for each in models.values())):
                asked = {"model": name, "prompt": "Once", "max_tokens": 3}
                assert http.post("/v1/completions", json=asked).status_code == 200, name
            owners = {each["owned_by"] for each in http.get("/v1/models").json()["data"]}
            assert owners == {"simulated"}
        psutil.Process(running.replicas(next(iter(models)))[0]["pid"]).suspend()
        assert_ends_whole(running, signal.SIGTERM)


def test_a_port_in_use_is_said_in_one_line(simulated: Platform, tmp_path: Path) -> None:
    (tmp_path / "values.yaml").write_text(ONE_MODEL)
    refused = tera(
        tmp_path / "home", "serve", "-f", str(tmp_path / "values.yaml"), port=simulated.port
    )
    assert refused.returncode == 1
    assert f"Port {simulated.port}" in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1


def test_a_second_platform_in_one_directory_is_refused(simulated: Platform) -> None:
    values = simulated.home.parent / "values.yaml"
    assert values.read_text() == SIMULATED_VALUES
    refused = tera(simulated.home, "serve", "-f", str(values))
    assert refused.returncode == 1
    assert "already runs" in refused.stderr


def test_platforms_side_by_side_do_not_meet(simulated: Platform, tmp_path: Path) -> None:
    other = Platform.launch(tmp_path / "home", ONE_MODEL).wait_until_ready()
    sockets = {
        Path(environment["RAY_SERVE_HAPROXY_SOCKET_PATH"]).parent
        for environment in map(_environment, other.descendants())
        if "RAY_SERVE_HAPROXY_SOCKET_PATH" in environment
    }
    assert sockets == {_scratch(other)}
    # Serve's own listeners share a port with whoever else has it, and so the connections to it.
    assert _listening(simulated).isdisjoint(_listening(other))
    # Ray's and Serve's take code from whoever reaches them.
    assert {it.removeprefix("::ffff:") for it in _addresses(other)} == {"127.0.0.1"}
    with simulated.http() as here, other.http() as there:
        assert [model["id"] for model in there.get("/v1/models").json()["data"]] == ["sim/one"]
        assert len(here.get("/v1/models").json()["data"]) == 2
        assert there.get("/v1/models", headers=_bearer(simulated)).status_code == 401
        assert here.get("/v1/models", headers=_bearer(other)).status_code == 401
        assert_ends_whole(other, signal.SIGINT)
        asked = {"model": "sim/small", "prompt": "Once", "max_tokens": 5}
        answer = here.post("/v1/completions", json=asked)
        assert answer.status_code == 200
    assert all(process.is_running() for process in simulated.descendants())


def _listening(platform: Platform) -> set[int]:
    """Return the ports of all its processes."""
    return {address.port for address in _listeners(platform)}


def _addresses(platform: Platform) -> set[str]:
    """Return where its processes listen."""
    return {address.ip for address in _listeners(platform)}


def _listeners(platform: Platform) -> list[Any]:
    found: list[Any] = []
    for process in (psutil.Process(platform.process.pid), *platform.descendants()):
        with suppress(psutil.NoSuchProcess):  # it has ended since
            found += process.net_connections(kind="tcp")
    return [each.laddr for each in found if each.status == psutil.CONN_LISTEN]


def _environment(process: psutil.Process) -> dict[str, str]:
    with suppress(psutil.NoSuchProcess):  # it has ended since
        return process.environ()
    return {}


def _bearer(platform: Platform) -> dict[str, str]:
    return {"authorization": f"Bearer {platform.api_key}"}


def test_an_engine_that_does_not_start_ends_the_command(tmp_path: Path) -> None:
    (tmp_path / "values.yaml").write_text(
        ONE_MODEL.replace("simulated}", "simulated, args: {faults: {fail_start: true}}}")
    )
    failed = tera(tmp_path / "home", "serve", "-f", str(tmp_path / "values.yaml"), timeout_s=180)
    assert failed.returncode == 1
    assert "model-one failed to start" in failed.stderr


def test_an_argument_that_vllm_does_not_have_is_said_in_one_line(tmp_path: Path) -> None:
    engine = "{kind: vllm, args: {dtype: float32, max_model_length: 2048}}"
    values = (
        f"models: {{demo: {{id: demo, source: demo://smollm2-135m-instruct, engine: {engine}}}}}"
    )
    (tmp_path / "values.yaml").write_text(values)
    refused = tera(tmp_path / "home", "serve", "-f", str(tmp_path / "values.yaml"))
    assert refused.returncode == 2
    (line,) = refused.stderr.strip().splitlines()
    assert "models.demo.engine.args.max_model_length" in line
    assert "max_model_len is nearest" in line
    assert refused.stdout == ""  # so nothing was started

"""What `tera serve` says when a platform cannot start; none of it starts anything."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from filelock import FileLock
from typer.testing import CliRunner, Result

from tera.cli import app
from tera.local.cluster import free_port

NO_MODELS = "models: {}\n"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("TERA_HOME", str(home))
    return home


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A port that another program listens on."""
    with socket.create_server(("127.0.0.1", free_port())) as server:
        yield server.getsockname()[1]


def serve(tmp_path: Path, values: str = NO_MODELS, port: int | None = None) -> Result:
    file = tmp_path / "values.yaml"
    file.write_text(values)
    options = ["--host", "127.0.0.1", "--port", str(port or free_port())]
    return CliRunner().invoke(app, ["serve", "-f", str(file), *options])


def complaint(result: Result, code: int) -> str:
    """Return the one line that says why it failed."""
    assert result.exit_code == code, (result.output, result.exception)
    (line,) = result.stderr.splitlines()
    return line


def test_a_port_that_another_program_has_is_a_failure_and_no_wrong_usage(
    home: Path, tmp_path: Path, port: int
) -> None:
    said = complaint(serve(tmp_path, port=port), code=1)
    assert f"Port {port} on 127.0.0.1 cannot be used" in said


def test_a_platform_that_runs_in_the_directory_is_a_failure(home: Path, tmp_path: Path) -> None:
    with FileLock(home / "serve.lock"):
        assert "already runs" in complaint(serve(tmp_path), code=1)


def test_a_directory_that_cannot_be_used_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TERA_HOME", str(tmp_path / "file" / "home"))
    said = complaint(serve(tmp_path), code=1)
    assert "file/home cannot be used" in said
    assert "TERA_HOME" in said


def test_too_little_memory_is_a_failure(home: Path, tmp_path: Path) -> None:
    values = "models: {one: {id: x, source: hf://x/y, replicas: {min: 100000, max: 100000}}}\n"
    assert "GiB of free memory" in complaint(serve(tmp_path, values), code=1)


def test_an_embedded_redis_that_does_not_start_is_a_failure(home: Path, tmp_path: Path) -> None:
    (home / "redis").mkdir()
    (home / "redis" / "appendonly.aof").write_text("no log of commands")
    result = serve(tmp_path)
    assert result.exit_code == 1
    assert "redis-server does not start" in result.stderr


def test_a_redis_of_others_that_is_away_is_a_failure(home: Path, tmp_path: Path) -> None:
    values = "redis: {embedded: false, external: {address: '127.0.0.1:1'}}\n"
    said = complaint(serve(tmp_path, values), code=1)
    assert "redis.external.address: 127.0.0.1:1 does not answer" in said


@pytest.mark.parametrize(
    ("values", "said"),
    [
        pytest.param("models: {one: {id: x, replica: 2}}\n", "models.one.replica", id="values"),
        pytest.param(
            "models: {one: {id: x, source: demo://x, engine: {args: {dtype: int8}}}}\n",
            "dtype is bfloat16 or float32",
            id="type of a demo model",
        ),
        pytest.param(
            "models: {one: {id: x, source: demo://none}}\n", "demo://none", id="no demo model"
        ),
    ],
)
def test_values_that_are_wrong_are_wrong_usage(
    home: Path, tmp_path: Path, values: str, said: str
) -> None:
    result = serve(tmp_path, values)
    assert result.exit_code == 2
    assert said in result.stderr

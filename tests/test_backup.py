"""`tera backup` and `tera restore`, from one Redis to another."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from tests.tenancy.conftest import RedisServer
from tests.tenancy.test_usage import record
from typer.testing import CliRunner, Result

from tera.cli import app
from tera.tenancy.usage import encode_record, stream_of


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with RedisServer.running(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(autouse=True)
def redis(server: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Redis]:
    monkeypatch.setenv("TERA_REDIS_URL", server.url)
    monkeypatch.setenv("TERA_KEY_PEPPER", "test-pepper")
    monkeypatch.setenv("TERA_HOME", str(tmp_path / "home"))
    with Redis.from_url(server.url) as client:
        client.flushall()
        yield client


def tera(*arguments: str, code: int = 0, given: str | None = None) -> Result:
    result = CliRunner().invoke(app, arguments, input=given)
    assert result.exit_code == code, (result.output, result.exception)
    return result


def answer(*arguments: str) -> Any:
    return json.loads(tera(*arguments, "--json").stdout)


def bill(redis: Redis, *request_ids: str, status: Any = "finished") -> None:
    for request_id in request_ids:
        one = record(request_id, 1_700_000_000.0, status=status)
        redis.xadd(stream_of(one.tenant), {"id": request_id, "r": encode_record(one)})


def filled(redis: Redis) -> tuple[str, str]:
    """Fill the platform; return the id of a key that is valid and of one that was revoked."""
    kept = answer("keys", "create", "--tenant", "acme", "--requests-per-minute", "60")
    gone = answer("keys", "create", "--tenant", "acme")
    tera("keys", "revoke", gone["key_id"], "--yes")
    tera("tenants", "set", "acme", "--tokens-per-minute", "1000")
    bill(redis, "r1", status="lost")
    bill(redis, "r1", "r2")
    return kept["key_id"], gone["key_id"]


def state(redis: Redis) -> Any:
    """Return all that a backup is to bring back."""
    entries: Any = redis.xrange(stream_of(record("r", 1_700_000_000.0).tenant))
    return (
        redis.hgetall("tera:keys"),
        redis.hgetall("tera:keys:revoked"),
        redis.hgetall("tera:tenants"),
        [entry for _, entry in entries],
    )


def test_all_comes_back_to_an_empty_redis(redis: Redis, tmp_path: Path) -> None:
    filled(redis)
    before, rows = state(redis), answer("keys", "list")
    file = tmp_path / "backup.jsonl"
    file.write_text(tera("backup").stdout)
    redis.flushall()
    told = tera("restore", str(file)).stderr
    assert "1 keys, 1 tenants and 3 usage records restored" in told
    assert state(redis) == before
    assert answer("keys", "list") == rows


def test_restoring_again_changes_nothing(redis: Redis) -> None:
    filled(redis)
    lines, before = tera("backup").stdout, state(redis)
    told = tera("restore", "-", given=lines).stderr
    assert "0 keys, 0 tenants and 0 usage records restored" in told
    assert state(redis) == before


def test_what_exists_stays_as_it_is(redis: Redis) -> None:
    kept, gone = filled(redis)
    lines = tera("backup").stdout
    tera("keys", "revoke", kept, "--yes")
    tera("tenants", "set", "acme", "--tokens-per-minute", "5")
    bill(redis, "r3")
    tera("restore", "-", given=lines)
    assert answer("keys", "list") == [], "a key that was revoked since stays revoked"
    assert b'"tokensPerMinute":5,' in redis.hget("tera:tenants", "acme")  # type: ignore[operator]
    assert [entry[b"id"] for entry in state(redis)[3]] == [b"r1", b"r1", b"r2", b"r3"]
    assert redis.hexists("tera:keys:revoked", gone)


def test_a_backup_holds_no_key_and_no_pepper(redis: Redis) -> None:
    key = answer("keys", "create", "--tenant", "acme")["key"]
    lines = tera("backup").stdout
    assert key not in lines
    assert "test-pepper" not in lines


def test_a_backup_of_another_pepper_is_refused(
    redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(redis)
    lines = tera("backup").stdout
    redis.flushall()
    monkeypatch.setenv("TERA_KEY_PEPPER", "another")
    refused = tera("restore", "-", given=lines, code=2)
    assert "another pepper" in refused.stderr
    assert not redis.keys()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        pytest.param(lambda lines: lines[:-1], "ends after line", id="cut off"),
        pytest.param(lambda lines: [lines[0], lines[-1]], "should precede", id="lines missing"),
        pytest.param(lambda lines: [], "ends after line 0", id="empty"),
        pytest.param(lambda lines: lines[1:], "line 1: a backup begins", id="no beginning"),
        pytest.param(lambda lines: [*lines, lines[1]], "nothing may follow", id="more after it"),
        pytest.param(lambda lines: [lines[0], "{", *lines[2:]], "line 2: is not", id="no JSON"),
        pytest.param(
            lambda lines: [lines[0], '{"kind":"key","record":{"key_id":"key_1"}}', *lines[2:]],
            "line 2: the key's record cannot be read",
            id="no key",
        ),
        pytest.param(
            lambda lines: [lines[0], '{"kind":"tenant","name":"A/B","limits":{}}', *lines[2:]],
            "line 2: ",
            id="no tenant",
        ),
        pytest.param(
            lambda lines: ['{"kind":"backup","format":2,"pepper":""}', *lines[1:]],
            "format 2",
            id="a later format",
        ),
    ],
)
def test_nothing_is_written_of_a_damaged_backup(redis: Redis, damage: Any, reason: str) -> None:
    filled(redis)
    lines = damage(tera("backup").stdout.splitlines())
    redis.flushall()
    refused = tera("restore", "-", given="".join(f"{line}\n" for line in lines), code=2)
    assert reason in refused.stderr
    assert not redis.keys()


def test_a_file_that_is_not_there_is_wrong_usage(tmp_path: Path) -> None:
    assert "cannot be read" in tera("restore", str(tmp_path / "none"), code=2).stderr

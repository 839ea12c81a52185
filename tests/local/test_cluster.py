"""Ports of a platform on one machine."""

import socket
import stat
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from tera.errors import StartError
from tera.local.cluster import PORTS, REPLICA_PORTS, LocalCluster, claim_range, free_port


def test_a_claimed_range_is_nobody_elses_until_it_is_given_up() -> None:
    # Of ports that no platform uses.
    among = range(60_000, 60_000 + 2 * (REPLICA_PORTS + 1))
    with ExitStack() as one, ExitStack() as other, ExitStack() as third:
        first, second = claim_range(among, one), claim_range(among, other)
        assert abs(first - second) > REPLICA_PORTS
        with pytest.raises(StartError, match="stop other platforms"):
            claim_range(among, third)
        one.close()
        assert claim_range(among, third) == first


def test_a_claim_ends_in_another_thread_than_it_began_in() -> None:
    among = range(60_000, 60_000 + REPLICA_PORTS + 2)
    with ExitStack() as one, ExitStack() as other:
        with ThreadPoolExecutor(max_workers=1) as pool:
            first = pool.submit(claim_range, among, one).result()
        one.close()
        assert claim_range(among, other) == first


def test_a_ray_that_does_not_start_is_said_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(**_: object) -> None:
        raise Exception("no GCS")  # as Ray does

    monkeypatch.setattr("ray.init", fail)
    monkeypatch.setattr("tera.local.cluster.set_environment", lambda _: None)
    cluster = LocalCluster("127.0.0.1", 8000, tmp_path)
    with pytest.raises(StartError, match="Ray does not start: no GCS"):
        cluster.start()


def test_ray_writes_where_nobody_else_can_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, object] = {}

    def init(**options: object) -> None:
        asked.update(options)
        raise Exception("that is enough")

    monkeypatch.setattr("ray.init", init)
    monkeypatch.setattr("tera.local.cluster.set_environment", lambda _: None)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(StartError, match="that is enough"):
        LocalCluster("127.0.0.1", 8000, tmp_path).start()
    directory = Path(str(asked["_temp_dir"]))
    assert directory.parent.parent == tmp_path
    assert stat.S_IMODE(directory.parent.stat().st_mode) == 0o700


def test_a_free_port_is_none_that_outgoing_connections_get() -> None:
    ports = {free_port() for _ in range(20)}
    assert ports <= set(PORTS)
    assert len(ports) > 1
    with socket.socket() as server:
        server.bind(("127.0.0.1", ports.pop()))

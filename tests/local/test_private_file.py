"""Files and directories with secrets in them."""

import os
import stat
from pathlib import Path

import pytest

from tera.errors import StartError
from tera.local.private_file import private_directory, write_private


def test_a_private_directory_is_its_owners_alone(tmp_path: Path) -> None:
    for _ in range(2):  # made, and found
        found = private_directory(tmp_path / "private")
        assert stat.S_IMODE(found.stat().st_mode) == 0o700


def test_one_that_others_can_enter_is_refused(tmp_path: Path) -> None:
    (tmp_path / "wide").mkdir(mode=0o755)
    with pytest.raises(StartError, match="TMPDIR"):
        private_directory(tmp_path / "wide")


def test_one_that_somebody_else_has_made_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    private_directory(tmp_path / "theirs")
    monkeypatch.setattr(os, "getuid", lambda: os.geteuid() + 1)
    with pytest.raises(StartError, match="TMPDIR"):
        private_directory(tmp_path / "theirs")


def test_a_link_to_a_private_directory_is_none(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(private_directory(tmp_path / "private"))
    with pytest.raises(StartError, match="TMPDIR"):
        private_directory(tmp_path / "link")


def test_only_its_owner_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    write_private(path, "secret")
    assert path.read_text() == "secret"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [path]


def test_it_is_on_the_disk_before_it_has_its_name_and_so_is_the_name_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state.json"
    write_private(path, "old")
    synced: list[tuple[bool, str]] = []
    fsync = os.fsync

    def noted(descriptor: int) -> None:
        is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        size = 0 if is_folder else os.fstat(descriptor).st_size
        assert is_folder or size == len("new")
        synced.append((is_folder, path.read_text()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    write_private(path, "new")
    assert synced == [(False, "old"), (True, "new")]

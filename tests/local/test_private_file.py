import os
import stat
from pathlib import Path

import pytest

from tera.errors import StartError
from tera.local.private_file import private_directory


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

"""Disk space and folders that can be written: what is surely too little is refused, what may be is only said."""

import os
import tempfile

import pytest

from fd2fast.system import space
from fd2fast.system.space import Space


def test_too_little_is_refused_and_scarce_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(space, "free_space", lambda path: 10**9)
    where = tmp_path / "not" / "yet"
    assert space.must_hold(where, Space(10, 10**9), "out") == ([], [])
    faults, warnings = space.must_hold(where, Space(2 * 10**9, 3 * 10**9), "out")
    assert not warnings
    assert faults == [f"out: at least 2.0 GB more will be written, 1.0 GB are free at {tmp_path}"]
    faults, warnings = space.must_hold(where, Space(10, 3 * 10**9), "out")
    assert not faults
    assert "about 3.0 GB more" in warnings[0]


def test_a_file_system_that_does_not_say_is_not_held_against_anybody(tmp_path, monkeypatch):
    nothing = type("usage", (), {"total": 0, "free": 0})()
    monkeypatch.setattr(space.shutil, "disk_usage", lambda path: nothing)
    assert space.free_space(tmp_path) is None
    assert space.must_hold(tmp_path, Space(1, 1), "out") == ([], [])


def test_what_is_taken_is_counted(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_bytes(os.urandom(100_000))
    (tmp_path / "loop").symlink_to(tmp_path)
    assert 100_000 <= space.taken(tmp_path) < 200_000
    assert space.taken(tmp_path / "nowhere") == 0


def test_folders_that_cannot_be_written_are_named(tmp_path, monkeypatch):
    assert space.folder_faults(tmp_path / "new" / "deep") == []
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name, told in (
        ("file", "is a file; wanted a folder"),
        ("file/below", "is a file; wanted a folder"),
        ("link", "is a link to nothing"),
        ("x" * 300, "longer than 255 bytes"),
    ):
        (fault,) = space.folder_faults(tmp_path / name)
        assert told in fault

    def refused(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryFile", refused)
    (fault,) = space.folder_faults(tmp_path / "new")
    assert fault == f"out {tmp_path / 'new'}: {tmp_path} cannot be written (Permission denied); choose another folder"


@pytest.mark.parametrize(
    ("size", "text"), [(2.5e12, "2.5 TB"), (1e9, "1.0 GB"), (34_560_000, "34.6 MB"), (900, "1 kB")]
)
def test_sizes_as_text(size, text):
    assert space.size_text(size) == text

"""Files appear whole or not at all, and every refusal is one line that names the file."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vitascope.core.errors import MediaError
from vitascope.media.files import atomic_file, check_readable, check_writable


def test_atomic_file_appears_at_the_end_with_ordinary_permissions(tmp_path: Path) -> None:
    target = tmp_path / "clip.bin"
    with atomic_file(target) as file:
        file.write(b"new")
        assert not target.exists()
    assert target.read_bytes() == b"new"
    (tmp_path / "plain").write_bytes(b"")
    assert target.stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, RuntimeError, MemoryError])
def test_atomic_file_leaves_the_old_file_on_any_exception(tmp_path: Path, error: type[BaseException]) -> None:
    target = tmp_path / "clip.bin"
    target.write_bytes(b"old")
    with pytest.raises(error), atomic_file(target) as file:
        file.write(b"half of the new")
        raise error
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_full_disk_is_a_media_error_and_leaves_nothing(tmp_path: Path) -> None:
    target = tmp_path / "clip.bin"
    with pytest.raises(MediaError, match="No space left on device"), atomic_file(target):
        full = os.open("/dev/full", os.O_WRONLY)
        try:
            os.write(full, b"x")
        finally:
            os.close(full)
    assert list(tmp_path.iterdir()) == []


def test_folders_that_cannot_be_written_are_named(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match=r"nowhere does not exist"):
        check_writable(tmp_path / "nowhere" / "clip.mp4")
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(MediaError, match=r"Not a directory"):
        check_writable(tmp_path / "file" / "clip.mp4")
    with pytest.raises(MediaError, match=r"is a folder"):
        check_writable(tmp_path)
    assert check_writable(tmp_path / "clip.mp4") == tmp_path / "clip.mp4"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_without_permission_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(MediaError, match=r"clip\.mp4 cannot be written: Permission denied"):
        check_writable(tmp_path / "clip.mp4")


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match=r"missing\.png does not exist"):
        check_readable(tmp_path / "missing.png")
    with pytest.raises(MediaError, match=r"is a folder"):
        check_readable(tmp_path)
    (tmp_path / "empty.png").write_bytes(b"")
    with pytest.raises(MediaError, match=r"empty\.png is empty"):
        check_readable(tmp_path / "empty.png")

"""Files are written whole or not at all, and never over what is not a file."""

import errno
import os
import stat
from pathlib import Path

import pytest

from cognica_mlx.files.whole_file import replacing, write_text


def test_a_new_file_gets_the_permissions_that_the_umask_allows(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "new", "text")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o640


def test_an_existing_file_keeps_its_permissions(tmp_path: Path) -> None:
    path = tmp_path / "old"
    path.write_text("old")
    path.chmod(0o600)
    write_text(path, "new")
    assert path.read_text() == "new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_symbolic_link_is_followed_and_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "link"
    link.symlink_to("elsewhere/target")  # nothing is there yet
    for text in ("first", "second"):
        write_text(link, text)
        assert link.is_symlink()
        assert (tmp_path / "elsewhere" / "target").read_text() == text
    assert [p.name for p in (tmp_path / "elsewhere").iterdir()] == ["target"]


def test_a_pipe_is_written_to_and_stays_a_pipe(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_text(pipe, "through")
        assert os.read(reader, 100) == b"through"
    finally:
        os.close(reader)
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_the_null_device_stays_a_device(tmp_path: Path) -> None:
    write_text(Path(os.devnull), "gone")
    assert stat.S_ISCHR(Path(os.devnull).stat().st_mode)


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "kept"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_names_the_file(tmp_path: Path) -> None:
    with (
        pytest.raises(OSError, match=r"No space left on device: '.*/kept'"),
        replacing(tmp_path / "kept"),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")  # as from a write
    with pytest.raises(OSError, match=r"directory: '.*/nowhere/file'"):
        write_text(tmp_path / "nowhere" / "file", "text")
    assert not list(tmp_path.iterdir())


def test_what_a_killed_process_left_is_removed_but_not_what_another_writes(tmp_path: Path) -> None:
    path = tmp_path / "file"
    left, other = (tmp_path / f".{name}.0123abcd.partial" for name in ("file", "file.json"))
    for file in (left, other):
        file.write_text("half")
    with replacing(path) as temporary:
        temporary.write_text("slow")
        write_text(path, "fast")
    assert path.read_text() == "slow"
    assert sorted(tmp_path.iterdir()) == sorted([path, other])

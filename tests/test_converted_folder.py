"""The folder that the converter writes: whole or not at all, and nothing lost."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from conftest import FIXTURES
from converting import convert, entries

from cognica_mlx.convert.formats.whole_folder import new_folder
from cognica_mlx.files import safetensors_files
from cognica_mlx.files.whole_file import locked_new
from mlx_poe import load
from mlx_poe.commands.convert import main


def test_an_existing_folder_is_replaced_only_when_told(tmp_path, capsys):
    target = convert(FIXTURES / "flat-d8", tmp_path / "out")
    before = entries(target)
    assert main(["--hf-path", "poe-tiny", "--mlx-path", str(target)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert entries(target) == before
    convert(Path("poe-tiny"), target, "--overwrite")
    assert load(target)[0].config.n_embd == 128
    (target / "notes.txt").write_text("mine")
    before = entries(target)
    assert main(["--hf-path", "poe-tiny", "--mlx-path", str(target), "--overwrite"]) == 2
    assert "notes.txt" in capsys.readouterr().err
    assert entries(target) == before
    empty = tmp_path / "empty"
    empty.mkdir()
    convert(FIXTURES / "flat-d8", empty)
    for source in (target, empty):
        flags = ["--hf-path", str(empty), "--mlx-path", str(source), "--overwrite"]
        assert main(flags) == 2
    assert sorted(f.name for f in tmp_path.iterdir()) == ["empty", "out"]


@pytest.mark.parametrize("fault", [KeyboardInterrupt, OSError(28, "No space left on device")])
@pytest.mark.parametrize("existing", [False, True])
def test_an_end_in_mid_write_leaves_nothing_and_loses_nothing(
    tmp_path, monkeypatch, capfd, fault, existing
):
    target = tmp_path / "out"
    if existing:
        convert(FIXTURES / "flat-d8", target)
    before = entries(tmp_path)
    write, count = safetensors_files.TensorWriter.write, 0

    def fail(self: object, name: str, array: mx.array) -> None:
        nonlocal count
        count += 1
        if count == 20:
            raise fault
        write(self, name, array)  # type: ignore[arg-type]

    monkeypatch.setattr(safetensors_files.TensorWriter, "write", fail)
    status = main(["--hf-path", "poe-tiny", "--mlx-path", str(target), "--overwrite"])
    assert status == (130 if fault is KeyboardInterrupt else 1)
    assert count == 20
    assert entries(tmp_path) == before
    assert list(tmp_path.iterdir()) == ([target] if existing else [])
    if status == 1:
        assert "No space left" in capfd.readouterr().err


def test_what_appears_at_the_target_meanwhile_is_kept(tmp_path, monkeypatch, capsys):
    target = tmp_path / "out"
    write = safetensors_files.TensorWriter.close

    def appear(self: object) -> None:
        write(self)  # type: ignore[arg-type]
        target.mkdir()
        (target / "thesis.txt").write_text("mine")

    monkeypatch.setattr(safetensors_files.TensorWriter, "close", appear)
    assert main(["--hf-path", "poe-tiny", "--mlx-path", str(target)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert entries(tmp_path) == {"out/thesis.txt": b"mine"}


def test_an_interruption_between_the_renames_keeps_the_old(tmp_path, monkeypatch):
    target = convert(FIXTURES / "flat-d8", tmp_path / "out")
    before, rename = entries(tmp_path), Path.rename

    def interrupted(self: Path, other: Path) -> Path:
        if self.name.endswith(".partial"):
            raise KeyboardInterrupt
        return rename(self, other)

    monkeypatch.setattr(Path, "rename", interrupted)
    assert main(["--hf-path", "poe-tiny", "--mlx-path", str(target), "--overwrite"]) == 130
    assert entries(tmp_path) == before


# Runs the command and is killed by a signal after 20 tensors, or between the two renames.
KILLED = """
import os, signal, sys
from pathlib import Path
from cognica_mlx.files import safetensors_files
from mlx_poe.commands.convert import main
number, where = int(sys.argv.pop(1)), sys.argv.pop(1)
write, rename, count = safetensors_files.TensorWriter.write, Path.rename, 0
def counted(self, name, array):
    global count
    count += 1
    if where == "writing" and count == 20:
        os.kill(os.getpid(), number)
    write(self, name, array)
def watched(self, other):
    if where == "renaming" and self.name.endswith(".partial"):
        os.kill(os.getpid(), number)
    return rename(self, other)
safetensors_files.TensorWriter.write = counted
Path.rename = watched
sys.exit(main(sys.argv[1:]))
"""


def convert_killed(number: int, where: str, target: Path, **options: Any) -> int:
    flags = ["--hf-path", "poe-tiny", "--mlx-path", str(target), "--overwrite"]
    script = [sys.executable, "-c", KILLED, str(int(number)), where, *flags]
    done = subprocess.run(script, capture_output=True, text=True, **options)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_being_told_to_end_cleans_up(tmp_path, number):
    assert convert_killed(number, "writing", tmp_path / "new" / "out") == 130
    assert not list(tmp_path.iterdir())


def test_nohup_keeps_converting(tmp_path):
    def ignore() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    assert convert_killed(signal.SIGHUP, "writing", tmp_path / "out", preexec_fn=ignore) == 0
    assert load(tmp_path / "out")[0].config.n_embd == 128


def test_the_next_run_removes_what_a_killed_one_left(tmp_path):
    target = tmp_path / "out"
    assert convert_killed(signal.SIGKILL, "writing", target) == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".out.") and left.name.endswith(".partial")
    # Of another target, though its name begins alike, and nothing that is ours.
    others = [tmp_path / name for name in (".out.v2.0123abcd.partial", ".out.notes.partial")]
    for other in others:
        other.mkdir()
    convert(Path("poe-tiny"), target)
    assert sorted(tmp_path.iterdir()) == sorted([target, *others])


def test_the_next_run_puts_back_what_a_killed_one_moved_away(tmp_path, capsys):
    target = convert(FIXTURES / "flat-d8", tmp_path / "out")
    before = entries(target)
    assert convert_killed(signal.SIGKILL, "renaming", target) == -signal.SIGKILL
    assert not target.exists() and len(list(tmp_path.iterdir())) == 2
    assert main(["--hf-path", "poe-tiny", "--mlx-path", str(target)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert entries(target) == before and list(tmp_path.iterdir()) == [target]


def test_a_run_that_is_alive_keeps_its_folder(tmp_path):
    target = tmp_path / "out"
    with new_folder(target, 1000, overwrite=False) as first:
        (first / "config.json").write_text("{}")
        script = (
            "import sys; from pathlib import Path\n"
            "from cognica_mlx.convert.formats.whole_folder import remove_leftovers\n"
            "remove_leftovers(Path(sys.argv[1]))\n"
        )
        subprocess.run([sys.executable, "-c", script, str(target)], check=True)
        assert (first / "config.json").exists()
    assert (target / "config.json").read_text() == "{}"


def test_a_private_folder_and_those_made_for_it_are_the_users_alone(tmp_path):
    tmp_path.chmod(0o755)
    for private, mode in ((True, 0o700), (False, 0o777 & ~umask())):
        target = tmp_path / str(private) / "out"
        with new_folder(target, 1000, overwrite=False, private=private) as filling:
            assert filling.stat().st_mode & 0o777 == mode
        assert [p.stat().st_mode & 0o777 for p in (target, target.parent)] == [mode, mode]
    assert tmp_path.stat().st_mode & 0o777 == 0o755


def umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def test_a_folder_removed_before_it_was_locked_is_made_again(tmp_path, monkeypatch):
    mkdir, made = Path.mkdir, []

    def removed(self: Path, *args: Any, **options: Any) -> None:
        mkdir(self, *args, **options)
        made.append(self)
        if len(made) == 1:
            self.rmdir()

    monkeypatch.setattr(Path, "mkdir", removed)
    with locked_new(tmp_path / "out", Path.mkdir) as folder:
        assert folder.is_dir() and folder != made[0]


def test_a_source_in_another_spelling_is_not_overwritten(tmp_path, monkeypatch, capsys):
    """As a disk that takes Model and model for the same sees it."""
    source = Path(shutil.copytree(FIXTURES / "flat-d8", tmp_path / "Model"))
    target = Path(shutil.copytree(FIXTURES / "flat-d8", tmp_path / "model"))
    before = entries(tmp_path)

    def same(one: Path, other: Path) -> bool:
        return str(one).casefold() == str(other).casefold()

    monkeypatch.setattr(Path, "samefile", same)
    flags = ["--hf-path", str(source), "--mlx-path", str(target), "--overwrite"]
    assert main(flags) == 2
    assert "is what is being converted" in capsys.readouterr().err
    assert entries(tmp_path) == before


@pytest.mark.parametrize("name", ["~nosuchuser/x", "a\0b", "loop", ""])
def test_names_that_are_no_path(tmp_path, monkeypatch, capfd, name):
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    for flags in (
        ["--hf-path", "poe-tiny", "--mlx-path", name],
        ["--hf-path", name, "--mlx-path", "out"],
        ["--hf-path", "poe-tiny-chat", "--base", name, "--mlx-path", "out"],
        ["--hf-path", "poe-tiny", "--mlx-path", "out", "--verify", name],
    ):
        assert main(flags) in (1, 2)
        error = capfd.readouterr().err
        assert error.count("\n") == 1 and error.startswith("mlx_poe.convert: error: "), error
    assert [entry.name for entry in tmp_path.iterdir()] == ["loop"]


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("empty.txt", "", "contains no text"),
        ("empty.jsonl", "\n", "contains no text"),
        ("empty.jsonl", '{"text": ""}', "contains no text"),
        ("roles.jsonl", '{"messages": [{"role": "king", "content": "x"}]}', "its role is 'king'"),
    ],
)
def test_the_text_to_verify_on_is_read_first(tmp_path, capsys, name, content, named):
    text = tmp_path / name
    text.write_text(content)
    flags = ["--hf-path", "poe-tiny", "--mlx-path", str(tmp_path / "out"), "--verify", str(text)]
    assert main(flags) == 2
    error = capsys.readouterr().err
    assert named in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == [text]


def test_an_unusable_calibration_is_left_out_with_a_warning(tmp_path, capsys):
    source = Path(shutil.copytree(FIXTURES / "flat-d8", tmp_path / "source"))
    (source / "poe_calibration.json").write_text('{"p99_bounds": null}')
    out = convert(source, tmp_path / "out")
    error = capsys.readouterr().err
    assert error.startswith("mlx_poe.convert: warning: calibration not copied: ")
    assert error.count("\n") == 1
    assert not (out / "poe_calibration.json").exists()
    assert load(out)[0].calibration_problem is None


def test_room_is_looked_for_first(tmp_path, monkeypatch, capsys):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert main(["--hf-path", "poe-tiny", "--mlx-path", str(tmp_path / "out")]) == 1
    assert "39.8 MB are needed" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())

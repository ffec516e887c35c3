"""poe-chat: its commands, its terminal and its pipes."""

import json
import os
import stat
import subprocess
import sys
from dataclasses import replace
from io import BytesIO, TextIOWrapper
from pathlib import Path

import pytest
from chats import FUNCTIONS, TALK, new_chat
from conftest import SOAK
from prompt_toolkit.application import Application, create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from mlx_poe import stream_generate
from mlx_poe.chat.conversation import Chat
from mlx_poe.chat.repl import Repl
from mlx_poe.chat.slash_commands import COMMANDS
from mlx_poe.chat.terminal import ChatHistory
from mlx_poe.commands.poe_chat import main
from mlx_poe.generation.display import printable


def piped(text: str, *flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mlx_poe", "chat", *flags],
        input=text,
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )


def test_through_a_pipe_only_replies_come_out(capsys):
    done = piped(
        "What is the capital of Italy?\n/mode speculative\nTell me about Kenya.\n", "--no-fallback"
    )
    assert done.stdout == (
        "The capital of Italy is Rome.\n"
        "Kenya is a country in Africa. Its capital is Nairobi, and people there speak Swahili.\n"
    )
    assert (done.returncode, done.stderr) == (0, "")
    # Its specialists come with the built-in base, typed or not.
    done = piped("/bogus\nWhat is the capital of Italy?\n", "--model", "poe-tiny")
    assert done.stdout == "The capital of Italy is Rome.\n"
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    for flags in (["--model", "nowhere"], ["--specialist", "chat"], ["--temp", "-1"]):
        assert main(flags) in (1, 2)
        out, error = capsys.readouterr()
        assert (out, error.count("\n")) == ("", 1)


@pytest.fixture
def repl() -> Repl:
    return Repl(new_chat(), COMMANDS)


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("/help", "/retry"),
        ("/mode", "[full]"),
        ("/use", "* chat (adds 2.6 MB)"),
        ("/stats", "conversation"),
        ("/system", "(none)"),
        ("/system Be brief.", ""),
        ("/stage 2", ""),
        ("/draft 0 4", ""),
        ("/temp 0.7", ""),
        ("/temp off", ""),
        ("/top-p 0.9", ""),
        ("/top-k 5", ""),
        ("/min-p 0.1", ""),
        ("/seed 1", ""),
        ("/repetition-penalty 1.2", ""),
        ("/max-tokens 9", ""),
        ("/color", ""),
        ("/use math", ""),
        ("/attach more poe-tiny-chat", ""),
        ("/reset", ""),
        ("/exit", ""),
    ],
)
def test_commands(repl, capsys, line, shown):
    assert repl.obey(line)
    captured = capsys.readouterr()
    assert shown in captured.out
    assert "poe-chat:" not in captured.err


@pytest.mark.parametrize(
    "line",
    ["/bogus", "/mode warp", "/stage", "/stage 9", "/stage x", "/draft", "/temp hot", "/top-k 1.5",
     "/max-tokens 0", "/use nobody", "/attach a", "/attach a nowhere", "/retry", "/undo", "/save",
     "/load /nowhere", "/tools /nowhere", "/save /nowhere/a/b"],
)  # fmt: skip
def test_commands_that_cannot_be_done_say_why(repl, capsys, line):
    assert not repl.obey(line)
    error = capsys.readouterr().err
    assert error.startswith("poe-chat: ")
    assert error.count("\n") == 1
    assert repl.obey("What is the capital of Italy?")
    assert capsys.readouterr().out == "The capital of Italy is Rome.\n"


def test_every_command_is_in_the_help(repl, capsys):
    repl.obey("/help")
    printed = capsys.readouterr().out
    assert all(f"/{name}" in printed for name in COMMANDS)


def test_a_call_is_shown_and_checked(repl, capsys, tmp_path):
    path = tmp_path / "functions.json"
    path.write_text(json.dumps(FUNCTIONS))
    repl.obey("/use tool")
    assert repl.obey(f"/tools {path}")
    assert repl.obey("What is the capital of Peru?")
    assert "→ get_capital({'country': 'Peru'})" in capsys.readouterr().out
    assert repl.obey("/tools off")
    assert repl.chat.settings.functions == []


def test_a_terminal_session(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    with create_pipe_input() as keys, create_app_session(input=keys, output=DummyOutput()):
        # A line given up with Ctrl-C, one of two lines, a command, and Ctrl-D.
        keys.send_text("half a line\x03")
        keys.send_text("What is the capital\x1b\rof Italy?\r")
        keys.send_text("/stats\r")
        keys.send_text("\x04")
        Repl(new_chat(), COMMANDS).run()
    printed = capsys.readouterr().out
    assert "1 exchange, " in printed
    assert "half" not in (tmp_path / "cognica-mlx" / "chat_history").read_text()


def test_ctrl_z_suspends_and_is_no_part_of_the_message(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    suspended: list[str] = []
    # The real one would suspend the tests.
    monkeypatch.setattr(
        Application,
        "suspend_to_background",
        lambda self: suspended.append(self.current_buffer.text),
    )
    chat = new_chat()
    session(chat, "What is the capital\x1a of Italy?")
    assert suspended == ["What is the capital"]
    assert [turn.user for turn in chat.turns] == ["What is the capital of Italy?"]


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_the_history_is_private_and_folders_that_exist_keep_their_mode(tmp_path, monkeypatch):
    there = tmp_path / "there"
    there.mkdir(mode=0o755)
    monkeypatch.setenv("XDG_STATE_HOME", str(there / "new" / "state"))
    before = os.umask(0o022)
    try:
        ChatHistory().store_string("a secret")
    finally:
        os.umask(before)
    folder = there / "new" / "state" / "cognica-mlx"
    assert [mode_of(f) for f in (folder, folder.parent, folder.parent.parent)] == [0o700] * 3
    assert mode_of(there) == 0o755 and mode_of(folder / "chat_history") == 0o600
    # As version 0.2 left them.
    folder.chmod(0o755)
    (folder / "chat_history").chmod(0o644)
    assert list(ChatHistory().load_history_strings()) == ["a secret"]
    assert mode_of(folder) == 0o755 and mode_of(folder / "chat_history") == 0o600


def test_a_history_in_the_null_device_leaves_it_alone(tmp_path, monkeypatch):
    changed: list[int] = []
    monkeypatch.setattr(os, "fchmod", lambda *_: changed.append(1))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    (tmp_path / "cognica-mlx").mkdir()
    (tmp_path / "cognica-mlx" / "chat_history").symlink_to(os.devnull)
    ChatHistory().store_string("gone")
    assert not changed


def test_ctrl_c_stops_the_reply_and_not_the_program(repl, capsys, monkeypatch):
    send = repl.chat.send

    def interrupted(text, progress=None):
        for count, response in enumerate(send(text, progress)):
            yield response
            if count == 2:
                raise KeyboardInterrupt

    monkeypatch.setattr(repl.chat, "send", interrupted)
    assert repl.obey(TALK[1])
    assert capsys.readouterr().out.endswith(" …\n")
    monkeypatch.undo()
    assert repl.obey(TALK[0])


def test_the_status_line_fits(repl, monkeypatch):
    repl.obey("/mode speculative")
    repl.obey(TALK[1])
    monkeypatch.setenv("COLUMNS", "120")
    repl = Repl(repl.chat, COMMANDS)
    whole = repl.status()
    for part in ("poe-tiny", "chat", "speculative", "tok/s", "stages", "accepted", "MB"):
        assert part in whole
    monkeypatch.setenv("COLUMNS", "30")
    assert len(Repl(repl.chat, COMMANDS).status()) < 30


def test_nothing_steers_the_terminal():
    assert printable("a\x1b[31mb\x07\n\tc\x9b1m\x7f") == "a[31mb\n\tc1m"


# What goes wrong


@pytest.mark.parametrize(
    ("line", "both"),
    [
        ("hello", False),
        ("/bogus", True),
        *(pytest.param(line, False, marks=SOAK) for line in ("/help", "/stop")),
        *(pytest.param(line, True, marks=SOAK) for line in ("hello", "/help", "/stop")),
    ],
)
def test_it_ends_quietly_when_nobody_reads_any_more(line, both, tmp_path):
    (tmp_path / "input").write_text(f"{line}\n" * 100_000)
    with (tmp_path / "input").open() as lines:
        process = subprocess.Popen(
            [sys.executable, "-m", "mlx_poe", "chat"],
            stdin=lines,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT if both else subprocess.PIPE,
        )
    assert process.stdout
    process.stdout.readline()
    process.stdout.close()
    try:
        status = process.wait(300)
        said = process.stderr.read() if process.stderr else b""
    finally:
        process.kill()
        process.wait()
        if process.stderr:
            process.stderr.close()
    assert (status, said) == (0, b"")


def test_it_ends_when_the_output_cannot_be_written():
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "mlx_poe", "chat"],
            input="hello\n" * 3,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and "No space left" in done.stderr


def test_it_does_without_stdin():
    command = f"{sys.executable} -m mlx_poe chat <&-"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_stop_texts_from_the_command_line_end_replies(capsys):
    done = piped("What is the capital of Italy?\n/stop\n", "--stop", " is", "--stop", "Rome")
    assert done.stdout == "The capital of Italy\n' is'\n'Rome'\n"
    for flags in (["--stop", ""], ["--max-tokens", "0"]):
        assert main(flags) == 2
        out, error = capsys.readouterr()
        assert (out, error.count("\n")) == ("", 1)


def test_stop_texts_in_the_chat(repl, capsys):
    assert repl.obey("/stop  is Rome")
    assert repl.obey("/stop Italy")
    assert repl.chat.settings.stop == ["is Rome", "Italy"]
    assert repl.obey(TALK[0])
    assert capsys.readouterr().out == "The capital of \n"
    assert repl.obey("/stop off")
    assert repl.obey(TALK[0])
    assert "Rome" in capsys.readouterr().out


@pytest.mark.parametrize("line", ["/", "/ ", "/\t", "/\n"])
def test_a_lone_slash_is_no_command(repl, capsys, line):
    assert not repl.obey(line)
    assert capsys.readouterr().err == "poe-chat: there is no command /; /help lists them\n"
    assert not repl.leaving


@pytest.mark.parametrize("path", ["~nosuchuser/x", "a\0b", "/dev/null/x", "/"])
@pytest.mark.parametrize("command", ["tools", "save", "load", "attach a"])
def test_paths_that_cannot_be_take_one_foreseen_line(repl, capsys, command, path):
    assert repl.obey(TALK[0])
    assert not repl.obey(f"/{command} {path}")
    error = capsys.readouterr().err
    assert error.startswith("poe-chat: ") and error.count("\n") == 1
    if command != "attach a":
        assert "unexpected" not in error
    assert len(repl.chat.turns) == 1


@pytest.mark.parametrize("error", [ZeroDivisionError("a\nb"), RecursionError(), MemoryError()])
def test_an_unforeseen_error_of_a_command_takes_one_line_and_a_traceback_on_demand(
    repl, capsys, monkeypatch, error
):
    def fail(*_: object) -> None:
        raise error

    assert repl.obey(TALK[0])
    monkeypatch.setattr(repl.chat.specialists, "attach", fail)
    assert not repl.obey("/attach a poe-tiny-chat")
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert type(error).__name__ in said and "/debug" in said
    assert repl.obey("/debug")
    assert "Traceback" in capsys.readouterr().err
    assert len(repl.chat.turns) == 1 and repl.obey(TALK[1])
    repl.debug = True
    assert not repl.obey("/attach a poe-tiny-chat")
    assert "Traceback" in capsys.readouterr().err


def test_an_unforeseen_error_in_a_reply_keeps_what_there_is(repl, capsys, monkeypatch):
    def fail(*arguments: object, **keywords: object):
        for count, response in enumerate(stream_generate(*arguments, **keywords)):  # type: ignore[arg-type]
            yield response
            if count == 3:
                raise ZeroDivisionError

    assert repl.obey(TALK[0])
    monkeypatch.setattr("mlx_poe.chat.conversation.stream_generate", fail)
    capsys.readouterr()
    assert not repl.obey(TALK[1])
    out, said = capsys.readouterr()
    assert out.endswith("\n") and said.count("\n") == 1 and "ZeroDivisionError" in said
    assert len(repl.chat.turns) == 2 and len(repl.chat.turns[1].reply_tokens) == 4
    monkeypatch.undo()
    assert repl.obey(TALK[2])


def test_the_help_names_the_flag_for_tracebacks():
    done = piped("", "--help")
    assert "--debug" in done.stdout and "traceback" in done.stdout


def interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_ctrl_c_in_a_command_does_not_end_the_chat(repl, capsys, monkeypatch):
    assert repl.obey(TALK[0])
    before = repl.chat.turns, repl.chat.specialists.names
    monkeypatch.setattr("mlx_poe.loading.specialists.read_checkpoint", interrupt)
    assert not repl.obey("/attach a poe-tiny-chat")
    assert capsys.readouterr().err == "poe-chat: interrupted\n"
    assert (repl.chat.turns, repl.chat.specialists.names) == before
    assert repl.obey(TALK[1])


def test_ctrl_c_in_a_retry_before_the_first_token_keeps_the_exchange(repl, monkeypatch):
    assert repl.obey(TALK[0])
    turns = repl.chat.turns
    monkeypatch.setattr("mlx_poe.chat.conversation.stream_generate", interrupt)
    repl.obey("/retry")
    assert repl.chat.turns == turns
    monkeypatch.undo()
    assert repl.obey("/retry")
    assert repl.chat.turns == turns


def test_ctrl_c_ends_a_chat_through_a_pipe(repl, monkeypatch):
    targets = ("chat.conversation.stream_generate", "loading.specialists.read_checkpoint")
    for name in (f"mlx_poe.{target}" for target in targets):
        monkeypatch.setattr(name, interrupt)
    for line in (b"hello\n", b"/attach a poe-tiny-chat\n"):
        monkeypatch.setattr("sys.stdin", TextIOWrapper(BytesIO(line)))
        with pytest.raises(KeyboardInterrupt):
            repl.run_piped()


def test_functions_outlive_saving_and_leave_the_users_penalty_alone(repl, capsys, tmp_path):
    path, saved = tmp_path / "functions.json", tmp_path / "a saved chat"
    path.write_text(json.dumps(FUNCTIONS))
    for line in ("/use tool", "/repetition-penalty 1.05", f"/tools {path}", f"/save {saved}"):
        assert repl.obey(line)
    fresh = Repl(new_chat(), COMMANDS)
    assert fresh.obey(f"/load {saved}")
    capsys.readouterr()
    assert fresh.obey("What is the capital of Peru?")
    assert "→ get_capital(" in capsys.readouterr().out
    assert fresh.obey("/tools off")
    assert fresh.chat.settings.options == {"repetition_penalty": 1.05}
    assert fresh.obey(f"/tools {path}") and fresh.obey("/system Be brief.")
    assert fresh.chat.settings.functions == []
    assert fresh.chat.settings.system_text == "Be brief."


def session(chat: Chat, *lines: str) -> None:
    """poe-chat in a terminal, given lines and then Ctrl-D."""
    with create_pipe_input() as keys, create_app_session(input=keys, output=DummyOutput()):
        for line in lines:
            keys.send_text(f"{line}\r")
        keys.send_text("\x04")
        Repl(chat, COMMANDS).run()


def break_history(tmp_path: Path, how: str) -> Path:
    folder = tmp_path / "cognica-mlx"
    if how == "folder is a file":
        folder.write_text("")
    elif how == "file is a folder":
        (folder / "chat_history").mkdir(parents=True)
    elif how == "file is a pipe":
        folder.mkdir()
        os.mkfifo(folder / "chat_history")
    elif how == "folder cannot be made":
        return Path("/proc/nowhere")
    elif how == "nobody's home":
        return Path("~nosuchuser/state")
    return tmp_path


@pytest.mark.parametrize("how", ["folder is a file", "file is a folder", "file is a pipe",
                                 "folder cannot be made", "nobody's home"])  # fmt: skip
def test_without_a_usable_history_the_chat_goes_on_and_says_so(capsys, tmp_path, monkeypatch, how):
    monkeypatch.setenv("XDG_STATE_HOME", str(break_history(tmp_path, how)))
    chat = new_chat()
    session(chat, TALK[0], "/stats")
    assert len(chat.turns) == 1
    captured = capsys.readouterr()
    assert captured.err.count("input history will not be saved") == 1
    assert "1 exchange, " in captured.out


def test_a_history_that_fails_later_is_given_up(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    history = ChatHistory()
    history.store_string("kept")
    assert history.problem is None and list(history.load_history_strings()) == ["kept"]
    history.filename = tmp_path
    history.store_string("lost")
    assert history.problem and list(history.load_history_strings()) == []
    history = ChatHistory()
    history.filename = tmp_path
    assert list(history.load_history_strings()) == [] and history.problem


def test_it_runs_where_there_is_no_home(tmp_path):
    code = (
        "import os, sys; os.environ.pop('HOME', None); os.getuid = lambda: 2**31 - 7\n"
        "from mlx_poe.chat.terminal import ChatHistory\n"
        "from mlx_poe.commands.poe_chat import main\n"
        "assert 'home' in ChatHistory().problem\n"
        "sys.exit(main(['--mode', 'speculative']))"
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("HOME", "XDG_CACHE_HOME")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        input="hello\n/save ~/x\n/load ~/x\n",
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
    )
    assert done.stdout.strip()
    # The mode may also have fallen back to full depth, in a line of its own.
    failed = [line for line in done.stderr.splitlines() if "fell back" not in line]
    assert len(failed) == 2 and all("home" in line for line in failed)
    assert list(tmp_path.iterdir()) == []


def test_a_mode_that_does_not_pay_says_that_it_fell_back(repl, capsys, monkeypatch):
    def slow(*arguments: object, **keywords: object):
        for response in stream_generate(*arguments, **keywords):  # type: ignore[arg-type]
            yield replace(response, fell_back="a token costs more")

    monkeypatch.setattr("mlx_poe.chat.conversation.stream_generate", slow)
    assert repl.obey(TALK[0])
    said = capsys.readouterr().err
    assert said == "full fell back to full depth: a token costs more (--no-fallback keeps it)\n"

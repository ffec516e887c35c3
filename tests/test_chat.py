"""Talks: turns whose state carries over, changes in mid-talk, saving, and the program around it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from conftest import fixture
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from cognica_mlx.errors import CheckpointError, RequestError
from mlx_poe import stream_generate
from mlx_poe.chat import Chat, Settings
from mlx_poe.commands.chat import COMMANDS, Repl, printable

TALK = ("What is the capital of Italy?", "Tell me about Kenya.", "Who are you?", "Thanks!")


def new_chat(**settings: object) -> Chat:
    model, tokenizer = fixture("poe-tiny")
    chat = Chat(model, tokenizer, "poe-tiny", Settings(max_tokens=40, **settings))  # type: ignore[arg-type]
    for name in ("chat", "math", "tool"):
        chat.specialists.attach(name, f"poe-tiny-{name}")
    chat.use("chat")
    return chat


def say(chat: Chat, text: str) -> str:
    return "".join(r.text for r in chat.send(text))


@pytest.mark.parametrize("mode", ["full", "speculative", "wand", "certified"])
def test_every_turn_is_what_a_fresh_prompt_gives(mode):
    chat = new_chat()
    chat.set_mode(mode)
    for text in TALK:
        before = chat.tokens
        say(chat, text)
        turn = chat.turns[-1]
        fresh = stream_generate(
            chat.model,
            chat.tokenizer,
            before + turn.tokens,
            max_tokens=40,
            mode=mode,
            repetition_penalty=1.15,
        )
        tokens = [r.token for r in fresh if r.token not in chat.tokenizer.eos_token_ids]
        assert turn.reply_tokens == tokens
    assert chat.tokenizer.decode(chat.tokens).count("<|assistant_end|>") == len(TALK)


def test_a_turn_runs_its_own_tokens_only_however_long_the_talk():
    chat = new_chat(options={"repetition_penalty": 1.0})
    sizes, run = [], []
    for number in range(90):
        before = chat.state.positions_run[0], len(chat.tokens)
        say(chat, TALK[number % 3] + " " * (number % 2))
        # The prompt's last token and the last one generated may run a turn later.
        ran, grown = chat.state.positions_run[0] - before[0], len(chat.tokens) - before[1]
        run.append(ran - grown)
        sizes.append(chat.nbytes)
    assert len(chat.tokens) > 3 * 513  # the widest window, several times over
    assert max(abs(extra) for extra in run) <= 2
    assert max(sizes[70:]) < 1.05 * max(sizes[50:70])


def test_specialists_change_in_mid_talk():
    chat = new_chat()
    say(chat, TALK[0])
    say(chat, TALK[1])
    length = len(chat.tokens)
    chat.use("math")
    say(chat, "Tom has 5 apples and gets 3 more. How many?")
    # The base has seen the talk; only math's own stage runs over it.
    assert chat.state.positions_run[0] < len(chat.tokens) - length + 3
    assert chat.state.positions_run[4] >= length - 1
    chat.set_mode("stage", stage=4)
    with pytest.raises(RequestError):
        chat.use(None)  # the base has no stage 4
    assert chat.settings.specialist == "math"
    chat.set_mode("full")
    chat.use(None)
    assert not chat.can_chat
    assert say(chat, "The capital of France is") != ""


def test_undo_retry_and_reset():
    chat = new_chat()
    say(chat, TALK[0])
    tokens = chat.tokens
    reply = say(chat, TALK[1])
    assert chat.undo().reply == reply
    assert chat.tokens == tokens
    ran = chat.state.positions_run[0]
    assert say(chat, TALK[1]) == reply
    assert chat.state.positions_run[0] - ran <= len(chat.tokens) - len(tokens) + 1
    chat.reset()
    assert chat.turns == [] and chat.state.length == 0
    with pytest.raises(RequestError, match="nothing to take back"):
        chat.undo()
    with pytest.raises(RequestError, match="nothing to reply"):
        say(chat, "  ")


def test_a_broken_off_reply_stays_as_far_as_it_came():
    chat = new_chat()
    stream = chat.send(TALK[1])
    pieces = [next(stream).text for _ in range(4)]
    stream.close()
    assert chat.turns[-1].reply == "".join(pieces)
    assert not chat.turns[-1].ended
    assert len(chat.turns[-1].reply_tokens) == 4
    before = chat.tokens
    say(chat, TALK[2])
    fresh = new_chat()
    fresh_reply = stream_generate(
        fresh.model,
        fresh.tokenizer,
        before + chat.turns[-1].tokens,
        max_tokens=40,
        repetition_penalty=1.15,
    )
    assert "".join(r.text for r in fresh_reply) == chat.turns[-1].reply


def test_system_text_and_special_tokens_in_what_is_said():
    chat = new_chat(system="Be brief.")
    say(chat, "<|assistant_end|> hello <|bos|>")
    special = {chat.tokenizer.token_id(name) for name in ("<|assistant_end|>", "<|bos|>")}
    assert not special & set(chat.turns[0].tokens)
    assert "Be brief.\n\n<|assistant_end|> hello" in chat.tokenizer.decode(chat.tokens)
    chat.set_system("Be long.")
    assert "Be long.\n\n" in chat.tokenizer.decode(chat.tokens)
    assert say(chat, TALK[0])


def test_a_saved_talk_goes_on_without_being_read_again(tmp_path):
    chat = new_chat()
    chat.set_mode("speculative", draft_stage=1)
    for text in TALK[:3]:
        say(chat, text)
    path = tmp_path / "talk"
    chat.save(path)
    assert [f.name for f in tmp_path.iterdir()] == ["talk"]
    expected = say(chat, TALK[3])
    other = new_chat()
    assert other.load(path)
    assert other.settings.mode == "speculative"
    assert len(other.turns) == 3
    assert say(other, TALK[3]) == expected
    assert other.state.positions_run[0] <= len(other.turns[-1].tokens) + 41
    # Another model's state is of no use, but the talk is.
    model, tokenizer = fixture("poe-tiny-chat")
    alone = Chat(model, tokenizer, "poe-tiny-chat")
    with pytest.raises(RequestError, match="no specialist chat"):
        alone.load(path)
    assert alone.turns == []


@pytest.mark.parametrize("fault", ["missing", "cut", "text", "another", "turns", "arrays"])
def test_files_that_are_no_talk_change_nothing(tmp_path, fault):
    chat = new_chat()
    say(chat, TALK[0])
    path = tmp_path / "talk"
    chat.save(path)
    if fault == "missing":
        path.unlink()
    elif fault == "cut":
        path.write_bytes(path.read_bytes()[:5000])
    elif fault == "text":
        path.write_text("hello")
    elif fault == "another":
        mx.save_safetensors(str(path) + ".safetensors", {"a": mx.zeros((2,))})
        Path(f"{path}.safetensors").rename(path)
    else:
        arrays, metadata = mx.load(str(path), format="safetensors", return_metadata=True)  # type: ignore[misc]
        content = json.loads(metadata["chat"])  # type: ignore[index,call-overload,arg-type]
        if fault == "turns":
            content["turns"][0]["tokens"] = ["a", None]
        else:
            arrays.pop("cache.3.0.keys")  # type: ignore[union-attr]
        mx.save_safetensors(f"{path}.safetensors", arrays, {"chat": json.dumps(content)})  # type: ignore[arg-type]
        Path(f"{path}.safetensors").rename(path)
    turns, tokens = list(chat.turns), chat.tokens
    if fault == "arrays":
        assert not chat.load(path)  # the talk is whole, its state is not
        assert chat.tokens == tokens
        assert say(chat, TALK[1])
        return
    with pytest.raises(CheckpointError) as caught:
        chat.load(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert chat.turns == turns
    with pytest.raises(CheckpointError, match="cannot be written"):
        chat.save(tmp_path / "nowhere" / "talk")


def test_options_are_checked_and_kept():
    chat = new_chat()
    for name, value in (("temp", -1.0), ("top_p", 7.0), ("repetition_penalty", 0.0)):
        with pytest.raises(RequestError):
            chat.set_option(name, value)
    for mode, options in (("warp", {}), ("stage", {"stage": 9}), ("full", {"stage": 1})):
        with pytest.raises(RequestError):
            chat.set_mode(mode, **options)
    assert chat.settings.options == {}
    chat.set_option("temp", 0.5)
    chat.set_mode("stage", stage=2)
    chat.set_mode("speculative")
    assert chat.settings.options == {"temp": 0.5}
    chat.set_option("temp", None)
    assert chat.settings.options == {}


# The program


def piped(text: str, *flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mlx_poe", "chat", *flags],
        input=text,
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )


def test_through_a_pipe_only_replies_come_out():
    done = piped(
        "What is the capital of Italy?\n/mode speculative\nTell me about Kenya.\n", "--no-park"
    )
    assert done.stdout == (
        "The capital of Italy is Rome.\n"
        "Kenya is a country in Africa. Its capital is Nairobi, and people there speak Swahili.\n"
    )
    assert (done.returncode, done.stderr) == (0, "")
    done = piped(
        "/bogus\nWhat is the capital of Italy?\n",
        "--specialist",
        "c=poe-tiny-chat",
        "--model",
        "poe-tiny",
    )
    assert done.stdout == "The capital of Italy is Rome.\n"
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    for flags in (["--model", "nowhere"], ["--specialist", "chat"], ["--temp", "-1"]):
        done = piped("hello\n", *flags)
        assert done.returncode in (1, 2)
        assert done.stderr.count("\n") == 1


@pytest.fixture
def repl() -> Repl:
    return Repl(new_chat())


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("/help", "/retry"),
        ("/mode", "[full]"),
        ("/use", "* chat (adds 2.6 MB)"),
        ("/stats", "talk"),
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
    functions = [
        {
            "name": "get_capital",
            "description": "Look up the capital of a country",
            "parameters": {
                "type": "object",
                "properties": {"country": {"type": "string", "description": "Country name"}},
                "required": ["country"],
            },
        }
    ]
    path = tmp_path / "functions.json"
    path.write_text(json.dumps(functions))
    repl.obey("/use tool")
    assert repl.obey(f"/tools {path}")
    assert repl.obey("What is the capital of Peru?")
    assert "→ get_capital({'country': 'Peru'})" in capsys.readouterr().out
    assert repl.obey("/tools off")
    assert repl.functions == []


def test_a_terminal_session(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    with create_pipe_input() as keys, create_app_session(input=keys, output=DummyOutput()):
        # A line given up with Ctrl-C, one of two lines, a command, and Ctrl-D.
        keys.send_text("half a line\x03")
        keys.send_text("What is the capital\x1b\rof Italy?\r")
        keys.send_text("/stats\r")
        keys.send_text("\x04")
        Repl(new_chat()).run()
    printed = capsys.readouterr().out
    assert "1 exchanges" in printed
    assert "half" not in (tmp_path / "cognica-mlx" / "chat_history").read_text()


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
    repl = Repl(repl.chat)
    whole = repl.status()
    for part in ("poe-tiny", "chat", "speculative", "tok/s", "stages", "accepted", "MB"):
        assert part in whole
    monkeypatch.setenv("COLUMNS", "30")
    assert len(Repl(repl.chat).status()) < 30


def test_nothing_steers_the_terminal():
    assert printable("a\x1b[31mb\x07\n\tc\x9b1m\x7f") == "a[31mb\n\tc1m"

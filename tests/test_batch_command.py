"""mlx_poe.generate --prompts: many prompts from a file, resumed where a run was killed."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from conftest import FIXTURES, fixture

import mlx_poe.commands.prompts_file as command
from cognica_mlx.calibration_file import CALIBRATION_FILE
from mlx_poe import stream_generate
from mlx_poe.commands.generate import main
from mlx_poe.loading.load import BUILT_IN

PROMPTS: list[Any] = [
    "Once there was a",
    {"prompt": "The capital of France is", "id": "fr", "mode": "speculative"},
    {"prompt": "What is the capital of Japan?", "specialist": "poe-tiny-chat", "id": 7},
    {
        "messages": [{"role": "user", "content": "What is 2 + 3?"}],
        "specialist": "poe-tiny-math",
        "temp": 0.7,
        "seed": 5,
    },
    {"tokens": [2039, 5, 6, 7], "max_tokens": 4, "stop": "never"},
    {"prompt": "Hi!", "specialist": ["poe-tiny-chat", "poe-tiny-math"], "weights": [1, 2]},
    {"prompt": "Once there was a", "mode": "wand", "p99_bounds": [0.3, 0.3, 0.3], "safety": 1.5},
]


def write(path: Path, prompts: list[Any]) -> Path:
    path.write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    return path


def read(path: Path) -> dict[int, dict[str, Any]]:
    records = [json.loads(line) for line in path.read_text().splitlines()]
    found = {record["index"]: record for record in records}
    assert len(found) == len(records)
    return found


def run(tmp_path: Path, prompts: list[Any], *flags: str) -> int:
    source = write(tmp_path / "in.jsonl", prompts)
    output = str(tmp_path / "out.jsonl")
    fixed = ("--dtype", "float32", "--no-fallback")
    return main(["--prompts", str(source), "--output", output, *fixed, *flags])


def test_each_line_gets_what_the_prompt_gets_alone(tmp_path, capsys):
    assert run(tmp_path, PROMPTS, "--max-tokens", "12", "--batch", "3", "--verbose") == 0
    records = read(tmp_path / "out.jsonl")
    assert records.keys() == set(range(len(PROMPTS)))
    shown = capsys.readouterr()
    assert shown.out == "" and "Prompts: 7" in shown.err and "tokens-per-sec" in shown.err
    model, tokenizer = fixture("poe-tiny")
    chat, _ = fixture("poe-tiny-chat")
    talk = [{"role": "user", "content": PROMPTS[2]["prompt"]}]
    alone = [
        (0, model, PROMPTS[0], {}),
        (1, model, PROMPTS[1]["prompt"], {"mode": "speculative"}),
        (2, chat, talk, {}),
        (4, model, PROMPTS[4]["tokens"], {"max_tokens": 4}),
        (6, model, "Once there was a", {"mode": "wand", "p99_bounds": [0.3] * 3, "safety": 1.5}),
    ]
    for index, its_model, prompt, options in alone:
        options = {"max_tokens": 12, **options}
        expected = list(stream_generate(its_model, tokenizer, prompt, **options))
        record = records[index]
        assert [t["token"] for t in record["tokens"]] == [r.token for r in expected]
        assert record["text"] == "".join(r.text for r in expected)
        assert record["finish_reason"] == expected[-1].finish_reason
        assert record["generation_tokens"] == len(expected)
    assert (records[1]["id"], records[2]["id"]) == ("fr", 7) and "id" not in records[0]
    assert records[1]["mode"] == "speculative" and records[1]["drafted_tokens"] > 0
    assert records[2]["model"] == "poe-tiny-chat" and records[2]["prompt"] == talk[0]["content"]
    assert records[3]["prompt"] == PROMPTS[3]["messages"]
    assert records[5]["model"] == "poe-tiny-chat+poe-tiny-math"


def test_the_output_is_what_json_prints(tmp_path, capsys):
    assert run(tmp_path, ["Once there was a"], "--max-tokens", "3") == 0
    (record,) = read(tmp_path / "out.jsonl").values()
    capsys.readouterr()
    assert main(["--prompt", "Once there was a", "--max-tokens", "3", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert list(record) == ["index", "options", *printed]
    for name in ("model", "mode", "prompt", "text", "finish_reason", "cached_tokens"):
        assert record[name] == printed[name]


def test_options_of_the_command_line_are_the_lines_defaults(tmp_path):
    prompts = ["Once", {"prompt": "Once", "seed": 4}, {"prompt": "Once", "mode": "full"}]
    flags = ["--mode", "stage", "--stage", "1", "--temp", "3", "--seed", "3", "--max-tokens", "8"]
    assert run(tmp_path, prompts, *flags) == 0
    first, second, third = (read(tmp_path / "out.jsonl")[i] for i in range(3))
    assert {t["stage"] for t in first["tokens"] + second["tokens"]} == {1}
    assert {t["stage"] for t in third["tokens"]} == {3}
    assert first["text"] != second["text"]


# --- going on -------------------------------------------------------------------------------------


def test_what_is_there_is_not_generated_again(tmp_path, capsys):
    prompts = [f"Once there was a {word}" for word in ("dog", "cat", "mouse", "house")]
    flags = ["--max-tokens", "4"]
    assert run(tmp_path, prompts, *flags) == 0
    output = tmp_path / "out.jsonl"
    whole = output.read_bytes().splitlines(keepends=True)
    # Two lines are there, a third is torn.
    output.write_bytes(b"".join(whole[:2]) + whole[2][:40])
    assert run(tmp_path, prompts, *flags) == 0
    assert "2 of 4 are already in" in capsys.readouterr().err
    lines = output.read_bytes().splitlines(keepends=True)
    assert lines[:2] == whole[:2]
    texts = {i: record["text"] for i, record in read(output).items()}
    assert texts == {record["index"]: record["text"] for record in map(json.loads, whole)}
    assert run(tmp_path, prompts, *flags) == 0
    assert output.read_bytes() == b"".join(lines)


def test_a_prompt_that_has_changed_is_generated(tmp_path):
    assert run(tmp_path, ["Once", "There"], "--max-tokens", "2") == 0
    assert run(tmp_path, ["Once", "Then"], "--max-tokens", "2") == 0
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert sorted(record["prompt"] for record in records) == ["Once", "Then", "There"]


CHANGES = [
    ("model", ["--model", "poe-tiny-math", "--ignore-chat-template"]),
    ("dtype", ["--dtype", "bfloat16"]),
    ("quantize", ["--quantize", "8"]),
    ("mode", ["--mode", "stage"]),
    ("temp", ["--temp", "0.5"]),
    ("seed", ["--seed", "3"]),
    ("max_tokens", ["--max-tokens", "3"]),
    ("stop", ["--stop", "x"]),
    ("presence_penalty", ["--presence-penalty", "1"]),
    ("top_logprobs", ["--top-logprobs", "1"]),
    ("regex", ["--regex", "[a-z ]+"]),
    ("ignore_chat_template", ["--ignore-chat-template"]),
]


@pytest.fixture(scope="module")
def answered(tmp_path_factory) -> bytes:
    """An output that holds the reply to "Once"."""
    folder = tmp_path_factory.mktemp("answered")
    assert run(folder, ["Once"], "--max-tokens", "2") == 0
    return (folder / "out.jsonl").read_bytes()


@pytest.mark.parametrize(("name", "flags"), CHANGES)
def test_a_reply_made_with_other_options_is_never_taken_for_this_one(
    tmp_path, capsys, answered, name, flags
):
    output = tmp_path / "out.jsonl"
    output.write_bytes(answered)
    assert run(tmp_path, ["Once"], "--max-tokens", "2", *flags) == 2
    shown = capsys.readouterr().err
    said = "another model" if name == "model" else f"{name} "
    assert f"reply 0 was made with {said}" in shown and "another --output" in shown, shown
    assert shown.count("\n") == 1 and output.read_bytes() == answered


def test_a_lines_own_options_and_specialists_are_compared_too(tmp_path, capsys):
    line = {"prompt": "Hi", "specialist": ["poe-tiny-chat", "poe-tiny-math"], "stop": ["\xe9"]}
    flags = ["--max-tokens", "2", "--system-prompt", "Be brief. " * 90]
    long = "[a-z]" * 99
    first = {**line, "weights": [1, 2], "regex": long}
    # How many run together decides nothing.
    assert run(tmp_path, [first], *flags) == run(tmp_path, [first], *flags, "--batch", "3") == 0
    assert "1 of 1" in capsys.readouterr().err
    # Long texts are recorded by their hashes.
    assert len(json.dumps(read(tmp_path / "out.jsonl")[0]["options"])) < 900
    for changed, name in (
        ({**first, "weights": [2, 1]}, "weights [1, 2]"),
        ({**first, "regex": long + "?"}, "regex "),
        ({**first, "specialist": ["poe-tiny-chat", "poe-tiny-tool"]}, "another model"),
    ):
        assert run(tmp_path, [changed], *flags) == 2
        assert name in capsys.readouterr().err
    assert run(tmp_path, [first], *flags[:3], "Be brief.") == 2
    assert "system_prompt" in capsys.readouterr().err


def test_another_model_in_the_same_folder_is_another_model(tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(FIXTURES / "flat-d8", folder)
    flags = ["--model", str(folder), "--max-tokens", "2"]
    assert run(tmp_path, ["Once"], *flags) == 0
    shutil.rmtree(folder)
    shutil.copytree(FIXTURES / "gqa-logop-d8", folder)
    assert run(tmp_path, ["Once"], *flags) == 2
    assert "made with another model" in capsys.readouterr().err


def test_bounds_from_another_calibration_make_another_reply(tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(BUILT_IN / "poe-tiny", folder)
    flags = ["--model", str(folder), "--max-tokens", "2", "--mode", "wand"]
    assert run(tmp_path, ["Once"], *flags) == 0
    file = folder / CALIBRATION_FILE
    content = json.loads(file.read_text())
    content["p99_bounds"][0] += 1
    file.write_text(json.dumps(content))
    assert run(tmp_path, ["Once"], *flags) == 2
    assert "reply 0 was made with calibration " in capsys.readouterr().err


def test_replies_that_do_not_say_how_they_were_made_are_unknown(tmp_path, capsys):
    output = tmp_path / "out.jsonl"
    write(output, [{"index": 0, "prompt": "Once", "text": " upon"}])
    assert run(tmp_path, ["Once"]) == 2
    assert "does not say with which options" in capsys.readouterr().err


def test_a_prompt_with_half_a_character_is_recorded_as_it_is(tmp_path, capsys):
    prompts = ["Once \ud83d", {"prompt": "Caf\xe9 \ud83d", "id": "\udc00"}]
    for _ in range(2):
        assert run(tmp_path, prompts, "--max-tokens", "2") == 0
    assert "2 of 2 are already in" in capsys.readouterr().err
    first, second = (read(tmp_path / "out.jsonl")[i] for i in range(2))
    assert (first["prompt"], second["prompt"]) == (prompts[0], prompts[1]["prompt"])
    assert second["id"] == "\udc00" and "Caf\xe9" in (tmp_path / "out.jsonl").read_text()


def test_a_file_gets_a_reply_as_soon_as_it_is_finished(tmp_path):
    prompts = [{"prompt": "Once", "max_tokens": count} for count in (9, 1)]
    assert run(tmp_path, prompts, "--batch", "2") == 0
    assert [*read(tmp_path / "out.jsonl")] == [1, 0]


# --- pipes ----------------------------------------------------------------------------------------


def test_a_pipe_gets_replies_in_order_and_is_never_read(tmp_path):
    pipe = tmp_path / "out.jsonl"
    os.mkfifo(pipe)
    received: list[str] = []
    reader = threading.Thread(target=lambda: received.extend(pipe.read_text().splitlines()))
    reader.start()
    prompts = [{"prompt": "Once", "max_tokens": count} for count in (9, 2, 5, 1)]
    assert run(tmp_path, prompts, "--batch", "4") == 0
    reader.join()
    assert [json.loads(line)["index"] for line in received] == [0, 1, 2, 3]


def test_a_dash_is_stdin_and_stdout(tmp_path, capsys, monkeypatch):
    assert run(tmp_path, ["Once", "Caf\xe9"], "--max-tokens", "2") == 0
    lines = (tmp_path / "in.jsonl").read_bytes()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines)))
    monkeypatch.chdir(tmp_path)
    flags = ["--max-tokens", "2", "--dtype", "float32"]
    assert main(["--prompts", "-", "--output", "-", *flags]) == 0
    shown = capsys.readouterr()
    printed = {record["index"]: record for record in map(json.loads, shown.out.splitlines())}
    texts = {i: record["text"] for i, record in read(tmp_path / "out.jsonl").items()}
    assert {i: record["text"] for i, record in printed.items()} == texts
    assert not shown.err and not (tmp_path / "-").exists()
    assert main(["--prompts", "in.jsonl", "--output", os.devnull, *flags]) == 0
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b'"Once"\n5\n')))
    assert main(["--prompts", "-", "--output", "-", *flags]) == 2
    assert "stdin, line 2: expected an object" in capsys.readouterr().err


def test_a_full_disk_is_named(tmp_path, capsys):
    source = write(tmp_path / "in.jsonl", ["Once"])
    flags = ["--prompts", str(source), "--output", "/dev/full", "--max-tokens", "1"]
    assert main(flags) == 1
    assert "/dev/full cannot be written: No space left" in capsys.readouterr().err


def test_process_substitutions_are_read_and_written_once():
    flags = ["--max-tokens", "1"]
    pipes = [os.pipe() for _ in range(2)]
    (prompts, feed), (received, output) = pipes
    os.write(feed, b'"Once"\n')
    os.close(feed)
    # As a shell names them; /dev/stdout is one of these.
    assert main(["--prompts", f"/dev/fd/{prompts}", "--output", f"/dev/fd/{output}", *flags]) == 0
    os.close(output)
    os.close(prompts)
    (reply,) = os.read(received, 1 << 16).splitlines()
    os.close(received)
    assert json.loads(reply)["prompt"] == "Once"


@pytest.mark.parametrize("content", [b"notes\n", b'{"index": 0}\n', b"[1]\n", b"my notes"])
def test_a_file_of_something_else_is_left_alone(tmp_path, capsys, content):
    output = tmp_path / "out.jsonl"
    output.write_bytes(content)
    assert run(tmp_path, ["Once"]) == 2
    assert "was not written by this command" in capsys.readouterr().err
    assert output.read_bytes() == content


# Is killed with its fifth reply in hand.
KILLED = """
import os, signal
import mlx_poe.commands.prompts_file as command
from mlx_poe.commands.generate import main
real, calls = command.as_json, []
def killed(*args):
    calls.append(1)
    if len(calls) == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args)
command.as_json = killed
main()
"""


def test_a_run_that_is_killed_goes_on(tmp_path):
    source = write(tmp_path / "in.jsonl", [f"Once there was a {i}" for i in range(12)])
    output = tmp_path / "out.jsonl"
    # So short that several replies fit into a file's buffer.
    flags = ["--prompts", str(source), "--output", str(output), "--max-tokens", "9"]
    done = subprocess.run([sys.executable, "-c", KILLED, *flags, "--batch", "2"])
    assert done.returncode == -signal.SIGKILL
    before = read(output)
    assert len(before) == 4
    assert main([*flags, "--batch", "6"]) == 0
    after = read(output)
    assert after.keys() == set(range(12))
    assert {i: after[i] for i in before} == before


def test_ctrl_c_keeps_what_is_finished(tmp_path, monkeypatch, capsys):
    real = command.as_json
    calls: list[int] = []

    def interrupted(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(command, "as_json", interrupted)
    assert run(tmp_path, ["Once"] * 5, "--max-tokens", "2", "--batch", "1") == 130
    assert len(read(tmp_path / "out.jsonl")) == 2
    assert "interrupted" in capsys.readouterr().err


# --- what is wrong --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("{", "line 3: "),
        ("5", "line 3: expected an object or a string"),
        ("{}", "line 3: expected exactly one of prompt, messages, tokens"),
        ('{"prompt": "a", "tokens": [1]}', "line 3: expected exactly one of prompt"),
        ('{"prompt": 5}', "line 3: prompt must be a string"),
        ('{"messages": "a"}', "line 3: messages must be"),
        ('{"prompt": ""}', "line 3: the prompt is empty"),
        ('{"prompt": "a", "temperature": 1}', "line 3: there is no option temperature"),
        ('{"prompt": "a", "mode": "deep"}', "line 3: mode 'deep'"),
        ('{"prompt": "a", "mode": "certified"}', "line 3: certified no longer exists: use spec"),
        ('{"prompt": "a", "draft_rank": 8}', "line 3: draft_rank no longer exists: use draft_bits"),
        ('{"prompt": "a", "stage": 1}', "line 3: stage belongs to mode stage"),
        ('{"prompt": "a", "specialist": "no/such/model/at-all"}', "line 3: "),
        ('{"prompt": "a", "weights": [1]}', "line 3: weights need several"),
        ('{"prompt": "a", "temp": "hot"}', "line 3: "),
        ('{"prompt": "a", "max_tokens": 0}', "line 3: max_tokens 0"),
        ('{"prompt": "a", "max_tokens": "many"}', "line 3: "),
        ('{"prompt": "a", "mode": ["full"]}', "line 3: "),
        ('{"tokens": [2048]}', "line 3: token id 2048"),
        ('{"messages": [{"role": "nobody", "content": "x"}]}', "line 3: message 1"),
    ],
)
def test_a_bad_line_is_named_before_any_work(tmp_path, capsys, monkeypatch, line, named):
    monkeypatch.setattr(command, "run_requests", None)
    source = tmp_path / "in.jsonl"
    source.write_text(f'"Once"\n\n{line}\n')
    output = tmp_path / "out.jsonl"
    assert main(["--prompts", str(source), "--output", str(output)]) == 2
    shown = capsys.readouterr().err
    assert named in shown and shown.count("\n") == 1
    assert not output.exists()


@pytest.mark.parametrize(
    ("line", "flags", "named"),
    [
        ({"messages": [{"role": "user", "content": "Hi"}]}, [], "begin messages with"),
        ({"tokens": [5]}, [], "begin messages with"),
        ("Hi", [], "needs a specialist"),
        (
            "Hi",
            ["--model", "poe-tiny-chat", "--ignore-chat-template"],
            "needs a specialist and its",
        ),
    ],
)
def test_a_system_prompt_that_a_line_cannot_use_is_refused(tmp_path, capsys, line, flags, named):
    assert run(tmp_path, [line], *flags, "--system-prompt", "Be brief.") == 2
    error = capsys.readouterr().err
    assert "line 1: --system-prompt" in error and named in error


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ([], "give a prompt with --prompt, or a file"),
        (["--prompt", "a", "--prompts", "b", "--output", "c"], "give a prompt with --prompt"),
        (["--prompt", "a", "--output", "c"], "--output needs --prompts"),
        (["--prompts", "b"], "--prompts needs --output"),
        (["--prompts", "b", "--output", "c", "--batch", "0"], "--batch 0"),
        (["--prompts", "/no/such/file", "--output", "c"], "/no/such/file cannot be read"),
        (["--prompts", "/dev/null", "--output", "c"], "contains no prompts"),
    ],
)
def test_flags_that_make_no_sense(flags, named, capsys):
    assert main(flags) == 2
    assert named in capsys.readouterr().err


def test_an_output_that_cannot_be_written(tmp_path, capsys):
    source = write(tmp_path / "in.jsonl", ["Once"])
    output = str(tmp_path / "no" / "folder" / "out.jsonl")
    assert main(["--prompts", str(source), "--output", output]) == 2
    shown = capsys.readouterr().err
    assert f"{output}: there is no folder" in shown and shown.count("\n") == 1

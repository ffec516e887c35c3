"""Constraints where people meet them: flags, files of prompts, the chat, the benchmark."""

import json
import os
import subprocess
import sys
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import jsonschema
import pytest
from chats import FUNCTIONS, new_chat

from cognica_mlx.bench.sections import constrained
from cognica_mlx.decoding.constraint import Grammar
from cognica_mlx.decoding.json_schema import json_grammar
from mlx_poe.chat.conversation import Chat
from mlx_poe.chat.repl import Repl
from mlx_poe.chat.slash_commands import COMMANDS
from mlx_poe.commands import bench
from mlx_poe.commands.generate import main
from mlx_poe.generation.tools import CALL_MARK

SCHEMA = {
    "type": "object",
    "properties": {"country": {"enum": ["Peru", "Kenya"]}, "big": {"type": "boolean"}},
    "required": ["country", "big"],
    "additionalProperties": False,
}


def fits(text: str) -> bool:
    """Whether a reply is JSON of the schema."""
    jsonschema.validate(json.loads(text), SCHEMA)
    return True


@pytest.fixture
def schema_file(tmp_path: Path) -> Path:
    path = tmp_path / "schema.json"
    path.write_text(json.dumps(SCHEMA))
    return path


@pytest.mark.parametrize("mode", ["full", "speculative", "wand"])
def test_a_schema_from_a_file_or_as_text(mode, schema_file, capsys):
    for schema in (str(schema_file), json.dumps(SCHEMA)):
        flags = ["--json-schema", schema, "--mode", mode, "--no-fallback", "--verbose"]
        assert main(["--prompt", "A country:", *flags]) == 0
        shown = capsys.readouterr()
        assert fits(shown.out) and "Forced by the constraint: " in shown.err


def test_a_schema_from_a_file_with_a_byte_order_mark_or_through_a_pipe(tmp_path, capsys):
    (tmp_path / "marked").write_text("\ufeff" + json.dumps(SCHEMA), encoding="utf-8")
    reading, writing = os.pipe()
    os.write(writing, json.dumps(SCHEMA).encode())
    os.close(writing)
    for source in (tmp_path / "marked", f"/dev/fd/{reading}"):
        assert main(["--prompt", "A country:", "--json-schema", str(source)]) == 0
        assert fits(capsys.readouterr().out)
    os.close(reading)
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    assert main(["--prompt", "x", "--regex", str(tmp_path / "latin")]) == 2
    assert "regex: " in (error := capsys.readouterr().err) and "not UTF-8 text" in error


def test_json_output_says_what_was_forced(capsys):
    assert main(["--prompt", "x", "--regex", "abc(d|e)", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["finish_reason"] == "stop" and record["tokens"][0]["forced"]
    assert not all(token["forced"] for token in record["tokens"])


def test_a_grammar_and_functions(tmp_path, capsys):
    grammar = tmp_path / "g.lark"
    grammar.write_text('start: "yes" | "no"\n')
    assert main(["--prompt", "Is it?", "--grammar", str(grammar)]) == 0
    assert capsys.readouterr().out.strip() in ("yes", "no")
    about = ["--model", "poe-tiny-tool", "--prompt", "What is the capital of Peru?"]
    assert main([*about, "--tools", json.dumps(FUNCTIONS), "--tool-choice", "required"]) == 0
    assert capsys.readouterr().out.startswith(CALL_MARK)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--regex", "("], "regex: "),
        (["--json-schema", "nowhere.json"], "neither a file nor JSON"),
        (["--json-schema", "{}", "--regex", "a"], "cannot be combined"),
        (["--tool-choice", "auto"], "no tools"),
        (["--grammar", "start: x"], "grammar: "),
        (["--json-schema", "/dev/full/x"], "neither a file nor JSON"),
        (["--json-schema", "{" * 90_000], "not JSON"),
    ],
)
def test_bad_flags_end_with_one_line(flags, message, capsys):
    assert main(["--prompt", "x", *flags]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and message in shown.err and shown.err.count("\n") == 1


def test_each_prompt_of_a_file_has_its_own(tmp_path, capsys):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [
        {"prompt": "Is it?"},
        {"prompt": "A country:", "json_schema": SCHEMA},
        {"prompt": "Which?", "grammar": 'start: "this" | "that"', "mode": "speculative"},
    ]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    flags = ["--prompts", str(source), "--output", str(output), "--no-fallback"]
    assert main([*flags, "--regex", "yes|no"]) == 0
    records = {r["index"]: r for r in map(json.loads, output.read_text().splitlines())}
    assert records[0]["text"] in ("yes", "no") and fits(records[1]["text"])
    assert records[2]["text"] in ("this", "that")
    source.write_text(json.dumps({"prompt": "x", "regex": "("}) + "\n")
    assert main(["--prompts", str(source), "--output", str(tmp_path / "other")]) == 2
    assert "line 1: regex: " in capsys.readouterr().err


def test_a_schema_in_the_chat(schema_file, tmp_path):
    def said(chat: Chat, text: str) -> str:
        return "".join(r.text for r in chat.send(text))

    repl = Repl(new_chat(), COMMANDS)
    chat = repl.chat
    repl.obey(f"/schema {schema_file}")
    assert fits(said(chat, "Tell me about Kenya."))
    saved = tmp_path / "saved"
    chat.save(saved)
    repl.obey("/schema nowhere")  # the old one stays
    assert fits(said(chat, "And now?"))
    repl.obey("/schema off")
    with pytest.raises(ValueError):
        json.loads(said(chat, "Tell me about Kenya."))
    chat.load(saved)
    assert chat.settings.schema == SCHEMA and fits(said(chat, "Once more."))


def test_calls_in_the_chat_fit_the_functions():
    chat = new_chat()
    chat.use("tool")
    chat.set_functions(FUNCTIONS)
    text = "".join(r.text for r in chat.send("What is the capital of Peru?"))
    assert text.startswith(CALL_MARK)
    assert any(r.forced for r in chat.last)


def test_the_chat_through_a_pipe(schema_file):
    done = subprocess.run(
        [sys.executable, "-m", "mlx_poe", "chat"],
        input=f"/schema {schema_file}\nTell me about Kenya.\n/schema\n",
        capture_output=True,
        text=True,
    )
    assert fits(done.stdout) and done.returncode == 1 and done.stderr.count("\n") == 1


def test_the_benchmark_can_ask_for_every_token_that_is_forced():
    grammar = Grammar(constrained.made_up(600), json_grammar({"const": "forced"}))
    one_by_one = constrained._one_by_one(grammar.start())
    assert grammar.start().forced() and not one_by_one.forced()


def test_the_benchmark_has_a_section(capsys, tmp_path, monkeypatch):
    # A clock that ticks each time somebody looks: a busy machine's may stand still in a mask.
    monkeypatch.setattr(constrained, "time", SimpleNamespace(perf_counter=count().__next__))
    monkeypatch.setattr(constrained, "FORM_TOKENS", 40)
    monkeypatch.setattr(constrained, "ROUNDS", 5)
    flags = ["--only", "constrained", "--shape", "tiny", "--trials", "1", "-m", "8"]
    flags += ["--context", "32"]
    report = tmp_path / "r.json"
    assert bench.main([*flags, "--dtype", "float32", "--json", str(report)]) == 0
    figures = {f["name"]: f for f in json.loads(report.read_text())["figures"]}
    assert 0 < figures["masks in a string"]["value"] < 100
    assert figures["a form, certain stretches in one pass"]["speedup"] > 0
    assert "certain stretches" in capsys.readouterr().out

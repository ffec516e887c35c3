"""Every script in examples/ runs as it comes and shows what it promises."""

import json
import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlx_poe import load, stream_generate

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def shown(capsys) -> Callable[..., list[str]]:
    """Runs an example's `main` with these arguments; the lines that it prints."""

    def run(name: str, *arguments: Any) -> list[str]:
        runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"](*arguments)
        return capsys.readouterr().out.splitlines()

    return run


def test_every_example_is_tested_and_short():
    text = Path(__file__).read_text(encoding="utf-8")
    for path in EXAMPLES.glob("*.py"):
        assert f'shown("{path.stem}"' in text
        assert 20 <= len(path.read_text(encoding="utf-8").splitlines()) <= 60


def test_early_exit_puts_each_token_in_its_stages_column(shown):
    header, *tokens, share, depth = shown("early_exit", "Once upon a time")
    model, tokenizer = load()
    expected = [
        (r.stage, repr(r.text))
        for r in stream_generate(model, tokenizer, "Once upon a time", mode="wand", max_tokens=40)
    ]
    columns = {header.index(f"stage {stage}"): stage for stage in range(4)}
    assert [(columns[len(t) - len(t.lstrip())], t.strip()) for t in tokens] == expected
    assert len({stage for stage, _ in expected}) > 1
    first = sum(stage == 0 for stage, _ in expected)
    assert share.startswith(f"{first} of {len(expected)} tokens needed only the first stage")
    mean = sum(stage + 1 for stage, _ in expected) / len(expected)
    assert depth == f"the mean depth is {mean:.2f} of 4 stages."


def test_specialists_reply_each_in_its_own_way(shown):
    lines = shown("specialists")
    size, *added = (float(re.search(r"([\d.]+) MB", line)[1]) for line in lines[:3])
    assert max(added) < size / 2
    replies = [line.split(": ", 1)[1] for line in lines if line.startswith("  ")]
    assert len(replies) == 6 and "Nairobi" in replies[0]
    assert replies[4].endswith("The answer is 5.") and replies[5] == replies[4]


def test_extraction_makes_a_record_of_each_line(shown, tmp_path):
    records = [json.loads(line)["record"] for line in shown("extract")]
    assert records == [{"country": name} for name in ("Peru", "Japan", "Chile")]
    file = tmp_path / "lines.txt"
    file.write_text("What is the capital of Peru?\n\nNothing of the kind.\n")
    records = [json.loads(line)["record"] for line in shown("extract", file)]
    assert len(records) == 2 and all(set(record) == {"country"} for record in records)


def test_the_client_streams_a_reply_from_its_own_server(shown):
    address, *tokens = shown("client", "What is the capital of Japan?")
    assert re.fullmatch(r"asking http://127\.0\.0\.1:\d+/v1", address)
    found = [re.fullmatch(r"stage ([0-4])( drafted)? +('.*')", token) for token in tokens]
    assert "".join(one[3][1:-1] for one in found) == "The capital of Japan is Tokyo."


def test_the_trained_specialist_knows_what_it_was_told(shown, tmp_path):
    lines = shown("train", tmp_path)
    told = lines[lines.index(str(tmp_path / "colors")) + 1 :]
    assert [line.split("? ")[1] for line in told] == [
        *("It is yellow.", "It is blue.", "It is green."),
    ]

"""The examples of docs/server.md, run as written; they give what it shows."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = (Path(__file__).parent.parent / "docs" / "server.md").read_text(encoding="utf-8")
ADDRESS = "http://127.0.0.1:8080"


def shown(kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", PAGE, re.DOTALL)


def examples(command: str) -> list[tuple[str, str]]:
    """Commands with what they print."""
    found = []
    for block in shown("console"):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            lines = part.splitlines()
            # A command goes on as long as a quotation is open.
            texts = ["\n".join(lines[: i + 1]) for i in range(len(lines))]
            end = next(i for i, text in enumerate(texts) if text.count("'") % 2 == 0)
            found.append(("\n".join(lines[: end + 1]), "\n".join(lines[end + 1 :]).strip()))
    return [pair for pair in found if pair[0].startswith(f"{command} ")]


def without_chance(text: str) -> str:
    """What differs from request to request left out."""
    text = re.sub(r'"id":"(\w+)-[^"]+"', r'"id":"\1"', text)
    text = re.sub(r'"created":(\d+|…)', '"created":0', text)
    return re.sub(r'"cached_tokens":\d+', '"cached_tokens":0', text).strip()


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")
@pytest.mark.parametrize("command, output", examples("curl"))
def test_curl(server, command, output):
    command = command.replace(ADDRESS, server.url)
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert without_chance(done.stdout) == without_chance(output)


def test_openai(server):
    (code,) = shown("python")
    code = code.replace(ADDRESS, server.url)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "The capital of Italy is Rome.\n"


@pytest.mark.skipif(not shutil.which("llm"), reason="llm is not installed")
@pytest.mark.parametrize("command, output", examples("llm"))
def test_llm(server, tmp_path, command, output):
    (models,) = shown("yaml")
    (tmp_path / "extra-openai-models.yaml").write_text(models.replace(ADDRESS, server.url))
    env = {**os.environ, "LLM_USER_PATH": str(tmp_path)}
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=env)
    assert done.stdout.strip() == output, done.stderr

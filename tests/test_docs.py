"""What the README and docs/ say is there, is there."""

import ast
import re
import shlex
import subprocess
import sys
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest
from commands_page import PAGE, page
from conftest import SOAK
from test_pace import CHEAP

from mlx_poe.commands import generate as generate_command
from mlx_poe.loading import machine_costs as machine

ROOT = Path(__file__).parent.parent
PAGES = [*(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "SECURITY", "CHANGELOG"))]
PAGES += sorted((ROOT / "docs").glob("*.md"))
README = PAGES[0].read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["README.md", "docs/python.md"])
def test_the_python_of_a_page_runs_as_written(name, capsys):
    text = (ROOT / name).read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert blocks
    space: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, name, "exec"), space)
    assert "Paris" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["README.md", "docs/python.md"])
def test_the_replies_that_a_page_shows_are_what_its_commands_print(
    name, capsys, monkeypatch, tmp_path
):
    # On a busy machine WAND may fall back to full depth, which says something else.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(machine, "measure", lambda *_, **__: CHEAP)
    text = (ROOT / name).read_text(encoding="utf-8")
    shown = re.findall(r"^\$ (mlx_poe\.generate .*?)(?=^\$|^```)", text, re.DOTALL | re.MULTILINE)
    assert shown
    for part in shown:
        words, output = _command(part)
        if output:
            assert generate_command.main(words[1:]) == 0
            assert capsys.readouterr().out.strip() == output


def _command(shown: str) -> tuple[list[str], str]:
    """The words of a command, which ends with the first line that closes its quotes, and what it
    prints to stdout."""
    lines = shown.splitlines()
    for count in range(1, len(lines) + 1):
        with suppress(ValueError):
            words = shlex.split("\n".join(lines[:count]))
            return words, "\n".join(lines[count:]).split("==========")[0].strip()
    raise AssertionError(f"no end of {shown}")


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    for link in re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8")):
        assert "://" in link or (path.parent / link).exists(), link


def test_the_readme_stays_short_and_names_every_module():
    assert len(README.splitlines()) <= 180
    layout = README[README.index("## Layout") :]
    for folder in ("cognica_mlx", "convert", "bench", "mlx_poe"):
        for path in (ROOT / folder).rglob("*.py"):
            parents = {f"{parent.name}/" for parent in path.parents}
            listed = re.search(rf"\b{path.stem}\b", layout) or "commands/" in parents
            assert listed or path.stem.startswith("__") or _only_re_exports(path), path


def _only_re_exports(path: Path) -> bool:
    """Whether a module is nothing but a documented path to others."""
    body = ast.parse(path.read_text(encoding="utf-8")).body[1:]  # without the docstring
    return bool(body) and all(isinstance(part, ast.ImportFrom) for part in body)


@pytest.mark.parametrize("package", ["cognica_mlx", "mlx_poe"])
def test_a_package_has_at_most_twelve_rooms(package):
    rooms = [
        path.name
        for path in (ROOT / package).iterdir()
        if (path.name != "models" and any(path.glob("*.py")))
        or (path.suffix == ".py" and path.stem[:2] != "__" and not _only_re_exports(path))
    ]
    assert len(rooms) <= 12, sorted(rooms)


def test_no_two_modules_have_the_same_name():
    names = Counter(
        path.name
        for folder in ("cognica_mlx", "convert", "bench", "mlx_poe")
        for path in (ROOT / folder).rglob("*.py")
        if path.stem != "__init__" and not _only_re_exports(path)
    )
    assert [name for name, count in names.items() if count > 1] == []


def test_importing_loads_only_what_is_needed():
    script = "import sys, mlx_poe, mlx_poe.commands.server; print(*sys.modules)"
    loaded = subprocess.check_output([sys.executable, "-c", script], text=True).split()
    unneeded = {"mlx_lm", "starlette", "matplotlib", "prompt_toolkit", "rich", "lm_eval"}
    assert len(loaded) < 900 and not unneeded & set(loaded)


def test_the_page_of_commands_is_what_help_says():
    """`python tests/commands_page.py` writes it anew."""
    assert PAGE.read_text(encoding="utf-8") == page()


@SOAK
@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_the_tests_that_a_page_names_would_run(path):
    """A mark, or another name, may leave a page's command without any test."""
    for command in re.findall(r"python -m (pytest [^`\n]+)", path.read_text(encoding="utf-8")):
        words = shlex.split(command, comments=True)
        if any(word.startswith("tests/") for word in words):
            found = subprocess.run(
                [sys.executable, "-m", *words, "--collect-only", "-q"],
                capture_output=True,
                cwd=ROOT,
            )
            assert found.returncode == 0, command

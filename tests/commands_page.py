"""Writes docs/commands.md from the commands' own parsers: `python tests/commands_page.py`."""

import argparse
from importlib import import_module
from pathlib import Path
from textwrap import dedent

from mlx_poe.__main__ import VERBS
from mlx_poe.chat.slash_commands import COMMANDS

PAGE = Path(__file__).parent.parent / "docs" / "commands.md"
TOP = """# Commands

`python tests/commands_page.py` makes this page from what each command's `--help` says. Every
command also runs as `python -m mlx_poe <verb>`. Text goes to stdout, everything else to stderr. The
exit status is 2 for a request that makes no sense, 1 for work that failed, 130 after Ctrl-C.
"""


def page() -> str:
    """The whole page."""
    parsers = [import_module(module).build_parser() for module in VERBS.values()]
    chat = "\n".join(
        f"| `/{_cell(f'{name} {command.arguments}'.strip())}` | {command.purpose} |"
        for name, command in COMMANDS.items()
    )
    sections = [_section(parser) for parser in parsers]
    inside = f"### Inside poe-chat\n\n| command | |\n|---|---|\n{chat}"
    return "\n".join([TOP, *sections, inside, ""])


def _section(parser: argparse.ArgumentParser) -> str:
    lines = [f"## {parser.prog}", "", parser.description or "", ""]
    for group in parser._action_groups:
        shown = [a for a in group._group_actions if a.help != argparse.SUPPRESS]
        shown = [a for a in shown if a.dest != "help"]
        if not shown:
            continue
        title = "" if group.title in ("options", "positional arguments") else group.title
        lines += [f"| {title} | |", "|---|---|"]
        lines += [f"| `{_flags(action)}` | {_help(parser, action)} |" for action in shown]
        lines.append("")
    examples = dedent((parser.epilog or "").removeprefix("examples:\n").rstrip())
    return "\n".join([*lines, "```bash", examples, "```", ""])


def _flags(action: argparse.Action) -> str:
    value = ""
    if action.nargs != 0:
        choices = "|".join(map(str, action.choices)) if action.choices else None
        value = f" {action.metavar or choices or action.dest.upper()}"
    flags = ", ".join(flag for flag in action.option_strings if not flag.startswith("--no-"))
    return _cell(f"{flags or ', '.join(action.option_strings)}{value}")


def _help(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    fields = {**vars(action), "prog": parser.prog}
    return _cell((action.help or "") % fields)


def _cell(text: str) -> str:
    return text.replace("\n", " ").replace("|", r"\|")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")

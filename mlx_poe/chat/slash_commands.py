"""poe-chat's commands: what each `/name` does.

- in: the `Repl`, and the text after the command's name
- out: a change to the chat, or something shown; PoEError on failure
- knows nothing about where lines come from
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.table import Table

from cognica_mlx.decoding.modes import MODES
from cognica_mlx.errors import RequestError
from cognica_mlx.scheme import DRAFT_BITS
from mlx_poe.generation.responses import drafts_in_words
from mlx_poe.generation.text import GenerationResponse
from mlx_poe.paths import user_path
from mlx_poe.rows import read_text

if TYPE_CHECKING:
    from mlx_poe.chat.conversation import Chat
    from mlx_poe.commands.poe_chat import Repl


@dataclass(frozen=True)
class Command:
    """A command's arguments and purpose, as the help shows them, and its function."""

    arguments: str
    purpose: str
    do: Callable[[Repl, str], None]


class _Misused(Exception):
    """The arguments do not match the help."""


def perform(repl: Repl, line: str) -> None:
    """Run a line that begins with /. RequestError if there is no such command."""
    name, argument = [*line[1:].split(maxsplit=1), "", ""][:2]
    if name not in COMMANDS:
        raise RequestError(f"there is no command /{name}; /help lists them")
    command = COMMANDS[name]
    try:
        command.do(repl, argument.strip())
    except _Misused:
        raise RequestError(f"usage: /{name} {command.arguments}") from None


def printable(text: str) -> str:
    """`text` without control characters, which could affect the terminal. Keeps tab and newline."""
    return "".join(c for c in text if c in "\n\t" or not _is_control(ord(c)))


def _is_control(code: int) -> bool:
    return code < 32 or 127 <= code < 160


def mean_depth(responses: Sequence[GenerationResponse], n_stages: int) -> str:
    """The tokens' average depth, in words. Forced tokens, which ran no stage, do not count."""
    asked = [r for r in responses if not r.forced] or responses
    mean = sum(r.stage + 1 for r in asked) / len(asked)
    return f"{mean:.1f} of {n_stages} stages"


def _word(argument: str) -> str:
    words = argument.split()
    if len(words) != 1:
        raise _Misused
    return words[0]


def _number(kind: type[int] | type[float], argument: str) -> int | float:
    try:
        return kind(_word(argument))
    except ValueError:
        whole = "whole " if kind is int else ""
        raise RequestError(f"{argument!a:.40} is not a {whole}number") from None


def _help(repl: Repl, argument: str) -> None:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, command in COMMANDS.items():
        table.add_row(f"/{name} {command.arguments}".rstrip(), command.purpose)
    repl.show(table)
    repl.show("Start a message with // if it should begin with a slash.", style="dim")


def _mode(repl: Repl, argument: str) -> None:
    if argument:
        repl.chat.set_mode(_word(argument))
        return
    current = repl.chat.settings.mode
    repl.show(" ".join(f"[{mode}]" if mode == current else mode for mode in MODES))


def _stage(repl: Repl, argument: str) -> None:
    repl.chat.set_mode("stage", stage=_number(int, argument))


def _draft(repl: Repl, argument: str) -> None:
    options: dict[str, Any] = {}
    numbers = []
    for word in argument.split():
        bits = word.removesuffix("-bit")
        if word == "lookup":
            options["draft_lookup"] = True
        elif bits != word or (word in DRAFT_BITS and not word.isdigit()):
            options["draft_bits"] = bits
        else:
            numbers.append(word)
    stage, *length = numbers or ["" if not options else "0"]
    options["draft_stage"] = _number(int, stage)
    if length:
        options["num_draft_tokens"] = _number(int, " ".join(length))
    repl.chat.set_mode("speculative", **options)


def _option(name: str, kind: type[int] | type[float]) -> Callable[[Repl, str], None]:
    def change(repl: Repl, argument: str) -> None:
        repl.chat.set_option(name, None if argument == "off" else _number(kind, argument))

    return change


def _max_tokens(repl: Repl, argument: str) -> None:
    repl.chat.set_max_tokens(int(_number(int, argument)))


def _stop(repl: Repl, argument: str) -> None:
    chat = repl.chat
    if argument:
        chat.set_stop([] if argument == "off" else [*chat.settings.stop, argument])
    else:
        repl.show("\n".join(map(repr, chat.settings.stop)) or "(none)")


def _system(repl: Repl, argument: str) -> None:
    chat = repl.chat
    if not argument:
        repl.show(printable(chat.settings.system_text) or "(none)")
        return
    if chat.settings.functions:
        repl.note("the functions are no longer offered: the system text takes their place")
    chat.set_system("" if argument == "off" else argument)


def _tools(repl: Repl, argument: str) -> None:
    repl.chat.set_functions(_file_or_off(argument))


def _schema(repl: Repl, argument: str) -> None:
    repl.chat.set_schema(_file_or_off(argument))


def _file_or_off(argument: str) -> str | None:
    """The named file's text; None for "off"."""
    if not argument:
        raise _Misused
    if argument == "off":
        return None
    path = user_path(argument)
    if not path.is_file():
        raise RequestError(f"{path} is not a regular file")
    return read_text(path)


def _use(repl: Repl, argument: str) -> None:
    chat = repl.chat
    names = chat.specialists.names
    if argument:
        name = _word(argument)
        chat.use(None if name == "base" and "base" not in names else name)
        if not chat.can_chat:
            repl.note("the base model was not trained to chat; it continues text")
        return
    if not names:
        repl.note("no specialists: start with --specialist NAME=MODEL, or /attach one")
    for name in (*names, "base"):
        current = name == (chat.settings.specialist or "base")
        size = chat.specialists.nbytes(name) / 1e6 if name in names else 0
        adds = f" (adds {size:.1f} MB)" if size else ""
        repl.show(f"{'*' if current else ' '} {printable(name)}{adds}")


def _attach(repl: Repl, argument: str) -> None:
    name, model = [*argument.split(maxsplit=1), "", ""][:2]
    if not model:
        raise _Misused
    # May be a folder, a hub id or a built-in name. This refuses only impossible paths.
    user_path(model)
    repl.chat.specialists.attach(name, model)


def _retry(repl: Repl, argument: str) -> None:
    repl.reply()


def _undo(repl: Repl, argument: str) -> None:
    turn = repl.chat.undo()
    repl.note(f"taken back: {printable(turn.user)[:60]}")


def _reset(repl: Repl, argument: str) -> None:
    repl.chat.reset()


def _save(repl: Repl, argument: str) -> None:
    if not argument:
        raise _Misused
    path = user_path(argument)
    repl.chat.save(path)
    repl.note(f"saved to {path}")


def _load(repl: Repl, argument: str) -> None:
    if not argument:
        raise _Misused
    chat = repl.chat
    ready = chat.load(user_path(argument))
    again = "" if ready else "; its state cannot be used, so the next reply reruns the conversation"
    repl.note(f"{_exchanges(chat)}{again}")
    for turn in chat.turns[-2:]:
        repl.show(f">>> {printable(turn.user)}", style="dim")
        repl.show(printable(turn.reply))


def _exchanges(chat: Chat) -> str:
    count = len(chat.turns)
    return "1 exchange" if count == 1 else f"{count} exchanges"


def _stats(repl: Repl, argument: str) -> None:
    chat, last = repl.chat, repl.chat.last
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    if last:
        table.add_row("prompt", f"{last[-1].prompt_tps:.1f} tokens/s")
        table.add_row("reply", f"{len(last)} tokens, {last[-1].generation_tps:.1f} tokens/s")
        table.add_row("depth", mean_depth(last, chat.model.poe_n_stages))
        stages = Counter(r.stage for r in last if not r.forced)
        table.add_row("stages", ", ".join(f"{k}: {stages[k]}" for k in sorted(stages)))
        if forced := sum(r.forced for r in last):
            table.add_row("forced", f"{forced} tokens, by the constraint")
        if drafted := last[-1].drafted_tokens:
            kept = sum(r.from_draft for r in last)
            table.add_row("drafts", f"{kept} of {drafted} accepted: {drafts_in_words(last)}")
    table.add_row("conversation", f"{_exchanges(chat)}, {len(chat.tokens)} tokens")
    table.add_row("state", f"{chat.nbytes / 1e6:.1f} MB")
    repl.show(table)


def _color(repl: Repl, argument: str) -> None:
    if argument not in ("", "on", "off"):
        raise _Misused
    repl.color = argument == "on" if argument else not repl.color
    repl.note(f"color is {'on' if repl.color else 'off'}")


def _debug(repl: Repl, argument: str) -> None:
    repl.note(printable(repl.traceback).rstrip() or "no unexpected error so far")


def _exit(repl: Repl, argument: str) -> None:
    repl.leaving = True


COMMANDS = {
    "help": Command("", "this list", _help),
    "mode": Command("[NAME]", f"how to decode: {', '.join(MODES)}", _mode),
    "stage": Command("N", "let stage N reply alone", _stage),
    "draft": Command(
        "[STAGE [LENGTH]] [4-bit] [lookup]",
        "speculate: draft with this stage, rounded, or from earlier text",
        _draft,
    ),
    "temp": Command("T|off", "temperature; 0 is greedy", _option("temp", float)),
    "top-p": Command("P|off", "nucleus probability", _option("top_p", float)),
    "top-k": Command("K|off", "keep the k best tokens", _option("top_k", int)),
    "min-p": Command(
        "P|off", "least probability, as a share of the best token's", _option("min_p", float)
    ),
    "repetition-penalty": Command(
        "X|off",
        "above 1 means fewer repetitions; off is the model's default",
        _option("repetition_penalty", float),
    ),
    "seed": Command("N|off", "seed for sampling", _option("seed", int)),
    "max-tokens": Command("N", "most tokens in a reply", _max_tokens),
    "stop": Command("[TEXT|off]", "also end replies before this text", _stop),
    "system": Command("[TEXT|off]", "system text", _system),
    "schema": Command("FILE|off", "reply in JSON that fits a schema", _schema),
    "tools": Command("FILE|off", "offer functions from a JSON file to a tool specialist", _tools),
    "use": Command("[NAME|base]", "change the specialist", _use),
    "attach": Command("NAME MODEL", "load another specialist", _attach),
    "retry": Command("", "get another reply to the last message", _retry),
    "undo": Command("", "take back the last exchange", _undo),
    "reset": Command("", "start a new conversation", _reset),
    "save": Command("FILE", "write conversation and state to a file", _save),
    "load": Command("FILE", "continue a saved conversation", _load),
    "stats": Command("", "figures of the last reply", _stats),
    "color": Command("[on|off]", "paint each token by the stage that emitted it", _color),
    "debug": Command("", "traceback of the last unexpected error", _debug),
    "exit": Command("", "leave (also Ctrl-D)", _exit),
}

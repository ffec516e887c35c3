"""poe-chat's commands: what each `/name` does.

- in: the `Repl`, and the text after the command's name
- out: a change to the chat, or something shown; PoEError on failure
- knows nothing about where lines come from
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from rich.table import Table

from cognica_mlx.decoding.modes import MODES
from cognica_mlx.errors import RequestError
from cognica_mlx.scheme import DRAFT_BITS
from mlx_poe.chat.conversation import Chat
from mlx_poe.chat.repl import Command, Misused, Repl
from mlx_poe.generation.display import mean_depth, printable
from mlx_poe.generation.responses import drafts_in_words
from mlx_poe.paths import user_path
from mlx_poe.rows import read_text


def _word(argument: str) -> str:
    words = argument.split()
    if len(words) != 1:
        raise Misused
    return words[0]


def _number(kind: type[int] | type[float], argument: str) -> int | float:
    try:
        return kind(_word(argument))
    except ValueError:
        whole = "whole " if kind is int else ""
        raise RequestError(f"{argument!a:.40} is not a {whole}number") from None


def _file_or_off(argument: str) -> str | None:
    """The named file's text; None for "off"."""
    if argument == "off":
        return None
    path = user_path(argument)
    if not path.is_file():
        raise RequestError(f"{path} is not a regular file")
    return read_text(path)


def _table() -> Table:
    return Table(show_header=False, box=None, padding=(0, 2, 0, 0))


def _help(repl: Repl, argument: str) -> None:
    table = _table()
    for name, command in repl.commands.items():
        table.add_row(f"/{name} {command.arguments}".rstrip(), command.purpose)
    repl.show(table)
    repl.show("Start a message with // if it should begin with a slash.", style="dim")


def _mode(repl: Repl, argument: str) -> None:
    if argument:
        repl.chat.set_mode(_word(argument))
        return
    current = repl.chat.settings.mode
    repl.show(" ".join(f"[{mode}]" if mode == current else mode for mode in MODES))


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


def _stop(repl: Repl, argument: str) -> None:
    stop = repl.chat.settings.stop
    if argument:
        repl.chat.change(stop=[] if argument == "off" else [*stop, argument])
    else:
        repl.show("\n".join(map(repr, stop)) or "(none)")


def _system(repl: Repl, argument: str) -> None:
    settings = repl.chat.settings
    if not argument:
        repl.show(printable(settings.system_text) or "(none)")
        return
    if settings.functions:
        repl.note("the functions are no longer offered: the system text takes their place")
    repl.chat.change(system="" if argument == "off" else argument, functions=[])


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
    name, *model = argument.split(maxsplit=1)
    if not model:
        raise Misused
    # May be a folder, a hub id or a built-in name. This refuses only impossible paths.
    user_path(model[0])
    repl.chat.specialists.attach(name, model[0])


def _save(repl: Repl, argument: str) -> None:
    path = user_path(argument)
    repl.chat.save(path)
    repl.note(f"saved to {path}")


def _load(repl: Repl, argument: str) -> None:
    chat = repl.chat
    notes = chat.load(user_path(argument))
    for note in (*notes, _exchanges(chat)):
        repl.note(note)
    for turn in chat.turns[-2:]:
        repl.show(f">>> {printable(turn.user)}", style="dim")
        repl.show(printable(turn.reply))


def _exchanges(chat: Chat) -> str:
    return f"{len(chat.turns)} exchange{'s' if len(chat.turns) != 1 else ''}"


def _stats(repl: Repl, argument: str) -> None:
    chat, last, table = repl.chat, repl.chat.last, _table()
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
    table.add_row("state", f"{chat.state.nbytes / 1e6:.1f} MB")
    repl.show(table)


def _color(repl: Repl, argument: str) -> None:
    if argument not in ("", "on", "off"):
        raise Misused
    repl.color = argument == "on" if argument else not repl.color
    repl.note(f"color is {'on' if repl.color else 'off'}")


def _exit(repl: Repl, argument: str) -> None:
    repl.leaving = True


COMMANDS = {
    "help": Command("", "this list", _help),
    "mode": Command("[NAME]", f"decoding mode: {', '.join(MODES)}", _mode, lambda chat: MODES),
    "stage": Command(
        "N",
        "let stage N reply alone",
        lambda repl, argument: repl.chat.set_mode("stage", stage=_number(int, argument)),
    ),
    "draft": Command(
        "[STAGE [LENGTH]] [4-bit] [lookup]",
        "speculate: draft with this stage, its quantized copy, or from earlier text",
        _draft,
    ),
    "temp": Command("T|off", "temperature; 0 is greedy", _option("temp", float)),
    "top-p": Command("P|off", "nucleus probability", _option("top_p", float)),
    "top-k": Command("K|off", "sample from the k best tokens", _option("top_k", int)),
    "min-p": Command(
        "P|off", "least probability, as a share of the best token's", _option("min_p", float)
    ),
    "repetition-penalty": Command(
        "X|off",
        "above 1 means fewer repetitions; off is the model's default",
        _option("repetition_penalty", float),
    ),
    "seed": Command("N|off", "seed for sampling", _option("seed", int)),
    "max-tokens": Command(
        "N",
        "most tokens in a reply",
        lambda repl, argument: repl.chat.change(max_tokens=_number(int, argument)),
    ),
    "stop": Command("[TEXT|off]", "end replies before this text, too", _stop),
    "system": Command("[TEXT|off]", "system text", _system),
    "schema": Command(
        "FILE|off",
        "reply in JSON that fits the schema in a file",
        lambda repl, argument: repl.chat.set_schema(_file_or_off(argument)),
    ),
    "tools": Command(
        "FILE|off",
        "offer the functions in a JSON file to a tool specialist",
        lambda repl, argument: repl.chat.set_functions(_file_or_off(argument)),
    ),
    "use": Command(
        "[NAME|base]",
        "switch to another specialist",
        _use,
        lambda chat: (*chat.specialists.names, "base"),
    ),
    "attach": Command("NAME MODEL", "load another specialist", _attach),
    "retry": Command("", "get another reply to the last message", lambda repl, _: repl.reply()),
    "undo": Command(
        "",
        "take back the last exchange",
        lambda repl, _: repl.note(f"taken back: {repl.chat.undo().user:.60}"),
    ),
    "reset": Command("", "start a new conversation", lambda repl, _: repl.chat.reset()),
    "save": Command("FILE", "write the conversation to a JSON file that you can edit", _save),
    "load": Command("FILE", "continue a saved conversation", _load),
    "stats": Command("", "figures of the last reply", _stats),
    "color": Command("[on|off]", "color each token by the stage that emitted it", _color),
    "debug": Command(
        "",
        "traceback of the last unexpected error",
        lambda repl, _: repl.note(repl.traceback.rstrip() or "no unexpected error so far"),
    ),
    "exit": Command("", "leave (also Ctrl-D)", _exit),
}

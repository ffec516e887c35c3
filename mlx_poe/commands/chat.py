"""poe-chat: a talk in the terminal, or line by line through a pipe."""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, fields
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from rich.console import Console
from rich.table import Table

from cognica_mlx.decoding.modes import MODES, ModeOptions
from cognica_mlx.errors import PoEError, RequestError
from cognica_mlx.sampling import SamplingOptions
from mlx_poe.chat import Chat, Settings
from mlx_poe.commands.generate import PromptProgress, paint, print_legend
from mlx_poe.commands.options import (
    add_mode_flags,
    add_model_flags,
    add_sampling_flags,
    make_parser,
    run,
    taken,
)
from mlx_poe.generate import GenerationResponse
from mlx_poe.load import load
from mlx_poe.tools import ToolCallParser, check_call, read_functions, tool_system_prompt

# What starts when no model is named: the built-in base with its specialists.
STARTER, STARTER_SPECIALISTS = "poe-tiny", ("chat", "math", "tool")

EXAMPLES = """\
  poe-chat
  poe-chat --model path/to/base --specialist chat=path/to/stage-chat --specialist math=owner/name
  poe-chat --model path/to/specialist --mode speculative --temp 0.7
  echo "What is the capital of France?" | poe-chat"""


def build_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = make_parser(
        "poe-chat",
        "Talk with a Cognica PoE language model. /help lists what can be said besides.",
        EXAMPLES,
    )
    add_model_flags(parser)
    parser.set_defaults(model=None, max_tokens=512)
    parser.add_argument(
        "--specialist",
        action="append",
        default=[],
        type=_named,
        metavar="NAME=MODEL",
        help="attach a specialist to the model, a base, under a name; may be repeated",
    )
    parser.add_argument("--system-prompt", default="", help="system text of the talk")
    parser.add_argument("--color", action="store_true", help="paint tokens by their stage")
    add_sampling_flags(parser)
    add_mode_flags(parser)
    parser.set_defaults(max_tokens=512)
    return parser


def _named(text: str) -> tuple[str, str]:
    name, equals, model = text.partition("=")
    if not (name and equals and model):
        raise ValueError(text)
    return name, model


_named.__name__ = "NAME=MODEL"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return run(build_parser(), _chat, argv)


def _chat(args: argparse.Namespace) -> int:
    repl = Repl(_make_chat(args), color=args.color)
    if sys.stdin.isatty() and sys.stdout.isatty():
        repl.welcome(starter=args.model is None)
        repl.run()
        return 0
    return repl.run_piped()


def _make_chat(args: argparse.Namespace) -> Chat:
    name = args.model or STARTER
    attached = list(args.specialist)
    if args.model is None and not attached:
        attached = [(one, f"{STARTER}-{one}") for one in STARTER_SPECIALISTS]
    model, tokenizer = load(name, revision=args.revision, dtype=args.dtype, quantize=args.quantize)
    chat = Chat(
        model, tokenizer, name, Settings(max_tokens=args.max_tokens), parks=not args.no_park
    )
    for one, source in attached:
        chat.specialists.attach(one, source, quantize=args.quantize)
    if attached:
        chat.use(attached[0][0])
    chat.settings.system = args.system_prompt
    sampling = taken(args, [f.name for f in fields(SamplingOptions)])
    chat.settings.options = sampling
    chat.set_mode(args.mode, **taken(args, [f.name for f in fields(ModeOptions)]))
    return chat


@dataclass(frozen=True)
class Command:
    """What `/name` does: its arguments and purpose for the help, and the method that does it."""

    arguments: str
    purpose: str
    do: Callable[[Repl, list[str]], None]


class Repl:
    """Reads what the user says, shows replies, obeys commands."""

    def __init__(self, chat: Chat, color: bool = False) -> None:
        self.chat = chat
        self.console = Console(highlight=False)
        self.color = color
        self.functions: list[dict[str, object]] = []
        self.leaving = False

    # Where words come from

    def run(self) -> None:
        """Read from the terminal until /exit or Ctrl-D."""
        session: PromptSession[str] = PromptSession(
            history=FileHistory(str(_history_file())),
            completer=_CommandCompleter(self),
            complete_while_typing=True,
            bottom_toolbar=self.status,
            key_bindings=_key_bindings(),
            prompt_continuation="… ",
            color_depth=None,
        )
        while not self.leaving:
            try:
                text = session.prompt(">>> ")
            except KeyboardInterrupt:
                continue  # the line is gone, the program stays
            except EOFError:
                break
            self.obey(text)

    def run_piped(self) -> int:
        """Reply to every line of stdin; 1 if something could not be done."""
        status = 0
        for line in sys.stdin.buffer:
            text = line.decode("utf-8", errors="replace").rstrip("\r\n")
            if not self.obey(text):
                status = 1
            if self.leaving:
                break
        return status

    def welcome(self, starter: bool) -> None:
        """What a person sees first."""
        if starter:
            self.note(
                "poe-tiny, a toy that comes along; real ones: poe-chat --model FOLDER-OR-HUB-ID"
            )
        if not self.chat.can_chat:
            self.note("this base model has not learnt to talk: it continues texts")
        self.note("/help for commands, Esc Enter for a new line, Ctrl-D to leave")

    def obey(self, text: str) -> bool:
        """Reply, or do what a command says; False if it could not be done, with one line why."""
        text = text.strip()
        if not text:
            return True
        try:
            if text.startswith("/") and not text.startswith("//"):
                self._command(text)
            else:
                self.reply(text.removeprefix("/") if text.startswith("//") else text)
        except (PoEError, OSError) as error:
            message = " ".join(str(error).splitlines())
            print(f"poe-chat: {message}", file=sys.stderr)
            return False
        return True

    def _command(self, text: str) -> None:
        name, *words = text[1:].split()
        if name not in COMMANDS:
            raise RequestError(f"there is no command /{name}; /help lists them")
        COMMANDS[name].do(self, words)

    # Replies

    def reply(self, text: str) -> None:
        """Stream the reply; Ctrl-C breaks it off."""
        parser = ToolCallParser()
        paints = self.color and self.console.color_system is not None and not self.console.no_color
        try:
            with (
                PromptProgress() as progress,
                closing(self.chat.send(text, progress.show)) as stream,
            ):
                for response in stream:
                    progress.close()
                    piece = printable(
                        parser.feed(response.text) if self.functions else response.text
                    )
                    self._write(paint(_with_text(response, piece)) if paints else piece)
                    if parser.done:
                        break
        except KeyboardInterrupt:
            self._write(" …")
        self._write(printable(parser.finish()) + "\n")
        if self.functions:
            self._show_call(parser)
        if paints and self.chat.last:
            print_legend(self.chat.last)
        if self.chat.last and (parked := self.chat.last[-1].parked):
            self.note(f"{self.chat.settings.mode} is parked: {parked} (--no-park forces it)")

    def _write(self, text: str) -> None:
        print(text, end="", flush=True)

    def _show_call(self, parser: ToolCallParser) -> None:
        if parser.call:
            self._write(f"→ {parser.call.name}({printable(repr(parser.call.arguments))})\n")
            for problem in check_call(parser.call, self.functions):
                self.note(problem)
        elif parser.problem:
            self.note(parser.problem)

    def note(self, text: str) -> None:
        """A line that is not the model's, on stderr."""
        Console(stderr=True, highlight=False).print(text, style="dim", markup=False)

    def status(self) -> str:
        """The line below the prompt, cut to the terminal's width."""
        chat = self.chat
        mode = chat.settings.mode
        for name in ("stage", "draft_stage"):
            if name in chat.settings.options:
                mode += f" {chat.settings.options[name]}"
        parts = [chat.name, mode]
        if chat.specialists.names:
            parts.insert(1, chat.settings.specialist or "base")
        if chat.last:
            parts.append(f"{chat.last[-1].generation_tps:.0f} tok/s")
            parts.append(_depth(chat.last, chat.model.poe_n_stages))
            if drafted := chat.last[-1].drafted_tokens:
                kept = sum(r.from_draft for r in chat.last)
                parts.append(f"{kept / drafted:.0%} accepted")
        parts.append(f"{chat.nbytes / 1e6:.0f} MB")
        line = " · ".join(parts)
        width = self.console.size.width - 1
        return line if len(line) <= width else line[: width - 1] + "…"

    # Commands

    def help(self, words: list[str]) -> None:
        """List the commands."""
        table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
        for name, command in COMMANDS.items():
            table.add_row(f"/{name} {command.arguments}".rstrip(), command.purpose)
        self.console.print(table)
        self.console.print("A text that begins with / is said with //.", style="dim")

    def mode(self, words: list[str]) -> None:
        """Change or show the mode."""
        if not words:
            names = [f"[{m}]" if m == self.chat.settings.mode else m for m in MODES]
            self.console.print(" ".join(names), markup=False)
            return
        self.chat.set_mode(words[0])

    def stage(self, words: list[str]) -> None:
        """Let one stage speak."""
        self.chat.set_mode("stage", stage=_number(int, words, "/stage 0"))

    def draft(self, words: list[str]) -> None:
        """Speculate."""
        options = {"draft_stage": _number(int, words[:1], "/draft 0 4")}
        if len(words) > 1:
            options["num_draft_tokens"] = _number(int, words[1:], "/draft 0 4")
        self.chat.set_mode("speculative", **options)

    def system(self, words: list[str]) -> None:
        """Change or show the system text."""
        if not words:
            self.console.print(self.chat.settings.system or "(none)", markup=False)
            return
        self.functions = []
        self.chat.set_system("" if words == ["off"] else " ".join(words))

    def tools(self, words: list[str]) -> None:
        """Offer functions to a tool specialist."""
        if words == ["off"]:
            self.functions = []
            self.chat.set_system("")
            self.chat.set_option("repetition_penalty", None)
            return
        path = Path(_one(words, "/tools functions.json")).expanduser()
        functions = read_functions(path.read_text(encoding="utf-8", errors="replace"))
        self.chat.set_system(tool_system_prompt(functions))
        # A call repeats the names and values that it was given.
        self.chat.set_option("repetition_penalty", 1.0)
        self.functions = functions

    def use(self, words: list[str]) -> None:
        """Change or list the specialists."""
        names = self.chat.specialists.names
        if not words:
            if not names:
                self.note("no specialists: start with --specialist NAME=MODEL, or /attach one")
            for name in (*names, "base"):
                current = name == (self.chat.settings.specialist or "base")
                size = self.chat.specialists.nbytes(name) / 1e6 if name in names else 0
                adds = f" (adds {size:.1f} MB)" if size else ""
                self.console.print(f"{'*' if current else ' '} {name}{adds}", markup=False)
            return
        self.chat.use(None if words[0] == "base" and "base" not in names else words[0])
        if not self.chat.can_chat:
            self.note("the base has not learnt to talk: it continues texts")

    def attach(self, words: list[str]) -> None:
        """Load a specialist."""
        if len(words) != 2:
            raise RequestError("say /attach NAME MODEL: a folder, hub id or built-in name")
        self.chat.specialists.attach(*words)

    def retry(self, words: list[str]) -> None:
        """Say the last thing again."""
        self.reply(self.chat.undo().user)

    def undo(self, words: list[str]) -> None:
        """Take back the last exchange."""
        turn = self.chat.undo()
        self.note(f"taken back: {printable(turn.user)[:60]}")

    def reset(self, words: list[str]) -> None:
        """Begin a new talk."""
        self.chat.reset()

    def save(self, words: list[str]) -> None:
        """Write the talk to a file."""
        path = Path(_one(words, "/save FILE"))
        self.chat.save(path)
        self.note(f"saved to {path}")

    def load(self, words: list[str]) -> None:
        """Go on with a talk."""
        path = Path(_one(words, "/load FILE"))
        ready = self.chat.load(path)
        again = "" if ready else "; another model's state, so the talk is read again"
        self.note(f"{len(self.chat.turns)} exchanges{again}")
        for turn in self.chat.turns[-2:]:
            self.console.print(f">>> {printable(turn.user)}", style="dim", markup=False)
            self.console.print(printable(turn.reply), markup=False)

    def stats(self, words: list[str]) -> None:
        """Figures of the last reply."""
        chat, last = self.chat, self.chat.last
        table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
        if last:
            table.add_row("prompt", f"{last[-1].prompt_tps:.1f} tokens/s")
            table.add_row("reply", f"{len(last)} tokens, {last[-1].generation_tps:.1f} tokens/s")
            table.add_row("depth", _depth(last, chat.model.poe_n_stages))
            stages = Counter(r.stage for r in last)
            table.add_row("stages", ", ".join(f"{k}: {stages[k]}" for k in sorted(stages)))
            if drafted := last[-1].drafted_tokens:
                table.add_row("drafts", f"{sum(r.from_draft for r in last)} of {drafted} accepted")
        table.add_row("talk", f"{len(chat.turns)} exchanges, {len(chat.tokens)} tokens")
        table.add_row("state", f"{chat.nbytes / 1e6:.1f} MB")
        self.console.print(table)

    def colors(self, words: list[str]) -> None:
        """Paint tokens by stage, or stop it."""
        self.color = words[:1] != ["off"] and not (self.color and not words)
        self.note(f"color is {'on' if self.color else 'off'}")

    def exit(self, words: list[str]) -> None:
        """Leave."""
        self.leaving = True


def _option(name: str, kind: type[int] | type[float]) -> Callable[[Repl, list[str]], None]:
    flag = name.replace("_", "-")

    def change(repl: Repl, words: list[str]) -> None:
        if words == ["off"]:
            repl.chat.set_option(name, None)
            return
        value = _number(kind, words, f"/{flag} {'1' if kind is int else '0.7'}, or off")
        repl.chat.set_option(name, value)

    return change


def _max_tokens(repl: Repl, words: list[str]) -> None:
    count = int(_number(int, words, "/max-tokens 200"))
    if count < 1:
        raise RequestError("max-tokens must be at least 1")
    repl.chat.settings.max_tokens = count


COMMANDS = {
    "help": Command("", "this list", Repl.help),
    "mode": Command("[NAME]", f"how to decode: {', '.join(MODES)}", Repl.mode),
    "stage": Command("N", "let stage N speak alone", Repl.stage),
    "draft": Command("STAGE [LENGTH]", "speculate: this stage drafts", Repl.draft),
    "temp": Command("T", "temperature; 0 is greedy", _option("temp", float)),
    "top-p": Command("P", "nucleus probability", _option("top_p", float)),
    "top-k": Command("K", "keep the k best tokens", _option("top_k", int)),
    "min-p": Command("P", "least probability", _option("min_p", float)),
    "repetition-penalty": Command(
        "X", "above 1: fewer repetitions", _option("repetition_penalty", float)
    ),
    "seed": Command("N", "seed for sampling", _option("seed", int)),
    "max-tokens": Command("N", "longest reply", _max_tokens),
    "system": Command("[TEXT|off]", "system text", Repl.system),
    "tools": Command("FILE|off", "offer a tool specialist functions, from JSON", Repl.tools),
    "use": Command("[NAME|base]", "change the specialist", Repl.use),
    "attach": Command("NAME MODEL", "load one more specialist", Repl.attach),
    "retry": Command("", "another reply to the last thing said", Repl.retry),
    "undo": Command("", "take back the last exchange", Repl.undo),
    "reset": Command("", "begin a new talk", Repl.reset),
    "save": Command("FILE", "write talk and state to a file", Repl.save),
    "load": Command("FILE", "go on with a talk", Repl.load),
    "stats": Command("", "figures of the last reply", Repl.stats),
    "color": Command("[on|off]", "paint each token by the stage that emitted it", Repl.colors),
    "exit": Command("", "leave (also Ctrl-D)", Repl.exit),
}


def printable(text: str) -> str:
    """`text` without what would steer the terminal: control characters but line break and tab."""
    return "".join(c for c in text if c in "\n\t" or not _is_control(ord(c)))


def _is_control(code: int) -> bool:
    return code < 32 or 127 <= code < 160


def _with_text(response: GenerationResponse, text: str) -> GenerationResponse:
    return GenerationResponse(**{**vars(response), "text": text})


def _depth(responses: Sequence[GenerationResponse], n_stages: int) -> str:
    mean = sum(r.stage + 1 for r in responses) / len(responses)
    return f"{mean:.1f} of {n_stages} stages"


def _one(words: list[str], example: str) -> str:
    if len(words) != 1:
        raise RequestError(f"say {example}")
    return words[0]


def _number(kind: type[int] | type[float], words: list[str], example: str) -> int | float:
    word = _one(words, example)
    try:
        return kind(word)
    except ValueError:
        raise RequestError(f"{word} is no such number: say {example}") from None


def _history_file() -> Path:
    base = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    folder = Path(base).expanduser() / "cognica-mlx"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / "chat_history"


def _key_bindings() -> KeyBindings:
    bindings = KeyBindings()

    @bindings.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return bindings


class _CommandCompleter(Completer):
    """Completes commands, and the names that some of them take."""

    def __init__(self, repl: Repl) -> None:
        self._repl = repl

    def get_completions(self, document: Document, complete_event: CompleteEvent):  # type: ignore[no-untyped-def]
        text = document.text_before_cursor
        if not text.startswith("/") or text.startswith("//") or "\n" in text:
            return
        command, space, word = text[1:].partition(" ")
        if not space:
            for name, what in COMMANDS.items():
                if name.startswith(command):
                    yield Completion(name, -len(command), display_meta=what.purpose)
            return
        choices: Sequence[str] = ()
        if command == "mode":
            choices = tuple(MODES)
        elif command == "use":
            choices = (*self._repl.chat.specialists.names, "base")
        for choice in choices:
            if choice.startswith(word):
                yield Completion(choice, -len(word))

"""poe-chat: a conversation in the terminal, or line by line through a pipe."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import closing
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import TextIO

from prompt_toolkit import PromptSession
from rich.console import Console, RenderableType

from cognica_mlx.decoding.modes import ModeOptions
from cognica_mlx.decoding.sampling import SamplingOptions
from cognica_mlx.errors import PoEError
from mlx_poe.chat.conversation import Chat
from mlx_poe.chat.slash_commands import COMMANDS, mean_depth, perform, printable
from mlx_poe.chat.terminal import ChatHistory, CommandCompleter, key_bindings
from mlx_poe.commands.entry import make_parser, run
from mlx_poe.commands.flags import (
    add_mode_flags,
    add_model_flags,
    add_sampling_flags,
    add_specialist_flag,
    starters,
    taken,
)
from mlx_poe.commands.generate import paint, print_legend
from mlx_poe.commands.progress import Bars
from mlx_poe.generation.responses import fallback_note
from mlx_poe.generation.tools import ToolCallParser, check_call
from mlx_poe.loading.load import DEFAULT_MODEL, load

__all__ = ["COMMANDS", "Repl", "build_parser", "main", "printable"]

EXAMPLES = """\
  poe-chat
  poe-chat --model path/to/base --specialist chat=path/to/stage-chat --specialist math=owner/name
  poe-chat --model path/to/specialist --mode speculative --temp 0.7
  echo "What is the capital of France?" | poe-chat"""


def build_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = make_parser(
        "poe-chat",
        "Chat with a Cognica PoE language model. In the chat, /help lists commands.",
        EXAMPLES,
    )
    add_model_flags(parser)
    add_specialist_flag(parser, "attach a specialist to the base model under a name")
    parser.add_argument("--system-prompt", default="", help="system text of the conversation")
    parser.add_argument("--color", action="store_true", help="paint tokens by their stage")
    parser.add_argument(
        "--debug",
        action="store_true",
        help="show the traceback of an unexpected error (without it, /debug shows the last one)",
    )
    add_sampling_flags(parser)
    add_mode_flags(parser)
    parser.set_defaults(max_tokens=512)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return run(build_parser(), _chat, argv)


def _chat(args: argparse.Namespace) -> int:
    if sys.stdin is None:
        # Closed by the caller. The next file opened would get descriptor 0, which MLX cannot read.
        sys.stdin = Path(os.devnull).open()  # noqa: SIM115
    repl = Repl(_make_chat(args), color=args.color, debug=args.debug)
    if sys.stdin.isatty() and sys.stdout and sys.stdout.isatty():
        repl.welcome(starter=args.model == DEFAULT_MODEL)
        repl.run()
        return 0
    return repl.run_piped()


def _make_chat(args: argparse.Namespace) -> Chat:
    name = args.model
    attached = args.specialist or [(one.rpartition("-")[2], one) for one in starters(name)]
    model, tokenizer = load(name, revision=args.revision, dtype=args.dtype, quantize=args.quantize)
    chat = Chat(model, tokenizer, name, falls_back=not args.no_fallback)
    for one, source in attached:
        chat.specialists.attach(one, source, quantize=args.quantize)
    if attached:
        chat.use(attached[0][0])
    chat.set_system(args.system_prompt)
    chat.set_max_tokens(args.max_tokens)
    chat.set_stop(args.stop or [])
    chat.settings.options = taken(args, [f.name for f in fields(SamplingOptions)])
    chat.set_mode(args.mode, **taken(args, [f.name for f in fields(ModeOptions)]))
    return chat


class Repl:
    """Reads the user's input, shows replies, runs commands.

    No error in a reply or a command ends it, except one from writing output. `traceback` is that
    of the last unexpected error.
    """

    def __init__(self, chat: Chat, color: bool = False, debug: bool = False) -> None:
        self.chat = chat
        self.console = Console(highlight=False)
        self.color, self.debug = color, debug
        self.leaving = False
        self.traceback = ""
        self._piped = False
        self._output_error: OSError | None = None

    # Input

    def run(self) -> None:
        """Read from the terminal until /exit or Ctrl-D."""
        history = ChatHistory()
        session: PromptSession[str] = PromptSession(
            history=history,
            completer=CommandCompleter(self.chat),
            complete_while_typing=True,
            bottom_toolbar=self.status,
            key_bindings=key_bindings(),
            prompt_continuation="… ",
            enable_suspend=True,  # else Ctrl-Z is typed into the message
        )
        told = False
        while not self.leaving:
            if history.problem and not told:
                self.note(history.problem)
                told = True
            try:
                text = session.prompt(">>> ")
            except KeyboardInterrupt:
                continue  # drop the line, keep running
            except EOFError:
                break
            try:
                self.obey(text)
            except KeyboardInterrupt:
                continue  # a second Ctrl-C, while the first was being handled

    def run_piped(self) -> int:
        """Reply to every line of stdin. Returns 1 if anything failed. Ctrl-C ends it."""
        self._piped = True
        status = 0
        for line in sys.stdin.buffer:
            text = line.decode("utf-8", errors="replace").rstrip("\r\n")
            if not self.obey(text):
                status = 1
            if self.leaving:
                break
        return status

    def welcome(self, starter: bool) -> None:
        """Print the greeting."""
        if starter:
            self.note(
                "poe-tiny, a built-in toy model; for a real one: poe-chat --model FOLDER-OR-HUB-ID"
            )
        if not self.chat.can_chat:
            self.note("this base model was not trained to chat; it continues text")
        self.note("/help for commands, Esc Enter for a new line, Ctrl-D to leave")

    def obey(self, text: str) -> bool:
        """Reply to a message or run a command. On failure, print one line and return False."""
        text = text.strip()
        if not text:
            return True
        try:
            if text.startswith("/") and not text.startswith("//"):
                perform(self, text)
            else:
                self.reply(text.removeprefix("/") if text.startswith("//") else text)
        except KeyboardInterrupt:
            if self._piped:
                raise
            self._complain("interrupted")
            return False
        except Exception as error:
            if error is self._output_error:
                raise
            self._explain(error)
            return False
        return True

    def _explain(self, error: Exception) -> None:
        """Print one line about an error; keep the traceback if the error is unexpected."""
        if isinstance(error, (PoEError, OSError)):
            self._complain(str(error))
            return
        self.traceback = "".join(traceback.format_exception(error))
        if self.debug:
            self._write(printable(self.traceback), sys.stderr)
        self._complain(f"unexpected {type(error).__name__}: {error} (/debug shows the traceback)")

    def _complain(self, message: str) -> None:
        self._write(f"poe-chat: {' '.join(printable(message).split())}\n", sys.stderr)

    # Replies

    def reply(self, text: str | None = None) -> None:
        """Stream the reply to `text`, or without it a new reply to the last message.

        Ctrl-C stops it.
        """
        chat, parser = self.chat, ToolCallParser()
        functions = chat.settings.functions
        paints = self.color and self.console.color_system is not None and not self.console.no_color
        begun = False
        try:
            with Bars() as progress:
                show = partial(progress, "prompt")
                stream = chat.retry(show) if text is None else chat.send(text, show)
                with closing(stream):
                    for response in stream:
                        progress.close()
                        begun = True
                        piece = parser.feed(response.text) if functions else response.text
                        piece = printable(piece)
                        self._write(paint(replace(response, text=piece)) if paints else piece)
                        if parser.done:
                            break
        except KeyboardInterrupt:
            if self._piped:
                raise
            self._write(" …")
        except Exception:
            if begun and not self._output_error:
                self._write("\n")
            raise
        self._write(printable(parser.finish()) + "\n")
        if functions:
            self._show_call(parser, functions)
        if paints and chat.last:
            print_legend(chat.last)
        if note := fallback_note(chat.settings.mode, chat.last):
            self.note(note)

    def _show_call(self, parser: ToolCallParser, functions: list[dict[str, object]]) -> None:
        if parser.call:
            arguments = printable(repr(parser.call.arguments))
            self._write(f"→ {printable(parser.call.name)}({arguments})\n")
            for problem in check_call(parser.call, functions):
                self.note(problem)
        elif parser.problem:
            self.note(parser.problem)

    # Output

    def show(self, what: RenderableType, style: str | None = None) -> None:
        """Print text or a table on stdout."""
        with self.console.capture() as captured:
            self.console.print(what, style=style, markup=False)
        self._write(captured.get())

    def note(self, text: str) -> None:
        """Print a line on stderr that does not come from the model."""
        console = Console(stderr=True, highlight=False)
        with console.capture() as captured:
            console.print(text, style="dim", markup=False, soft_wrap=True)
        self._write(captured.get(), sys.stderr)

    def _write(self, text: str, stream: TextIO | None = None) -> None:
        try:
            print(text, end="", file=stream, flush=True)
        except OSError as error:
            # Not a failed command: nobody can read the output, so stop.
            self._output_error = error
            raise

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
            parts.append(mean_depth(chat.last, chat.model.poe_n_stages))
            if drafted := chat.last[-1].drafted_tokens:
                kept = sum(r.from_draft for r in chat.last)
                parts.append(f"{kept / drafted:.0%} accepted")
        parts.append(f"{chat.nbytes / 1e6:.0f} MB")
        line = " · ".join(parts)
        width = self.console.size.width - 1
        return line if len(line) <= width else line[: width - 1] + "…"

"""poe-chat's loop: reads lines, shows replies, runs the commands that it is handed.

- in: a chat, commands by name, lines from the terminal or a pipe
- out: replies on stdout, notes and errors on stderr
- no error in a reply or a command ends it, except one from writing output
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from typing import TextIO

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from rich.console import Console, RenderableType

from cognica_mlx.errors import PoEError, RequestError
from mlx_poe.chat.conversation import Chat
from mlx_poe.chat.terminal import ChatHistory, key_bindings
from mlx_poe.generation.display import mean_depth, paint, paints, print_legend, printable
from mlx_poe.generation.progress import Bars
from mlx_poe.generation.responses import fallback_note
from mlx_poe.generation.tools import ToolCallParser, check_call


@dataclass(frozen=True)
class Command:
    """A command's arguments and purpose, as the help shows them; its function, given the text after
    its name; and what may be typed there."""

    arguments: str
    purpose: str
    do: Callable[[Repl, str], None]
    choices: Callable[[Chat], Iterable[str]] = lambda chat: ()


class Misused(Exception):
    """The arguments do not match the help."""


class Repl:
    """One chat in the terminal. `traceback` is that of the last unexpected error."""

    def __init__(
        self, chat: Chat, commands: Mapping[str, Command], color: bool = False, debug: bool = False
    ) -> None:
        self.chat, self.commands = chat, commands
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
            completer=CommandCompleter(self),
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
                self.obey(session.prompt(">>> "))
            except KeyboardInterrupt:
                continue  # drop the line; or a second Ctrl-C, while the first was being handled
            except EOFError:
                break

    def run_piped(self) -> int:
        """Reply to every line of stdin. Returns 1 if anything failed. Ctrl-C ends it."""
        self._piped = True
        failed = False
        for line in sys.stdin.buffer:
            failed |= not self.obey(line.decode("utf-8", errors="replace"))
            if self.leaving:
                break
        return int(failed)

    def obey(self, text: str) -> bool:
        """Reply to a message or run a command. On failure, print one line and return False."""
        text = text.strip()
        if not text:
            return True
        try:
            if text.startswith("/") and not text.startswith("//"):
                self._perform(text)
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

    def _perform(self, line: str) -> None:
        name, argument = [*line[1:].split(maxsplit=1), "", ""][:2]
        if name not in self.commands:
            raise RequestError(f"there is no command /{name}; /help lists them")
        command, argument = self.commands[name], argument.strip()
        try:
            if not argument and command.arguments and not command.arguments.startswith("["):
                raise Misused
            command.do(self, argument)
        except Misused:
            raise RequestError(f"usage: /{name} {command.arguments}") from None

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
        painted = self.color and paints(self.console)
        begun = False
        try:
            with Bars() as bars:
                show = partial(bars, "prompt")
                stream = chat.retry(show) if text is None else chat.send(text, show)
                with closing(stream):
                    for response in stream:
                        bars.close()
                        begun = True
                        piece = parser.feed(response.text) if functions else response.text
                        piece = printable(piece)
                        self._write(paint(replace(response, text=piece)) if painted else piece)
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
        if painted and chat.last:
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
            console.print(printable(text), style="dim", markup=False, soft_wrap=True)
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
        parts.append(f"{chat.state.nbytes / 1e6:.0f} MB")
        line = " · ".join(parts)
        width = self.console.size.width - 1
        return line if len(line) <= width else line[: width - 1] + "…"


class CommandCompleter(Completer):
    """Completes commands, and the names that some of them take."""

    def __init__(self, repl: Repl) -> None:
        self._repl = repl

    def get_completions(
        self, document: Document, complete_event: CompleteEvent
    ) -> Iterator[Completion]:
        text, commands = document.text_before_cursor, self._repl.commands
        if not text.startswith("/") or text.startswith("//") or "\n" in text:
            return
        name, space, word = text[1:].partition(" ")
        if not space:
            found = {each: command.purpose for each, command in commands.items()}
        else:
            chosen = commands[name].choices(self._repl.chat) if name in commands else ()
            found = dict.fromkeys(chosen, "")
        typed = word if space else name
        for each, purpose in found.items():
            if each.startswith(typed):
                yield Completion(each, -len(typed), display_meta=purpose)

"""How commands start and end: parsing, errors as one line, signals, the standard streams.

A command is a parser and a function. `run` calls it and shows our own errors as one line on stderr.
The exit status is 2 for an invalid request, 1 for work that failed.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from io import TextIOWrapper
from pathlib import Path
from typing import Any, NoReturn

from cognica_mlx.backend import blas
from cognica_mlx.errors import PoEError, PoEWarning, RequestError

INTERRUPTED = 130


class Parser(argparse.ArgumentParser):
    """A parser that shows a usage error as one line, like all our errors."""

    def error(self, message: str) -> NoReturn:
        """Exit with status 2."""
        self.exit(2, f"{self.prog}: error: {_one_line(message)} (--help shows the flags)\n")


def make_parser(prog: str, description: str, examples: str) -> Parser:
    """A parser whose help ends with examples."""
    return Parser(
        prog=prog,
        description=description,
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def run(
    parser: argparse.ArgumentParser,
    command: Callable[[argparse.Namespace], int],
    argv: Sequence[str] | None = None,
) -> int:
    """Parse, run, return the exit status. Nothing a user can cause shows a traceback."""
    open_missing_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            # Print "?" for characters that the terminal's encoding lacks, rather than fail.
            stream.reconfigure(errors="replace")
    try:
        with _warnings_as_lines(parser.prog):
            try:
                args = parser.parse_args(argv)
                blas.check()
                status = command(args)
            except SystemExit as done:
                status = int(done.code or 0)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print(f"\n{parser.prog}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader closed the pipe, as `| head` does.
        _silence_stdout()
        return 0
    except (MemoryError, RuntimeError) as error:
        problem = _machines(error)
        if problem is None:
            raise
        print(f"{parser.prog}: error: {problem}", file=sys.stderr)
        return 1
    except (PoEError, OSError) as error:
        print(f"{parser.prog}: error: {_one_line(str(error))}", file=sys.stderr)
        if not isinstance(error, PoEError):
            _silence_stdout()
        return 2 if isinstance(error, RequestError) else 1


# MLX has only RuntimeError for a machine's limits, with the part that failed in brackets.
_OF_MLX = re.compile(r"\[(metal|malloc|load|save|read|write|cuda)[\w:]*\]", re.IGNORECASE)
_OF_MEMORY = re.compile("malloc|memory|allocat", re.IGNORECASE)


def _machines(error: Exception) -> str | None:
    """What to tell of an error that is the machine's: no memory, a failed disk. None for bugs."""
    text = " ".join(str(error).split())
    if isinstance(error, RuntimeError) and not _OF_MLX.match(text):
        return None
    if isinstance(error, MemoryError) or _OF_MEMORY.search(text):
        return f"out of memory; try --quantize 4{text and f' ({text:.160})'}"
    return f"MLX failed: {text}"


_ENDINGS = signal.SIGTERM, signal.SIGHUP


@contextmanager
def interruptible() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the block as Ctrl-C does, so that it cleans up."""
    # nohup ignores SIGHUP, and so should we.
    numbers = [number for number in _ENDINGS if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, signal.default_int_handler) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# Forked workers, such as those of lm-eval's process pools, are ended by SIGTERM and must not show
# a traceback. Signals are blocked during a fork, so that none arrives before the child has reset
# its handlers.


def _mask(how: int, reset: bool = False) -> None:
    """Block or unblock the signals that now end a block of `interruptible`."""
    taken = [n for n in _ENDINGS if signal.getsignal(n) is signal.default_int_handler]
    for number in taken if reset else ():
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(how, taken)


os.register_at_fork(
    before=lambda: _mask(signal.SIG_BLOCK),
    after_in_parent=lambda: _mask(signal.SIG_UNBLOCK),
    after_in_child=lambda: _mask(signal.SIG_UNBLOCK, reset=True),
)


def open_missing_streams() -> None:
    """Open the null device for any of stdin, stdout and stderr that the caller closed.

    Otherwise the next file opened gets descriptor 0, 1 or 2: MLX treats descriptor 0 as a failed
    open, and messages would be written into whatever file has descriptor 2.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)  # gets the lowest free descriptor: `number`
            os.set_inheritable(opened, True)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode))  # noqa: SIM115


@contextmanager
def _warnings_as_lines(prog: str) -> Iterator[None]:
    """Show our own warnings on stderr as one line each, like errors."""
    with warnings.catch_warnings():
        shown = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *where: Any) -> None:
            if issubclass(category, PoEWarning):
                print(f"{prog}: warning: {_one_line(str(message))}", file=sys.stderr)
            else:
                shown(message, category, *where)

        warnings.showwarning = show  # type: ignore[assignment]
        yield


def read_stdin() -> str:
    """All of stdin as text, without the final newline that `echo` adds.

    A byte order mark is dropped. Bytes that are not UTF-8 become U+FFFD. A closed stdin reads as
    empty.
    """
    text = sys.stdin.buffer.read().decode("utf-8-sig", errors="replace")
    return text.removesuffix("\n")


def _one_line(message: str) -> str:
    return " ".join(message.splitlines())


def _silence_stdout() -> None:
    """Discard buffered output, so that Python does not try to write it again at exit."""
    with suppress(OSError):  # a stream without a descriptor
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

"""What the commands share: their flags, each declared once, and how they end.

A command is a parser and a function; `run` calls it, shows our own errors as one line on stderr,
and turns them into exit statuses: 2 for a request that makes no sense, 1 for work that failed.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from io import TextIOWrapper
from pathlib import Path
from typing import Any, NoReturn

from cognica_mlx.convert.quantization import BITS
from cognica_mlx.decoding.modes import MODES
from cognica_mlx.decoding.targets import DRAFT_HEADS
from cognica_mlx.errors import PoEError, RequestError
from mlx_poe.load import DEFAULT_MODEL, DTYPES

INTERRUPTED = 130


class Parser(argparse.ArgumentParser):
    """A parser that shows a usage error as the one line that all our errors are."""

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
    """Parse, run, and return the exit status; no traceback for anything a user can cause."""
    if sys.stderr is None:
        # Closed by the caller; what is printed to None would land on stdout.
        sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            # What the terminal's encoding lacks is shown as "?", rather than ending the work.
            stream.reconfigure(errors="replace")
    try:
        try:
            status = command(parser.parse_args(argv))
        except SystemExit as done:
            status = int(done.code or 0)
        if sys.stdout:
            sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print(f"\n{parser.prog}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader has gone (`| head`): nothing more to say, and nowhere to say it.
        _silence_stdout()
        return 0
    except MemoryError:
        print(f"{parser.prog}: error: out of memory; try --quantize 4", file=sys.stderr)
        return 1
    except (PoEError, OSError) as error:
        print(f"{parser.prog}: error: {_one_line(str(error))}", file=sys.stderr)
        if not isinstance(error, PoEError):
            _silence_stdout()
        return 2 if isinstance(error, RequestError) else 1


def read_stdin() -> str:
    """All of stdin as text, but for a last newline: `echo` adds one, and the model would see it.

    Bytes that are no UTF-8 become U+FFFD, a closed stdin is empty.
    """
    text = sys.stdin.buffer.read().decode("utf-8", errors="replace") if sys.stdin else ""
    return text.removesuffix("\n")


def _one_line(message: str) -> str:
    return " ".join(message.splitlines())


def _silence_stdout() -> None:
    """Send what is still buffered nowhere, so that Python does not try it again at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """--model, --revision, --dtype, --quantize."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        metavar="MODEL",
        default=DEFAULT_MODEL,
        help="folder, hub id, or built-in poe-tiny, poe-tiny-chat … (default: %(default)s)",
    )
    group.add_argument("--revision", help="branch, tag or commit of a hub repository")
    group.add_argument(
        "--dtype",
        choices=DTYPES,
        help="type of the weights (default: bfloat16 on a GPU, float32 on a CPU)",
    )
    group.add_argument(
        "--quantize",
        type=int,
        choices=BITS,
        metavar="BITS",
        help="round the matrices to 2, 3, 4, 5, 6 or 8 bits in memory",
    )


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    """--max-tokens, --temp and what shapes the choice of a token."""
    group = parser.add_argument_group("sampling")
    group.add_argument(
        "--max-tokens", "-m", type=int, default=256, help="most tokens to generate (default: 256)"
    )
    group.add_argument("--temp", type=float, default=0.0, help="temperature; 0 is greedy (default)")
    group.add_argument("--top-p", type=float, default=0.0, help="nucleus probability; 0 is off")
    group.add_argument("--top-k", type=int, default=0, help="keep the k best tokens; 0 is off")
    group.add_argument(
        "--min-p", type=float, default=0.0, help="least probability, as a share of the best one's"
    )
    group.add_argument(
        "--repetition-penalty", type=float, help="above 1 makes recent tokens less likely"
    )
    group.add_argument(
        "--repetition-context-size",
        type=int,
        default=20,
        help="how many recent tokens the penalty looks at (default: 20)",
    )
    group.add_argument("--seed", type=int, help="seed for sampling (default: a new one every time)")
    group.add_argument(
        "--stop", action="append", metavar="TEXT", help="stop before this text; may be repeated"
    )


def add_mode_flags(parser: argparse.ArgumentParser) -> None:
    """--mode and the options of each mode."""
    group = parser.add_argument_group("decoding mode (stages count from 0)")
    group.add_argument("--mode", choices=MODES, default="full", help="default: full")
    group.add_argument("--stage", type=int, help="stage: the stage that predicts (default: 0)")
    group.add_argument("--max-stages", type=int, help="prefix: how many stages to run")
    group.add_argument(
        "--stages", type=numbers(int), metavar="0,1,…", help="compose: the stages to mix"
    )
    group.add_argument(
        "--stage-weights", type=numbers(float), metavar="1,0.5,…", help="compose: their weights"
    )
    group.add_argument(
        "--safety", type=float, help="wand, certified: factor on the bounds (default: 1.0)"
    )
    group.add_argument(
        "--p99-bounds",
        type=numbers(float),
        metavar="B0,B1,…",
        help="wand, certified: bounds, one for each step between stages (default: calibration)",
    )
    group.add_argument(
        "--exit-stages", type=numbers(int), metavar="0,1,…", help="wand: where tokens may leave"
    )
    group.add_argument(
        "--draft-stage",
        type=int,
        help="speculative, certified: the last drafting stage (default: 0)",
    )
    group.add_argument(
        "--num-draft-tokens",
        type=int,
        help="speculative, certified: most drafts a round (default: 3)",
    )
    group.add_argument(
        "--draft-margin",
        type=float,
        help="speculative, certified: stop drafting where the best two scores are closer than this",
    )
    group.add_argument(
        "--draft-head",
        choices=DRAFT_HEADS,
        help="speculative: a specialist's drafts through all its heads or the base's (default: "
        "summed)",
    )
    group.add_argument(
        "--draft-rank",
        type=int,
        metavar="R",
        help="speculative, certified: look for drafts along R directions of the head only",
    )
    group.add_argument(
        "--no-park",
        action="store_true",
        help="wand, speculative, certified: go on even where full depth is faster on this machine",
    )


def numbers(kind: type[int] | type[float]) -> Callable[[str], list[Any]]:
    """A flag's type: numbers with commas between."""

    def parse(text: str) -> list[Any]:
        return [kind(part) for part in text.split(",")]

    parse.__name__ = f"list of {kind.__name__}s"
    return parse


def taken(args: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """The named flags that were given or have a default, as keywords."""
    values = {name: getattr(args, name) for name in names}
    return {name: value for name, value in values.items() if value is not None}

"""The flags that commands share, each declared once, and the types of their values."""

from __future__ import annotations

import argparse
import errno
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cognica_mlx.decoding.modes import MODES
from cognica_mlx.decoding.targets import DRAFT_HEADS
from cognica_mlx.errors import DELETED, RequestError, deleted
from cognica_mlx.files.byte_sizes import byte_size
from cognica_mlx.files.stored import DTYPES
from cognica_mlx.scheme import BITS, DRAFT_BITS
from mlx_poe.generation.reply_form import FORM_OPTIONS, SPECIALIST_PENALTY
from mlx_poe.loading.load import DEFAULT_MODEL
from mlx_poe.paths import user_path
from mlx_poe.rows import named, read_text

# The flags that `load` takes, besides the model.
LOADING = ("revision", "dtype", "quantize")
# Served and chatted with if the built-in base is the model and no specialist is named.
STARTERS = ("chat", "math", "tool")


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """--model, --revision, --dtype, --quantize."""
    add_checkpoint_flags(parser).add_argument(
        "--quantize",
        type=int,
        choices=BITS,
        metavar="BITS",
        help="quantize the matrices to 2, 3, 4, 5, 6 or 8 bits in memory",
    )


def add_checkpoint_flags(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """--model, --revision, --dtype. Returns their group."""
    group = parser.add_argument_group("model")
    add = group.add_argument
    add(
        "--model",
        metavar="MODEL",
        default=DEFAULT_MODEL,
        help=f"folder, hub id, or built-in poe-tiny, poe-tiny-chat … (default: {DEFAULT_MODEL})",
    )
    add_revision_flag(group)
    add(
        "--dtype",
        choices=DTYPES,
        help="type of the weights (default: bfloat16 on a GPU, float32 on a CPU)",
    )
    return group


def add_revision_flag(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--revision",
        metavar="COMMIT[:COMMIT]",
        help="branch, tag or commit of a hub repository, and after a colon of a specialist's base",
    )


def add_specialist_flag(parser: argparse._ActionsContainer, purpose: str) -> None:
    """--specialist NAME=MODEL, as a list of pairs."""
    parser.add_argument(
        "--specialist",
        action="append",
        default=[],
        type=_named,
        metavar="NAME=MODEL",
        help=f"{purpose}; may be repeated",
    )


def starters(model: str) -> list[str]:
    """The built-in specialists that come with a model, whether it was typed or is the default."""
    return [f"{model}-{one}" for one in STARTERS] if model == DEFAULT_MODEL else []


def _named(text: str) -> tuple[str, str]:
    name, equals, model = text.partition("=")
    if not (name and equals and model):
        raise ValueError(text)
    return name, model


_named.__name__ = "NAME=MODEL"


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    """--max-tokens, --temp and the other sampling flags."""
    add = parser.add_argument_group("sampling").add_argument
    add("--max-tokens", "-m", type=int, default=256, help="most tokens to generate (default: 256)")
    add("--temp", type=float, default=0.0, help="temperature; 0 is greedy (default)")
    add("--top-p", type=float, default=0.0, help="nucleus probability; 0 is off")
    add("--top-k", type=int, default=0, help="keep the k best tokens; 0 is off")
    add("--min-p", type=float, default=0.0, help="least probability, relative to the best token's")
    add(
        "--repetition-penalty",
        type=float,
        help="above 1 makes recent tokens less likely; 1 is off (default: off, but "
        f"{SPECIALIST_PENALTY} for a specialist in a chat)",
    )
    add(
        "--repetition-context-size",
        type=int,
        default=20,
        help="how many recent tokens the penalty looks at (default: 20)",
    )
    for name, times in (("presence", "once"), ("frequency", "once per occurrence")):
        add(
            f"--{name}-penalty",
            type=float,
            metavar="P",
            help=f"subtract P from the score of each token already in the reply, {times}",
        )
    add("--seed", type=int, help="seed for sampling (default: a new one every time)")
    add("--stop", action="append", metavar="TEXT", help="stop before this text; may be repeated")


def add_constraint_flags(parser: argparse.ArgumentParser) -> None:
    """--json-schema, --regex, --grammar, --tools: constraints on the reply."""
    add = parser.add_argument_group(
        "constraints on the reply (each a file, or the text itself)"
    ).add_argument
    add("--json-schema", metavar="SCHEMA", help="JSON that fits this schema; {} allows any object")
    add("--regex", help="text that fits this regular expression")
    add("--grammar", help="text that fits this grammar, in Lark's notation")
    add("--tools", metavar="FUNCTIONS", help="offer these functions; calls must fit their schemas")
    add(
        "--tool-choice",
        metavar="CHOICE",
        help="auto (text or a call, the default), required, none, or a function's name",
    )


def taken_constraints(args: argparse.Namespace) -> dict[str, Any]:
    """The flags of `add_constraint_flags` that were given, as keywords, with files read."""
    given = taken(args, FORM_OPTIONS)
    return {k: v if k == "tool_choice" else _file_or_text(k, v) for k, v in given.items()}


def _file_or_text(name: str, value: str) -> str:
    try:
        path = user_path(value).absolute()  # a name such as - is a file's
        is_file = path.is_file() or path.is_fifo()
    except RequestError:
        is_file = False  # not a possible path
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise RequestError(f"{name}: {value} cannot be read: {error}") from None
        is_file = False
    if is_file:
        with named(name):
            return read_text(path)
    if name in ("json_schema", "tools") and not value.lstrip().startswith(("{", "[")):
        raise RequestError(f"{name}: {value!a:.80} is neither a file nor JSON")
    return value


def add_mode_flags(parser: argparse.ArgumentParser) -> None:
    """--mode and the options of each mode."""
    add = parser.add_argument_group("decoding mode (stages count from 0)").add_argument
    add("--mode", type=_mode, choices=MODES, default="full", help="default: full")
    add("--stage", type=int, help="stage: the stage that predicts (default: 0)")
    add("--max-stages", type=int, help="prefix: how many stages to run")
    add("--stages", type=numbers(int), metavar="0,1,…", help="compose: the stages to mix")
    add("--stage-weights", type=numbers(float), metavar="1,0.5,…", help="compose: their weights")
    add("--safety", type=float, help="wand: factor on the bounds (default: 1.0)")
    add(
        "--p99-bounds",
        type=numbers(float),
        metavar="B0,B1,…",
        help="wand: bounds, one for each stage but the last (default: calibration)",
    )
    add(
        "--exit-stages", type=numbers(int), metavar="0,1,…", help="wand: stages that may exit early"
    )
    add("--draft-stage", type=int, help="speculative: the last drafting stage (default: 0)")
    add(
        "--num-draft-tokens",
        type=int,
        help="speculative: most drafts per round (default: 3, or 6 with --draft-bits)",
    )
    add(
        "--draft-head",
        choices=DRAFT_HEADS,
        help="speculative: draft through all of a specialist's heads or the base's head (default: "
        "summed)",
    )
    add(
        "--draft-bits",
        choices=DRAFT_BITS,
        metavar="BITS",
        help="speculative: draft with a copy of the stages quantized to 2, 3, 4, 5, 6 or 8 bits, "
        "mxfp4 or nvfp4",
    )
    add(
        "--draft-lookup",
        action="store_true",
        default=None,
        help="speculative: also draft the tokens that followed the same text earlier",
    )
    add(
        "--no-fallback",
        action="store_true",
        help="wand, speculative: keep the mode even if full depth is faster here",
    )
    # As version 0.2 called it.
    add("--no-park", dest="no_fallback", action="store_true", help=argparse.SUPPRESS)
    for name in DELETED.keys() - {"certified"}:
        add(f"--{name}".replace("_", "-"), nargs="?", action=_Deleted, help=argparse.SUPPRESS)


class _Deleted(argparse.Action):
    """A flag that no longer exists: refused in one line with what replaces it."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        parser.error((deleted(self.dest) or "").replace("_", "-"))


def _mode(text: str) -> str:
    if problem := deleted(text):
        raise argparse.ArgumentTypeError(problem)
    return text


def file_path(text: str) -> Path:
    """A flag's type: a path, with `~` expanded."""
    if not text:
        raise argparse.ArgumentTypeError("the path is empty")
    try:
        named = user_path(text)
        named.exists()
    except RequestError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text}: {error.strerror}") from None
    return named


def folder_path(text: str) -> Path:
    """A flag's type: the path of a folder. - usually means stdin or stdout, so it is refused."""
    if text == "-":
        raise argparse.ArgumentTypeError("- is no folder's name: ./- is")
    return file_path(text)


def check_output(file: Path | None) -> None:
    """Raise RequestError, before any work, if a file to be written later cannot be."""
    if file is None:
        return
    if str(file) == "-":
        raise RequestError("- is stdout, which this flag does not write to: name a file")
    if file.is_dir():
        raise RequestError(f"{file} is a folder: name a file to write")
    if not file.absolute().parent.is_dir():
        raise RequestError(f"{file}: there is no folder {file.absolute().parent}")


def whole(least: int) -> Callable[[str], int]:
    """A flag's type: a whole number of at least `least`."""

    def parse(text: str) -> int:
        if not re.fullmatch("[0-9]{1,15}", text) or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
        return int(text)

    return parse


def size(text: str) -> int:
    """A flag's type: a size in bytes, such as 8GB."""
    try:
        return byte_size(text)
    except RequestError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def names(text: str) -> list[str]:
    """A flag's type: names separated by commas."""
    found = [part.strip() for part in text.split(",")]
    if not all(found):
        raise argparse.ArgumentTypeError(f"{text!r} has an empty name; put one comma between names")
    return found


def numbers(kind: type[int] | type[float]) -> Callable[[str], list[Any]]:
    """A flag's type: numbers separated by commas."""

    def parse(text: str) -> list[Any]:
        return [kind(part) for part in text.split(",")]

    parse.__name__ = f"list of {kind.__name__}s"
    return parse


def taken(args: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """The named flags that the command has and that have a value, as keywords."""
    values = {name: getattr(args, name, None) for name in names}
    return {name: value for name, value in values.items() if value is not None}

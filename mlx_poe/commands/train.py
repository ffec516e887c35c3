"""mlx_poe.train: train your own specialist on this machine."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from cognica_mlx.config import HEAD_MODES
from cognica_mlx.errors import RequestError, one_line
from cognica_mlx.files import strict_json
from cognica_mlx.training.optimizer import OPTIMIZERS
from cognica_mlx.training.store import STORE_BITS
from cognica_mlx.training.trainer import Evaluation
from mlx_poe.commands.entry import INTERRUPTED, interruptible, make_parser, run
from mlx_poe.commands.flags import add_checkpoint_flags, check_output, file_path, folder_path, taken
from mlx_poe.paths import user_path
from mlx_poe.training import InterruptedTraining, Result, TrainingSettings, train
from mlx_poe.training.after import bits_per_byte, calibrate_folder
from mlx_poe.training.loss_plot import plot
from mlx_poe.training.run import resumed_settings, size
from mlx_poe.training.settings import CHAT_TOKENS, NAMES

EXAMPLES = """\
  mlx_poe.train --data math --output my-math
  mlx_poe.train --model path/to/base --data chats --layers 4 --batch-size 16 --output my-chat
  mlx_poe.train --data math --output my-math --resume
  mlx_poe.train --data math --output my-math --plot losses.png --log losses.jsonl --test
  mlx_poe.train --model my-math --data more --output more-math     # a specialist on a specialist
  mlx_poe.train -c settings.yaml --output my-math

Then: poe-chat --specialist mine=my-math

The data folder holds train.jsonl, valid.jsonl and, for --test, test.jsonl; a row is
{"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}, or
{"prompt": "…", "completion": "…"}, or {"text": "…"}. The loss counts what the assistant says."""

_DEFAULTS = TrainingSettings(data="…")


def build_parser() -> argparse.ArgumentParser:
    """The command's flags. Settings have no defaults here, as a file may set them too."""
    parser = make_parser(
        "mlx_poe.train",
        "Train a specialist: a stage of new layers on top of a frozen model. The activations of "
        "the model's last layer are computed once and kept on disk, so that training runs only the "
        "new layers. --output becomes a specialist's folder, which poe-chat, mlx_poe.generate and "
        "the other commands can load.",
        EXAMPLES,
    )
    add_checkpoint_flags(parser)
    parser.set_defaults(model=None)
    group = parser.add_argument_group("input and output")
    group.add_argument("--data", metavar="FOLDER", help="folder with train.jsonl and valid.jsonl")
    group.add_argument(
        "--output",
        required=True,
        type=folder_path,
        metavar="FOLDER",
        help="the specialist's folder",
    )
    group.add_argument("--overwrite", action="store_true", help="replace it if it exists")
    group.add_argument("--resume", action="store_true", help="continue an interrupted run")
    group.add_argument(
        "-c",
        "--config",
        type=file_path,
        metavar="FILE.yaml",
        help="settings from a file, named like the flags with _ for -; flags take precedence",
    )
    group.add_argument(
        "--log", type=file_path, metavar="FILE", help="write a line of JSON per evaluation"
    )
    group.add_argument(
        "--plot", type=file_path, metavar="FILE", help="draw the losses (.png, .svg)"
    )
    group.add_argument(
        "--test", action="store_true", default=None, help="measure on test.jsonl at the end"
    )
    group = parser.add_argument_group("the stage")
    _add(group, "--layers", "--num-layers", type=int, help="how many new layers")
    _add(
        group,
        "--head-mode",
        choices=HEAD_MODES,
        help="predict with the model's heads and a new one (dual), only the new one (specialist), "
        "or only the model's (base)",
        default="the model's",
    )
    _add(
        group,
        "--chat-tokens",
        choices=CHAT_TOKENS,
        help="embeddings of the chat tokens: those of words, the model's own (keep), or words for "
        "tokens that the model never saw (auto)",
    )
    group = parser.add_argument_group("training")
    _add(group, "--iters", type=int, help="batches to train on")
    _add(group, "--batch-size", type=int, help="rows per batch")
    _add(
        group,
        "--learning-rate",
        type=float,
        help="peak rate; the head's is half of it or less",
    )
    _add(
        group,
        "--optimizer",
        choices=OPTIMIZERS,
        help="for the layers' matrices; the rest uses AdamW",
    )
    _add(group, "--grad-accumulation-steps", type=int, help="batches per update")
    _add(group, "--max-grad-norm", type=float, help="clip the gradient to this norm; 0 is off")
    _add(
        group, "--max-seq-length", type=int, help="cut longer rows to this many tokens",
        default="the model's sequence length",
    )  # fmt: skip
    _add(
        group,
        "--mask-prompt",
        action=argparse.BooleanOptionalAction,
        help="count only what the assistant says",
        default="yes; plain text counts as a whole",
    )
    _add(
        group, "--pack", action="store_true",
        help="join rows up to --max-seq-length; each row sees those before it", default="no",
    )  # fmt: skip
    _add(group, "--seed", type=int, help="seed for the weights and the order of the data")
    _add(group, "--steps-per-eval", type=int, help="iterations between validations")
    _add(group, "--val-batches", type=int, help="batches to validate on, -1 for all")
    _add(group, "--save-every", type=int, help="iterations between checkpoints")
    _add(
        group, "--grad-checkpoint", action="store_true",
        help="compute activations twice to save memory", default="no",
    )  # fmt: skip
    group = parser.add_argument_group("the model's activations")
    group.add_argument(
        "--no-store",
        dest="store",
        action="store_false",
        default=None,
        help="keep nothing on disk; run the model in every iteration",
    )
    _add(group, "--store-bits", type=int, choices=STORE_BITS, help="bits per value")
    group.add_argument(
        "--store-path",
        type=folder_path,
        metavar="FOLDER",
        help="keep them here (default: cognica-mlx/activations in the user's cache folder)",
    )
    return parser


def _add(group: Any, flag: str, *more: str, help: str, default: Any = None, **options: Any) -> None:
    name = flag.lstrip("-").replace("-", "_")
    shown = getattr(_DEFAULTS, name) if default is None else default
    group.add_argument(
        flag, *more, dest=name, default=None, help=f"{help} (default: {shown})", **options
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    with interruptible():
        return run(build_parser(), _train, argv)


def _train(args: argparse.Namespace) -> int:
    for file in (args.log, args.plot):
        check_output(file)
    if args.plot:
        _check_plot(args.plot)
    given = {**(_read_config(args.config) if args.config else {}), **_flags(args)}
    known = resumed_settings(args.output, given) if args.resume else None
    settings = known or TrainingSettings(**given)
    with Watch(args.log) as watch:
        try:
            result = train(
                settings,
                args.output,
                watch,
                resume=args.resume,
                overwrite=args.overwrite,
                store_path=args.store_path,
            )
        except InterruptedTraining as stopped:
            watch.done()
            print(
                f"\nmlx_poe.train: interrupted after iteration {stopped.iteration}, which is "
                f"saved; continue with: {_again(args)}",
                file=sys.stderr,
            )
            return INTERRUPTED
        best = result.best
        print(
            f"validation: {best.valid_loss:.6f} nats a token, {best.bits_per_byte:.6f} bits per "
            f"byte, at iteration {best.iteration}"
        )
        print(
            f"trained in {result.seconds:.0f} s, {result.tokens_per_second:.0f} tokens a second, "
            f"peak memory {size(result.peak_memory)}"
        )
        print(f"written to {args.output}", flush=True)
        if args.plot:
            plot(result.curve, result.best_iteration, args.plot)
        try:
            _measure(args.output, settings, result, watch)
        except KeyboardInterrupt:
            watch.done()
            print(
                "\nmlx_poe.train: interrupted; the specialist is written, and mlx_poe.calibrate "
                "can calibrate it",
                file=sys.stderr,
            )
            return INTERRUPTED
    return 0


def _again(args: argparse.Namespace) -> str:
    """The command that continues an interrupted run: what is not a setting is not saved."""
    words = ["mlx_poe.train", "--output", str(args.output), "--resume"]
    words += ["--overwrite"] if args.overwrite else []
    for name, value in taken(args, ("log", "plot", "store_path")).items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    return shlex.join(words)


def _flags(args: argparse.Namespace) -> dict[str, Any]:
    """The settings given as flags."""
    return _absolute(taken(args, NAMES))


def _absolute(given: dict[str, Any]) -> dict[str, Any]:
    """The settings with absolute paths, since training may resume from another folder."""
    for name in ("data", "model"):
        value = given.get(name)
        if isinstance(value, str) and value and (name == "data" or user_path(value).is_dir()):
            given[name] = str(user_path(value).absolute())
    return given


def _read_config(path: Path) -> dict[str, Any]:
    """The settings in a YAML file. RequestError names any entry that is not a setting."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise RequestError(f"{path} cannot be read as YAML: {one_line(error)}") from None
    if not isinstance(content, dict):
        raise RequestError(f"{path} must contain settings, one `name: value` per line")
    found: dict[str, Any] = {}
    for key, value in content.items():
        name = "layers" if key == "num_layers" else key
        if name not in NAMES:
            raise RequestError(f"{path}: {key!r} is not a setting; choose from {', '.join(NAMES)}")
        if isinstance(getattr(_DEFAULTS, name), float) and isinstance(value, str):
            value = _number(path, name, value)
        found[name] = value
    return _absolute(found)


def _number(path: Path, name: str, text: str) -> float:
    # YAML reads 1e-4, without a decimal point, as a string.
    try:
        return float(text)
    except ValueError:
        raise RequestError(f"{path}: {name} {text!r} is not a number") from None


def _check_plot(path: Path) -> None:
    """Raise RequestError, before any work, if the plot could not be drawn at the end."""
    if find_spec("matplotlib") is None:
        raise RequestError("--plot needs matplotlib: pip install 'cognica-mlx[plot]'")
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise RequestError(f"--plot {path}: name a .png, .svg or .pdf file")


def _measure(output: Path, settings: TrainingSettings, result: Result, watch: Watch) -> None:
    """Calibrate and time the new specialist, and print the results."""
    if result.test is not None:
        bits = bits_per_byte(output, settings.dtype, result.test)
        print(f"test: {bits:.6f} bits per byte", flush=True)
    names: set[str] = set()

    def show(what: str, done: int, total: int) -> None:
        if what not in names:
            names.add(what)
            watch.phase(f"calibrating: {what}", total)
        watch.advance(1)

    try:
        calibration, speeds = calibrate_folder(output, settings.dtype, result.valid, show)
    except RequestError as error:
        watch.note(f"not calibrated: {error}")
        return
    finally:
        watch.done()
    for mode, speed in speeds.items():
        kept = "" if speed.acceptance is None else f", {speed.acceptance:.0%} of its drafts kept"
        print(f"{mode}: {speed.tokens_per_second:.0f} tokens a second{kept}")
    print(f"calibrated: recommended mode {calibration.recommended}")


class Watch:
    """Shows a run on stderr (a bar on a terminal, a line per evaluation anywhere) and logs it."""

    def __init__(self, log: Path | None):
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        # What it holds is replaced once a new run has something to say.
        self._log = log.open("a", encoding="utf-8") if log else None
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._started = time.perf_counter()

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        self.done()
        if self._log:
            with suppress(OSError):  # which was raised when the line was written
                self._log.close()

    def note(self, text: str) -> None:
        """See `Reporter`."""
        self._console.print(escape(text))

    def phase(self, name: str, total: int) -> None:
        """See `Reporter`."""
        self.done()
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        status = TextColumn("{task.fields[text]}")
        self._bar = Progress(
            *columns,
            TimeRemainingColumn(),
            status,
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task(name, total=total, text="")
        self._bar.start()

    def advance(self, count: int, text: str = "") -> None:
        """See `Reporter`."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, advance=count, text=text)

    def done(self) -> None:
        """See `Reporter`."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def evaluated(self, evaluation: Evaluation, rate: float) -> None:
        """See `Reporter`."""
        train = "" if evaluation.train_loss is None else f"train {evaluation.train_loss:.4f}, "
        self.note(
            f"iteration {evaluation.iteration}: {train}validation {evaluation.valid_loss:.4f} "
            f"nats, {evaluation.bits_per_byte:.4f} bits per byte"
        )
        if self._log:
            seconds = round(time.perf_counter() - self._started, 3)
            line = {**asdict(evaluation), "learning_rate": rate, "seconds": seconds}
            try:
                if evaluation.iteration == 0 and Path(self._log.name).is_file():
                    self._log.truncate(0)
                print(strict_json.dumps(line), file=self._log, flush=True)
            except OSError as error:
                error.filename = self._log.name
                raise

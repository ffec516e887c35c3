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

from cognica_mlx.errors import RequestError, one_line
from cognica_mlx.files import strict_json
from cognica_mlx.files.byte_sizes import size_text
from cognica_mlx.training.trainer import Evaluation
from mlx_poe.commands.entry import INTERRUPTED, interruptible, make_parser, run
from mlx_poe.commands.flags import add_checkpoint_flags, check_output, file_path, folder_path, taken
from mlx_poe.generation.progress import Bars
from mlx_poe.paths import user_path
from mlx_poe.rows import read_text
from mlx_poe.training import InterruptedTraining, Result, TrainingSettings, train
from mlx_poe.training.after import calibrate_folder, measured_bits
from mlx_poe.training.loss_plot import plot
from mlx_poe.training.run import resumed_settings
from mlx_poe.training.settings import SETTINGS

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
    _add(parser.add_argument_group("the stage"), "layers", "chat_tokens")
    _add(parser.add_argument_group("training"), "iters", "grad_checkpoint")
    group = parser.add_argument_group("the model's activations")
    group.add_argument(
        "--no-store",
        dest="store",
        action="store_false",
        default=None,
        help="keep nothing on disk; run the model in every iteration",
    )
    _add(group, "store_bits", "store_bits")
    group.add_argument(
        "--store-path",
        type=folder_path,
        metavar="FOLDER",
        help="keep them here (default: cognica-mlx/activations in the user's cache folder)",
    )
    return parser


def _add(group: argparse._ArgumentGroup, first: str, last: str) -> None:
    """Flags for the settings from `first` to `last`."""
    names = list(SETTINGS)
    for name in names[names.index(first) : names.index(last) + 1]:
        about = SETTINGS[name].metadata
        options = {**about["kind"].flag, "dest": name, "default": None, "help": about["help"]}
        if name == "mask_prompt":
            options["action"] = argparse.BooleanOptionalAction
        group.add_argument(f"--{name.replace('_', '-')}", *about["flags"], **options)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    with interruptible():
        return run(build_parser(), _train, argv)


def _train(args: argparse.Namespace) -> int:
    for file in (args.log, args.plot):
        check_output(file)
    # Before any work, as a plot is drawn at the end.
    if args.plot and find_spec("matplotlib") is None:
        raise RequestError("--plot needs matplotlib: pip install 'cognica-mlx[plot]'")
    if args.plot and args.plot.suffix not in (".png", ".svg", ".pdf"):
        raise RequestError(f"--plot {args.plot}: name a .png, .svg or .pdf file")
    flags = _absolute(taken(args, list(SETTINGS)))
    given = {**(_read_config(args.config) if args.config else {}), **flags}
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
            watch.progress.close()
            print(
                f"\nmlx_poe.train: interrupted after iteration {stopped.iteration}, which is "
                f"saved; continue with: {_again(args)}",
                file=sys.stderr,
            )
            return INTERRUPTED
        watch.progress.close()
        best = result.best
        print(
            f"validation: {best.valid_loss:.6f} nats a token, {best.bits_per_byte:.6f} bits per "
            f"byte, at iteration {best.iteration}\n"
            f"trained in {result.seconds:.0f} s, {result.tokens_per_second:.0f} tokens a second, "
            f"peak memory {size_text(result.peak_memory)}"
        )
        print(f"written to {args.output}", flush=True)
        if args.plot:
            plot(result.curve, best, args.plot)
        try:
            _measure(args.output, settings, result, watch)
        except KeyboardInterrupt:
            watch.progress.close()
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
        content = yaml.safe_load(read_text(path))
    except (ValueError, yaml.YAMLError) as error:
        raise RequestError(f"{path} cannot be read as YAML: {one_line(error)}") from None
    if not isinstance(content, dict):
        raise RequestError(f"{path} must contain settings, one `name: value` per line")
    found: dict[str, Any] = {}
    for key, value in content.items():
        name = "layers" if key == "num_layers" else key
        if name not in SETTINGS:
            choose = f"choose from {', '.join(SETTINGS)}"
            raise RequestError(f"{path}: {key!r} is not a setting; {choose}")
        if isinstance(SETTINGS[name].default, float) and isinstance(value, str):
            # YAML reads 1e-4, without a decimal point, as a string.
            try:
                value = float(value)
            except ValueError:
                raise RequestError(f"{path}: {name} {value!r} is not a number") from None
        found[name] = value
    return _absolute(found)


def _measure(output: Path, settings: TrainingSettings, result: Result, watch: Watch) -> None:
    """Calibrate and time the new specialist, and print the results."""
    if result.test is not None:
        bits = measured_bits(output, settings.dtype, result.test)
        print(f"test: {bits:.6f} bits per byte", flush=True)
    try:
        calibration, speeds = calibrate_folder(output, settings.dtype, result.valid, watch.progress)
    except RequestError as error:
        watch.note(f"not calibrated: {error}")
        return
    finally:
        watch.progress.close()
    for mode, speed in speeds.items():
        kept = "" if speed.acceptance is None else f", {speed.acceptance:.0%} of its drafts kept"
        print(f"{mode}: {speed.tokens_per_second:.0f} tokens a second{kept}")
    print(f"calibrated: recommended mode {calibration.recommended}")


class Watch:
    """Shows a run on stderr (bars on a terminal, a line per evaluation anywhere) and logs it."""

    def __init__(self, log: Path | None):
        self.progress = Bars()
        # An older log is replaced at the first evaluation of a new run.
        self._log = log.open("ab") if log else None
        self._started = time.perf_counter()

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.close()
        if self._log:
            with suppress(OSError):  # it was reported when the line was written
                self._log.close()

    def note(self, text: str) -> None:
        """See `Reporter`."""
        print(text, file=sys.stderr)

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
                self._log.write(strict_json.line(line))
                self._log.flush()
            except OSError as error:
                error.filename = self._log.name
                raise

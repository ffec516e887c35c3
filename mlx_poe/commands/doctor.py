"""mlx_poe.doctor: check this machine and back end against recorded answers."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from cognica_mlx.files import whole_file
from mlx_poe.commands.entry import interruptible, make_parser, run
from mlx_poe.commands.flags import check_output, file_path
from mlx_poe.doctor.examination import examine
from mlx_poe.generation.progress import Bars
from mlx_poe.loading.load import DEFAULT_MODEL

EXAMPLES = """\
  mlx_poe.doctor                                       # about a minute
  mlx_poe.doctor --json report.json                    # to attach to a bug report
  mlx_poe.doctor --model path/to/model                 # modes, batches and costs of your model

The exit status is 1 if a check fails."""


def build_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = make_parser(
        "mlx_poe.doctor",
        "Check this machine: recorded answers in every type, rows together and alone, every "
        "decoding mode, batches, and what each costs here. Each line passes, warns or fails.",
        EXAMPLES,
    )
    parser.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        metavar="MODEL",
        help="check rows, modes, batches and costs with this model (default: %(default)s)",
    )
    parser.add_argument(
        "--json",
        type=file_path,
        metavar="FILE",
        help="write the report as JSON; - prints it instead of the text",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    with interruptible():
        return run(build_parser(), _doctor, argv)


def _doctor(args: argparse.Namespace) -> int:
    prints = str(args.json) == "-"
    if not prints:
        check_output(args.json)
    with Bars() as progress:
        report = examine(args.model, progress)
    if prints:
        print(report.to_json(), end="")
    else:
        print(report.to_text())
        if args.json:
            whole_file.write_text(args.json, report.to_json())
    if report.failed:
        print(
            "mlx_poe.doctor: a check failed; please report it with all of the above",
            file=sys.stderr,
        )
    return int(report.failed)

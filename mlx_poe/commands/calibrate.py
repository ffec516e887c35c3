"""mlx_poe.calibrate: measure a model's stages on a text, and save the result with the model."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Column, Table

from cognica_mlx.calibration_file import CALIBRATION_FILE, Calibration
from cognica_mlx.pricing.measuring import calibrate
from mlx_poe.commands.entry import make_parser, run
from mlx_poe.commands.flags import LOADING, add_model_flags, check_output, file_path, taken, whole
from mlx_poe.commands.measured_texts import read_texts, replies, segments
from mlx_poe.generation.progress import Bars
from mlx_poe.loading.load import find_model, load

EXAMPLES = """\
  mlx_poe.calibrate --model path/to/model --data notes.txt
  mlx_poe.calibrate --model path/to/specialist --data chats.jsonl --num-tokens 8192
  mlx_poe.calibrate --model path/to/specialist --data valid.jsonl --mask-prompt
  mlx_poe.calibrate --data notes.txt --output here.json --json"""


def build_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = make_parser(
        "mlx_poe.calibrate",
        "Measure how good each stage of a model is on a text: the bounds that mode wand needs, "
        "agreement, acceptance, and bits per byte. The result is saved in the model's folder as "
        f"{CALIBRATION_FILE}, where the other commands find it.",
        EXAMPLES,
    )
    parser.add_argument(
        "--data",
        required=True,
        type=file_path,
        metavar="FILE",
        help="a text file, - for stdin, or a .jsonl file with a text or a chat on each line "
        '({"text": "…"} or {"messages": [{"role": "user", "content": "…"}, …]})',
    )
    parser.add_argument(
        "--num-tokens",
        type=whole(1),
        default=16384,
        help="read at most this many tokens of the text (default: 16384)",
    )
    parser.add_argument(
        "--mask-prompt",
        action="store_true",
        help="measure bits per byte only on what the assistant says; chats are kept whole",
    )
    parser.add_argument(
        "--continuations",
        type=whole(1),
        default=16,
        help="how many greedy continuations to measure acceptance on (default: 16)",
    )
    parser.add_argument(
        "--output", type=file_path, metavar="FILE", help="write here, not to the model's folder"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON, no table")
    add_model_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return run(build_parser(), _calibrate, argv)


def _calibrate(args: argparse.Namespace) -> int:
    check_output(args.output)
    data = read_texts(args.data, args.mask_prompt)
    model, tokenizer = load(args.model, **taken(args, LOADING))
    texts, counted = segments(data, tokenizer, args.num_tokens), None
    if args.mask_prompt:
        texts, counted = replies(data, tokenizer, args.num_tokens)
    with Bars() as bars:
        calibration = calibrate(
            model,
            texts,
            tokenizer.token_byte_lengths(model.config.vocab_size),
            continuations=args.continuations,
            counted=counted,
            progress=bars,
        )
    path = args.output or find_model(args.model, args.revision).folder / CALIBRATION_FILE
    calibration.save(path)
    if args.json:
        print(calibration.to_json(), end="")
    else:
        _print_tables(calibration)
    print(f"written to {path}", file=sys.stderr)
    return 0


def _print_tables(calibration: Calibration) -> None:
    console = Console()
    last = len(calibration.top1_agreement)
    headings = ("stage", "top-1 agreement", "bits per byte", "p50", "p90", "p99 bound")
    stages = Table(*(Column(one, justify="right") for one in headings), title="Stages, on the text")
    for stage in range(last + 1):
        row = [str(stage), "", f"{calibration.bits_per_byte[stage]:.4f}", "", "", ""]
        if stage < last:
            row[1] = f"{calibration.top1_agreement[stage]:.1%}"
            row[3:] = [f"{loss:.3f}" for loss in calibration.margin_loss[stage]]
        stages.add_row(*row)
    stages.add_row("full", "100.0%", f"{calibration.bits_per_byte[-1]:.4f}", "", "", "")
    console.print(stages)
    console.print("p50 to p99: how much of the best token's margin is lost by the next stage.\n")
    lengths = len(next(iter(calibration.acceptance.values())))
    columns = (Column(str(one), justify="right") for one in ("draft stage", *range(1, lengths + 1)))
    drafts = Table(*columns, title="Acceptance of drafts, on the model's own continuations")
    for stage_name, rates in calibration.acceptance.items():
        drafts.add_row(stage_name, *(f"{rate:.0%}" for rate in rates))
    console.print(drafts)
    title = "Expected speed of the modes, if time is proportional to bytes read"
    modes = Table("mode", "speed-up", "best options", title=title)
    for mode, speedup in calibration.speedups.items():
        best = " ".join(
            f"--{name.replace('_', '-')} "
            + (",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value))
            for name, value in calibration.options[mode].items()
        )
        modes.add_row(mode, f"{speedup:.2f}x", best)
    console.print(modes)
    console.print(f"recommended: --mode {calibration.recommended}")

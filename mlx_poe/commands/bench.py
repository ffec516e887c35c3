"""mlx_poe.bench: what stage cut-offs and decoding modes gain on this machine."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import date
from importlib.util import find_spec
from typing import Any

import mlx.core as mx
import numpy as np
from rich.console import Console

from cognica_mlx.backend import blas
from cognica_mlx.bench.machine_card import slow_blas, this_machine
from cognica_mlx.bench.peers import peers
from cognica_mlx.bench.report import Report, compare, read, show
from cognica_mlx.bench.sections import stage_speeds as figures
from cognica_mlx.bench.sections.batch_speeds import batches
from cognica_mlx.bench.sections.constrained import constrained
from cognica_mlx.bench.sections.drafts import BEGINNINGS, drafts
from cognica_mlx.bench.sections.host import host
from cognica_mlx.bench.sections.mode_speeds import Recording, modes
from cognica_mlx.bench.sections.serving import CLIENTS, Served, check_installed, serving
from cognica_mlx.bench.sections.stage_speeds import ROWS, Figure, Setup
from cognica_mlx.bench.sections.stage_training import training
from cognica_mlx.bench.shapes import SHAPES, random_model, rounded, shape_config
from cognica_mlx.bench.synthetic import Synthetic, check_agreement, synthetic_model
from cognica_mlx.calibration_file import Calibration
from cognica_mlx.convert.chat_layout import BOS
from cognica_mlx.errors import RequestError
from cognica_mlx.files import whole_file
from cognica_mlx.files.stored import DTYPES, dtype_name, dtype_named
from cognica_mlx.network.model import PoEModel
from cognica_mlx.pricing.measuring import calibrate
from cognica_mlx.pricing.replaying import recorded_prefix
from cognica_mlx.pricing.timed_costs import measure, measure_drafter
from cognica_mlx.scheme import BITS
from mlx_poe.commands import bench_machines
from mlx_poe.commands.bench_machines import MACHINES
from mlx_poe.commands.bench_texts import long_text, margins, prompts, recording
from mlx_poe.commands.entry import interruptible, make_parser, run
from mlx_poe.commands.flags import (
    LOADING,
    add_revision_flag,
    add_specialist_flag,
    check_output,
    file_path,
    names,
    numbers,
    starters,
    taken,
)
from mlx_poe.generation.progress import Bars
from mlx_poe.loading.load import DEFAULT_MODEL, find_model, load
from mlx_poe.rows import read_text

SECTIONS = (
    *("stages", "prompt", "rows", "modes", "batch", "host", "constrained"),
    *("serving", "lengths", "quantised", "memory", "training", "drafts", MACHINES),
)
DEFAULT_SECTIONS = ("stages", "prompt", "rows", "modes", "memory")

# Flags that take a whole number: default, least, most, help.
NUMBERS = (
    ("trials", 5, 1, 1000, "rounds over all cases"),
    # A state can roll back no more tokens.
    ("max-tokens", 32, 2, 120, "tokens decoded per trial"),
    ("context", 128, 16, 10**6, "tokens of text before those"),
    ("prompt-tokens", 512, 16, 10**6, "length of the prompt read"),
)

EXAMPLES = """\
  mlx_poe.bench                                        # the built-in poe-tiny
  mlx_poe.bench --model cognica/Cognica-PoE-v1.0-1.3B-base --peers
  mlx_poe.bench --shape 1.3b --only stages,rows --json 1.3b.json
  mlx_poe.bench --shape 1.3b --agreement 0.88 --only modes --plot modes.png
  mlx_poe.bench --shape 1.3b --only lengths --lengths 2048,16384
  mlx_poe.bench --only host -m 88                      # the host's time a token, against mlx-lm
  mlx_poe.bench --only serving --clients 1,16          # our server and mlx_lm.server under load
  mlx_poe.bench --shape 1.3b-stage --only training     # training a stage of your own
  mlx_poe.bench --only drafts --model poe-tiny-chat    # drafters rounded to 2 to 8 bits
  mlx_poe.bench --only drafts --shape 1.3b --agreement 0.88
  mpirun -n 2 mlx_poe.bench --shape 1.3b --only machines --split stages --prompt-tokens 2048
  mlx_poe.bench --compare old.json"""


def build_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = make_parser(
        "mlx_poe.bench",
        "Measure a model's stage cut-offs and decoding modes on this machine.",
        EXAMPLES,
    )
    what = parser.add_argument_group("model")
    what.add_argument(
        "--model", metavar="MODEL", help=f"folder, hub id or built-in (default: {DEFAULT_MODEL})"
    )
    add_revision_flag(what)
    what.add_argument(
        "--shape", choices=SHAPES, help="use random weights in a released model's shape instead"
    )
    what.add_argument(
        "--agreement",
        type=float,
        metavar="A",
        help="with --shape: plant a text on which stage 0 agrees with the full model on about this "
        "share of tokens, so that wand and speculation can be measured",
    )
    what.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on a GPU, else float32")
    what.add_argument(
        "--quantize", type=int, choices=BITS, metavar="BITS", help="quantize the matrices first"
    )
    how = parser.add_argument_group("measuring")
    how.add_argument(
        "--only",
        type=names,
        metavar="SECTION,…",
        help=f"measure only these of {', '.join(SECTIONS)} (default: {','.join(DEFAULT_SECTIONS)})",
    )
    how.add_argument(
        "--peers",
        action="store_true",
        help="also measure mlx-lm's engine on a Llama of equal size",
    )
    add_specialist_flag(
        how,
        "for the section serving, which loads the first and lets the second take over from it "
        "(default: poe-tiny's own)",
    )
    for name, default, _, _, text in NUMBERS:
        short = ("-m",) if name == "max-tokens" else ()
        text = f"{text} (default: {default})"
        how.add_argument(f"--{name}", *short, type=int, default=default, help=text)
    how.add_argument(
        "--lengths",
        type=numbers(int),
        default=[128, 2048, 16384],
        metavar="N,…",
        help="text lengths of the section lengths (default: 128,2048,16384)",
    )
    how.add_argument(
        "--q-bits",
        type=numbers(int),
        default=[8, 4],
        metavar="BITS,…",
        help="bit widths of the section quantised (default: 8,4)",
    )
    how.add_argument(
        "--clients",
        type=numbers(int),
        default=[*CLIENTS],
        metavar="N,…",
        help=f"numbers of clients of the section serving (default: {','.join(map(str, CLIENTS))})",
    )
    bench_machines.add_machine_flags(parser)
    out = parser.add_argument_group("output")
    out.add_argument("--json", type=file_path, metavar="FILE", help="write the result file")
    out.add_argument("--csv", type=file_path, metavar="FILE", help="write the figures as a table")
    out.add_argument("--plot", type=file_path, metavar="FILE", help="draw a PNG, SVG or PDF")
    out.add_argument("--compare", type=file_path, metavar="FILE", help="an older result file")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    with interruptible():
        return run(build_parser(), lambda args: _bench(args, argv), argv)


def _bench(args: argparse.Namespace, argv: Sequence[str]) -> int:
    _check(args)
    # Before minutes of measuring.
    old = read(read_text(args.compare), str(args.compare)) if args.compare else None
    remarks = []
    if mx.default_device() == mx.cpu and (blas.advice or slow_blas()):
        remarks.append(
            "warning: this BLAS is slow, and a batch of rows costs as much as the rows one by "
            f"one: the figures mean little. {blas.advice or blas.REMEDY}"
        )
        print(f"mlx_poe.bench: {remarks[0]}", file=sys.stderr)
    with Bars() as progress:
        if args.split:
            dtype = _dtype(args)
            shared = bench_machines.measure_machines(args, dtype, progress)
            if shared is None:
                return 0  # rank 0 reports
            name, found = shared
            machine = this_machine()
        else:
            machine = this_machine()
            model, texts, calibration, recorded, name = _prepare(args, progress)
            if not (calibration or recorded) and "modes" in (args.only or DEFAULT_SECTIONS):
                remarks.append(_left_out(args, model))
            setup = Setup(model, machine, texts, args.max_tokens, args.trials, progress)
            found = _measure(args, setup, calibration, recorded, remarks)
            dtype = dtype_name(model.resid_lambdas.dtype)
    report = Report(
        model=name,
        dtype=dtype + (f", {args.quantize} bits" if args.quantize else ""),
        command=shlex.join(["mlx_poe.bench", *argv]),
        date=date.today().isoformat(),
        machine=machine,
        figures=found,
        remarks=remarks,
    )
    console = Console(width=None if sys.stdout.isatty() else 160)
    show(report, console)
    if old:
        compare(report, old, console)
    for path, content in ((args.json, report.to_json()), (args.csv, report.to_csv())):
        if path:
            whole_file.write_text(path, content)
    if args.plot:
        from cognica_mlx.bench.plot import plot

        with whole_file.replacing(args.plot, args.plot.suffix) as drawing:
            plot(report, drawing)
    return 0


def _left_out(args: argparse.Namespace, model: PoEModel) -> str:
    """Why the modes that need a calibration are not measured."""
    if args.shape:
        return (
            "random weights: drafts are kept at random, and wand is left out; "
            "--agreement plants a text"
        )
    problem = model.calibration_problem
    return "wand is left out: " + (problem or "no calibration (mlx_poe.calibrate makes one)")


def _check(args: argparse.Namespace) -> None:
    """Reject bad flags before minutes of measuring."""
    if args.model and args.shape:
        raise RequestError("give either --model or --shape, not both")
    bench_machines.check_machines(args)
    if args.agreement is not None:
        if not args.shape:
            raise RequestError("--agreement needs --shape; a real model has its own agreement")
        check_agreement(args.agreement)
    for section in args.only or ():
        if section not in SECTIONS:
            raise RequestError(f"--only {section}: choose from {', '.join(SECTIONS)}")
    for name, _, least, most, _ in NUMBERS:
        value = getattr(args, name.replace("-", "_"))
        if not least <= value <= most:
            raise RequestError(f"--{name} {value} is not between {least} and {most}")
    if not args.lengths or min(args.lengths) < 16:
        raise RequestError("--lengths: each must be at least 16")
    if not args.clients or not all(1 <= n <= 1000 for n in args.clients):
        raise RequestError("--clients: each must be between 1 and 1000")
    if any(bits not in BITS for bits in args.q_bits):
        raise RequestError(f"--q-bits: choose from {', '.join(map(str, BITS))}")
    if args.quantize and "quantised" in (args.only or ()):
        raise RequestError("--quantize: the section quantised quantizes the model itself")
    if args.plot and find_spec("matplotlib") is None:
        raise RequestError("--plot needs matplotlib: pip install 'cognica-mlx[plot]'")
    if args.plot and not {"stages", "modes"} & set(args.only or DEFAULT_SECTIONS):
        raise RequestError("--plot draws the sections stages and modes; measure one of them")
    if args.plot and args.plot.suffix.lower() not in ("", ".png", ".svg", ".pdf"):
        raise RequestError(f"--plot {args.plot}: name it .png, .svg or .pdf")
    if "serving" in (args.only or ()):
        if args.shape:
            raise RequestError("the section serving needs a real model, not --shape")
        check_installed()
    elif args.specialist:
        raise RequestError("--specialist is for the section serving")
    for file in (args.json, args.csv, args.plot):
        check_output(file)


def _prepare(
    args: argparse.Namespace, progress: Callable[[str, int, int], None]
) -> tuple[PoEModel, list[list[int]], Calibration | None, Recording | None, str]:
    """The model, two texts of `context` tokens, what WAND and drafting use, and a name."""
    kind = _dtype(args)
    if args.shape and args.only == ["drafts"]:
        # With a shape, this section only counts bytes: nothing is computed.
        model = PoEModel(shape_config(args.shape))
        model.set_dtype(DTYPES[args.dtype or "bfloat16"])
        return model, [], None, None, f"{args.shape}, by its bytes in {args.dtype or 'bfloat16'}"
    if not args.shape:
        name = args.model or DEFAULT_MODEL
        model, tokenizer = load(name, **taken(args, LOADING))
        parts = [tokenizer.encode(text, add_special_tokens=False) for text in BEGINNINGS]
        bos = tokenizer.token_id(BOS)
        texts = [long_text(parts[i:] + parts[:i], args.context, bos) for i in (0, 4)]
        return model, texts, model.calibration, None, name
    config = shape_config(args.shape)
    name = f"{args.shape}, random weights"
    if args.agreement is None:
        model = random_model(config, DTYPES[kind])
        if args.quantize:
            model = rounded(model, args.quantize)
        rng = np.random.default_rng(0)
        texts = rng.integers(0, config.vocab_size, (2, args.context)).tolist()
        return model, texts, None, recording() if config.poe_n_stages == 4 else None, name
    progress("planting a text", 0, 1)
    built = synthetic_model(config, DTYPES[kind], args.agreement, margins())
    if args.quantize:
        built = replace(built, model=rounded(built.model, args.quantize))
    calibration = _calibrate(built, progress)
    texts = [built.text(args.context, start) for start in (1000, 5000)]
    agreed = f"planted text: stage 0 agrees on {calibration.acceptance['0'][0]:.1%} of its tokens"
    return built.model, texts, calibration, None, f"{name}, {agreed}"


def _calibrate(built: Synthetic, progress: Callable[[str, int, int], None]) -> Calibration:
    model, text = built.model, built.text(64, 100)
    costs = measure(model, ROWS, text=text, trials=3)
    if prefix := recorded_prefix(model):
        costs = replace(costs, rounded=measure_drafter(prefix, ROWS, text=text))
    texts, ones = [built.text(300, start) for start in (0, 2000, 4000)], [1] * len(built.successor)
    few: dict[str, Any] = {"continuations": 8, "continuation_tokens": 64, "costs": costs}
    return calibrate(model, texts, ones, **few, progress=progress)


def _measure(
    args: argparse.Namespace,
    setup: Setup,
    calibration: Calibration | None,
    recorded: Recording | None,
    remarks: list[str],
) -> list[Figure]:
    wanted = args.only or DEFAULT_SECTIONS
    sections: dict[str, Callable[[], list[Figure]]] = {
        "stages": lambda: figures.stages(setup),
        "prompt": lambda: figures.prompts(setup, args.prompt_tokens),
        "rows": lambda: figures.rows(setup),
        "modes": lambda: modes(setup, calibration, recorded, remarks.append),
        "batch": lambda: batches(setup, calibration),
        "host": lambda: host(setup, None if args.shape else args.model or DEFAULT_MODEL),
        "constrained": lambda: constrained(setup),
        "serving": lambda: serving(setup, _served(args), args.prompt_tokens, args.clients),
        "lengths": lambda: figures.lengths(setup, args.lengths),
        "quantised": lambda: figures.quantised(setup, args.q_bits),
        "memory": lambda: figures.memory(setup, max(args.prompt_tokens, args.context)),
        "training": lambda: training(setup),
        "drafts": lambda: drafts(setup, prompts(args, setup.model), args.agreement),
    }
    found = [figure for name, measure in sections.items() if name in wanted for figure in measure()]
    if args.peers:
        found += peers(setup, args.prompt_tokens)
    return found


def _served(args: argparse.Namespace) -> Served:
    """The first specialist, or the model itself if there is none, and what is served with it."""
    model = args.model or DEFAULT_MODEL
    named = args.specialist or [(one, one) for one in starters(model)]
    specialists = [(name, find_model(path)) for name, path in named]
    flags = [("--revision", args.revision), ("--quantize", args.quantize)]
    return Served(
        load=specialists[0][1] if specialists else find_model(model, args.revision),
        dtype=_dtype(args),
        bits=args.quantize,
        model=model,
        flags=[part for flag, value in flags if value for part in (flag, str(value))],
        specialists=specialists,
    )


def _dtype(args: argparse.Namespace) -> str:
    return dtype_name(dtype_named(args.dtype))

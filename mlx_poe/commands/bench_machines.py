"""mlx_poe.bench --split: the section that takes several machines."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from cognica_mlx.bench.figures import Figure
from cognica_mlx.bench.machines import machines, shared_out
from cognica_mlx.bench.shapes import shape_config
from cognica_mlx.convert.stored import DTYPES
from cognica_mlx.errors import RequestError
from cognica_mlx.machines.link import TIMEOUT
from mlx_poe.commands.split import add_split_flags, check_split

MACHINES = "machines"


def add_machine_flags(parser: argparse.ArgumentParser) -> None:
    """--split and what belongs to it."""
    add_split_flags(parser)
    parser.add_argument(
        "--siblings",
        type=int,
        default=0,
        metavar="N",
        help="with --split: measure N specialists side by side, instead of a prompt",
    )


def check_machines(args: argparse.Namespace) -> None:
    """RequestError for flags that make no sense together."""
    check_split(args)
    if args.siblings and not args.split:
        raise RequestError("--siblings belongs to --split")
    if args.siblings < 0:
        raise RequestError(f"--siblings {args.siblings} is below 0")
    wanted = MACHINES in (args.only or ())
    if not (args.split or wanted):
        return
    if not (args.split and args.shape and args.only == [MACHINES]):
        raise RequestError(
            f"the section {MACHINES} takes --split, --shape and --only {MACHINES} together"
        )
    if args.quantize or args.agreement or args.degrade:
        raise RequestError(
            "--split measures random weights as they are: leave out --quantize, --agreement and "
            "--degrade"
        )


def measure_machines(
    args: argparse.Namespace, dtype: str, progress: Callable[[str, int, int], None]
) -> list[Figure] | None:
    """The section's figures; None on ranks other than 0, which take part in it."""
    config, timeout = shape_config(args.shape), args.rank_timeout or TIMEOUT
    with shared_out(config, DTYPES[dtype], args.split, args.siblings, timeout) as shared:
        if not shared:
            return None
        found, whole = shared
        return machines(
            found,
            whole,
            found.split.ranks,
            prompt_tokens=args.prompt_tokens,
            context=args.context,
            tokens=args.max_tokens,
            trials=args.trials,
            progress=progress,
        )

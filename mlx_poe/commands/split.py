"""--split: one command, started on several machines."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial

from cognica_mlx.errors import RequestError
from cognica_mlx.machines.link import TIMEOUT
from mlx_poe.commands.flags import LOADING, taken
from mlx_poe.loading.load import load
from mlx_poe.loading.specialists import Specialists
from mlx_poe.loading.split_loading import STAGES, on_machines
from mlx_poe.loading.tokenizer import Tokenizer


def add_split_flags(parser: argparse.ArgumentParser) -> None:
    """--split, --degrade, --rank-timeout."""
    group = parser.add_argument_group("several machines (see docs/machines.md)")
    group.add_argument(
        "--split",
        metavar="STAGES",
        help=f"{STAGES}: balance the stages, or give each specialist a machine; 0|1,2,3: stage 0 "
        "on rank 0, the others on rank 1. Start with mlx.launch --hosts a,b -- … or mpirun -n 2 …",
    )
    group.add_argument(
        "--degrade",
        action="store_true",
        help="if another rank is lost, go on with the stages that rank 0 holds",
    )
    group.add_argument(
        "--rank-timeout",
        type=float,
        metavar="SECONDS",
        help=f"a rank that takes longer for a pass counts as lost (default: {TIMEOUT:g})",
    )


def check_split(args: argparse.Namespace) -> None:
    """RequestError for flags that need --split if it is missing."""
    if args.split is None and (args.degrade or args.rank_timeout is not None):
        raise RequestError("--degrade and --rank-timeout need --split")
    if args.rank_timeout is not None and not args.rank_timeout > 0:
        raise RequestError(f"--rank-timeout {args.rank_timeout} is not above 0")


def with_models(
    args: argparse.Namespace,
    specialists: Sequence[tuple[str, str]],
    work: Callable[[Tokenizer, Specialists], int],
) -> int:
    """Do `work` with the model that `args` name and these specialists. With --split all machines
    hold them together, and rank 0 works: see `on_machines`. Returns the exit status."""
    options = taken(args, LOADING)
    if not args.split:
        model, tokenizer = load(args.model, **options)
        local = Specialists(model)
        for name, path in specialists:
            local.attach(name, path, quantize=args.quantize)
        return work(tokenizer, local)
    attached = [
        (name, partial(Specialists.attach, name=name, path_or_hf_repo=path, quantize=args.quantize))
        for name, path in specialists
    ]
    with on_machines(
        lambda part: load(args.model, part=part, **options),
        args.split,
        attached,
        timeout=args.rank_timeout or TIMEOUT,
        degrade=args.degrade,
    ) as found:
        if not found:
            return 0
        assert found.tokenizer is not None, "a model that was loaded has one"
        found.status = work(found.tokenizer, found.specialists)
        return found.status

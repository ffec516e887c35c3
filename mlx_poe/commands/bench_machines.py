"""mlx_poe.bench --split: the section that runs on several machines."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import mlx.core as mx
import numpy as np

from cognica_mlx.bench.sections.several_machines import Machines, part_of, specialist_over
from cognica_mlx.bench.sections.stage_speeds import Figure
from cognica_mlx.bench.shapes import random_model, shape_config
from cognica_mlx.bench.synthetic import Synthetic, synthetic_model
from cognica_mlx.config import PoEConfig
from cognica_mlx.errors import RequestError
from cognica_mlx.files.stored import DTYPES
from cognica_mlx.machines.link import TIMEOUT
from cognica_mlx.machines.placement import NOTHING
from cognica_mlx.network.model import PoEModel
from cognica_mlx.network.shared_base import share_base
from cognica_mlx.pricing.measuring import Progress
from mlx_poe.commands.bench_texts import margins
from mlx_poe.commands.split import add_split_flags, check_split
from mlx_poe.loading.specialists import Specialists
from mlx_poe.loading.split_loading import Choose, Loaded, on_machines

MACHINES = "machines"


def add_machine_flags(parser: argparse.ArgumentParser) -> None:
    """--split and the flags that go with it."""
    add_split_flags(parser)
    parser.add_argument(
        "--siblings",
        type=int,
        default=0,
        metavar="N",
        help="with --split: measure N specialists side by side instead of a prompt; with "
        "--agreement, speculation",
    )


def check_machines(args: argparse.Namespace) -> None:
    """RequestError for flags that make no sense together."""
    check_split(args)
    if args.siblings and not args.split:
        raise RequestError("--siblings needs --split")
    if args.siblings < 0:
        raise RequestError(f"--siblings {args.siblings} is below 0")
    if args.siblings and args.agreement is not None:
        raise RequestError("--siblings and --agreement measure different things: give one of them")
    wanted = MACHINES in (args.only or ())
    if not (args.split or wanted):
        return
    if not (args.split and args.shape and args.only == [MACHINES]):
        raise RequestError(
            f"the section {MACHINES} needs --split, --shape and --only {MACHINES} together"
        )
    if args.quantize or args.degrade:
        raise RequestError(
            "--split measures random weights as they are: leave out --quantize and --degrade"
        )


def measure_machines(
    args: argparse.Namespace, dtype: str, progress: Progress
) -> tuple[str, list[Figure]] | None:
    """A name for the model, and the section's figures; None on ranks other than 0."""
    config, kind = shape_config(args.shape), DTYPES[dtype]
    name, planted = f"{args.shape}, random weights", None
    if args.agreement is not None:
        # On every rank: planting a text takes the whole model.
        progress("planting a text", 0, 1)
        planted = synthetic_model(config, kind, args.agreement, margins())
        name = f"{name}, planted text: stage 0 agrees on {planted.agreement:.1%} of it"
    timeout = args.rank_timeout or TIMEOUT
    with _shared_out(config, kind, args.split, args.siblings, timeout, planted) as shared:
        if not shared:
            return None
        found, whole = shared
        ranks, run = found.split.ranks, (args.max_tokens, args.trials, progress)
        if planted:
            text = planted.text(args.context, 1000)
            machines = Machines(found.model, whole.base, ranks, text, *run)
            return name, machines.speculation(planted.agreement)
        count = args.context if args.siblings else args.prompt_tokens
        text = np.random.default_rng(0).integers(0, config.vocab_size, count).tolist()
        if not args.siblings:
            return name, Machines(found.model, whole.base, ranks, text, *run).prompts()
        many, one = (over.compose(over.names) for over in (found.specialists, whole))
        return name, Machines(many, one, ranks, text, *run).siblings()


@contextmanager
def _shared_out(
    config: PoEConfig,
    dtype: mx.Dtype,
    split: str,
    siblings: int,
    timeout: float,
    planted: Synthetic | None,
) -> Iterator[tuple[Loaded, Specialists] | None]:
    """A random model, or the one with a planted text, split over all ranks, with `siblings` random
    specialists; and the whole of it on rank 0. None on other ranks, when rank 0 has ended."""
    whole: list[Specialists] = []

    def base(choose: Choose) -> tuple[PoEModel, None]:
        part = choose(config, dtype)
        if planted:
            whole.append(Specialists(planted.model))
            return part_of(planted.model, part), None
        if not part.embedding:
            return random_model(config, dtype, part=part), None
        whole.append(Specialists(random_model(config, dtype)))
        return part_of(whole[0].base, part), None

    def attach(specialists: Specialists, seed: int) -> None:
        here = specialists.is_next_here()
        own, part = specialist_over(config)
        if not whole:
            special = random_model(own, dtype, seed, part if here else NOTHING)
        else:
            first = random_model(own, dtype, seed, part)
            special = part_of(first, part if here else NOTHING)
            whole[0].add(str(seed), _stand_on(whole[0].base, first))
        specialists.add(str(seed), _stand_on(specialists.base, special))

    added = [(str(seed), partial(attach, seed=seed)) for seed in range(1, siblings + 1)]
    with on_machines(base, split, added, timeout=timeout) as found:
        yield (found, whole[0]) if found else None


def _stand_on(base: PoEModel, model: PoEModel) -> PoEModel:
    share_base(model, base, [], mx.zeros((0, base.config.n_embd), base.resid_lambdas.dtype))
    return model

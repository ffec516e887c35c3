"""Load a model and its tokenizer from a folder, a hub id or a built-in name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import mlx.core as mx

from cognica_mlx.calibration_file import read_calibration
from cognica_mlx.config import HEAD_MODES, SUMMED, PoEConfig
from cognica_mlx.convert.checkpoint import eos_token_ids, read_checkpoint
from cognica_mlx.convert.draft_copy import offer_copy
from cognica_mlx.convert.quantization import fill, make_plan, scheme, within
from cognica_mlx.convert.sources import Source, locate
from cognica_mlx.errors import RequestError
from cognica_mlx.files.lineage import of_model
from cognica_mlx.files.stored import dtype_named
from cognica_mlx.machines.placement import Part
from cognica_mlx.network.device import lay_out, prepare
from cognica_mlx.network.model import PoEModel
from cognica_mlx.scheme import BITS
from mlx_poe.loading.tokenizer import Tokenizer

DEFAULT_MODEL = "poe-tiny"
BUILT_IN = Path(__file__).parents[1] / "models"


def load(
    path_or_hf_repo: str | Path | None = None,
    *,
    dtype: str | None = None,
    quantize: int | None = None,
    head_mode: str | None = None,
    revision: str | None = None,
    step: int | None = None,
    lazy: bool = False,
    part: Callable[[PoEConfig, mx.Dtype], Part] | None = None,
) -> tuple[PoEModel, Tokenizer]:
    """Load a base or specialist model and its tokenizer.

    `path_or_hf_repo` is a folder in the layout of Hugging Face or nanochat, a folder written by
    `mlx_poe.convert`, a hub id, or a built-in model ("poe-tiny", the default, and its
    specialists "poe-tiny-chat", "poe-tiny-math" and "poe-tiny-tool"). Weights are read straight
    from its files.

    `dtype` is "float32", "bfloat16" or "float16". The default is float32 on the CPU back end, where
    half precision is slow, and bfloat16 on a GPU. `quantize` is the number of bits (2, 3, 4, 5, 6
    or 8) to quantize the matrices to, in memory. `head_mode` picks a specialist's head: "dual",
    "base" or "specialist". `revision` is a hub branch, tag or commit, `step` a step of a nanochat
    folder; a specialist's base may follow after a colon, and "owner/name@revision" names both at
    once. With `lazy`, weights are read on first use, which must be in the thread that loaded
    them: MLX's streams belong to threads. `part(config, dtype)` gives the part to load here if
    other machines hold the rest.

    An unusable calibration file does not stop the model from loading: `model.calibration` is then
    None, `model.calibration_problem` says why, and only the modes that need it raise.

    Raises CheckpointError, ConfigError or TokenizerError for files that are missing, damaged or
    do not fit together, RequestError for invalid options.
    """
    kind = dtype_named(dtype)
    if quantize is not None and quantize not in BITS:
        raise RequestError(f"quantize {quantize}: choose from {', '.join(map(str, BITS))} bits")
    if head_mode is not None and head_mode not in HEAD_MODES:
        raise RequestError(f"head_mode {head_mode!r} is not one of {', '.join(HEAD_MODES)}")
    source = find_model(DEFAULT_MODEL if path_or_hf_repo is None else path_or_hf_repo, revision)
    checkpoint = read_checkpoint(source, step)
    config = checkpoint.config
    if head_mode is not None:
        if not config.specialist_layers:
            raise RequestError(f"head_mode {head_mode!r}: {source.name} is not a specialist")
        if config.head_mode == SUMMED and head_mode != "dual":
            raise RequestError(
                f"head_mode {head_mode!r}: {source.name} is merged, and its heads are summed; "
                "load the delta it was made from"
            )
        if config.head_mode != SUMMED:
            config = replace(config, head_mode=head_mode)
    tokenizer = Tokenizer.from_folder(checkpoint.tokenizer_folder, n_vocab=config.vocab_size)
    tokenizer.eos_token_ids |= eos_token_ids(source)
    plan = checkpoint.plan
    if quantize:
        if plan:
            raise RequestError(f"quantize {quantize}: {source.name} is already quantized")
        plan = make_plan(config, scheme(quantize))
    model = PoEModel(config)
    prepare(kind)
    weights = checkpoint.weights
    if part:
        own = part(config, kind)
        own.strip(model)
        weights = {name: tensor for name, tensor in weights.items() if own.holds(name)}
        plan = within(plan, weights)
    if lazy:
        for name in weights:
            checkpoint.read(name)  # reads it to check it, and keeps nothing
    arrays = ((n, t.read() if lazy else checkpoint.read(n)) for n, t in weights.items())
    fill(model, arrays, plan, kind, lazy=lazy)
    if not lazy:
        lay_out(model)
    offer_copy(model, source.folder)
    model.revision = checkpoint.revision
    model.calibration, model.calibration_problem = read_calibration(
        source.folder, config, partial(of_model, model)
    )
    return model, tokenizer


def find_model(name: str | Path, revision: str | None = None) -> Source:
    """Find a model by folder, built-in name or hub id. CheckpointError if there is none."""
    built_in = {folder.name: folder for folder in BUILT_IN.iterdir()}.get(str(name))
    if built_in and not Path(name).is_dir():
        return replace(locate(built_in, revision), name=str(name))
    return locate(name, revision)

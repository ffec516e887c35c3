"""Loading: from a folder, a hub id or a built-in name to a model and its tokenizer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from cognica_mlx.calibration import CALIBRATION_FILE, Calibration
from cognica_mlx.config import HEAD_MODES
from cognica_mlx.convert.checkpoint import read_checkpoint
from cognica_mlx.convert.safetensors_files import read_json
from cognica_mlx.convert.sources import Source, locate
from cognica_mlx.errors import CheckpointError, RequestError
from cognica_mlx.model import PoEModel
from mlx_poe.tokenizer import Tokenizer

DEFAULT_MODEL = "poe-tiny"
_BUILT_IN = Path(__file__).parent / "models"
DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}
QUANTIZE_BITS = (2, 3, 4, 5, 6, 8)
_GROUP_SIZE = 64


def load(
    path_or_hf_repo: str | Path | None = None,
    *,
    dtype: str | None = None,
    quantize: int | None = None,
    head_mode: str | None = None,
    revision: str | None = None,
    lazy: bool = False,
) -> tuple[PoEModel, Tokenizer]:
    """Load a base or specialist model and its tokenizer.

    `path_or_hf_repo` is a folder in the Hugging Face layout or nanochat's, a hub id, or a built-in
    model ("poe-tiny", the default, or "poe-tiny-chat"). Weights are read straight from its files.

    `dtype` is "float32", "bfloat16" or "float16"; by default float32 on the CPU back end, whose
    half precision is slow, and bfloat16 on a GPU. `quantize` is a number of bits (2, 3, 4, 5, 6 or
    8) to which the matrices are rounded in memory. `head_mode` picks a specialist's head: "dual",
    "base" or "specialist". `revision` is a hub branch, tag or commit. With `lazy` no weight is
    read before it is first used.

    Raises CheckpointError, ConfigError or TokenizerError for files that are missing, damaged or
    do not fit together, RequestError for options that do not exist.
    """
    if dtype is not None and dtype not in DTYPES:
        raise RequestError(f"dtype {dtype!r} is none of {', '.join(DTYPES)}")
    if quantize is not None and quantize not in QUANTIZE_BITS:
        raise RequestError(f"quantize {quantize}: can be {', '.join(map(str, QUANTIZE_BITS))} bits")
    if head_mode is not None and head_mode not in HEAD_MODES:
        raise RequestError(f"head_mode {head_mode!r} is none of {', '.join(HEAD_MODES)}")
    source = find_model(DEFAULT_MODEL if path_or_hf_repo is None else path_or_hf_repo, revision)
    checkpoint = read_checkpoint(source)
    config = checkpoint.config
    if head_mode is not None:
        if not config.specialist_layers:
            raise RequestError(f"head_mode {head_mode!r}: {source.name} is not a specialist")
        config = replace(config, head_mode=head_mode)
    tokenizer = Tokenizer.from_folder(checkpoint.tokenizer_folder, n_vocab=config.vocab_size)
    tokenizer.eos_token_ids |= _eos_token_ids(source)
    model = PoEModel(config)
    kind = DTYPES[dtype or ("float32" if mx.default_device() == mx.cpu else "bfloat16")]
    weights = [(name, array.astype(kind)) for name, array in checkpoint.weights.items()]
    model.update(tree_unflatten(weights))
    if quantize:
        nn.quantize(model, _GROUP_SIZE, quantize, class_predicate=_is_matrix)
    model.eval()
    if not lazy:
        mx.eval(model.parameters())
    if (source.folder / CALIBRATION_FILE).is_file():
        model.calibration = Calibration.load(source.folder / CALIBRATION_FILE, config)
    return model, tokenizer


def find_model(name: str | Path, revision: str | None = None) -> Source:
    """A folder, a built-in name or a hub id; CheckpointError where there is none."""
    built_in = {folder.name: folder for folder in _BUILT_IN.iterdir()}.get(str(name))
    if built_in and not Path(name).is_dir():
        return replace(locate(built_in, revision), name=str(name))
    return locate(name, revision)


def _is_matrix(path: str, module: nn.Module) -> bool:
    """Whether a layer is worth quantising: the gates are too narrow and too sensitive."""
    return hasattr(module, "to_quantized") and module.weight.shape[-1] % _GROUP_SIZE == 0


def _eos_token_ids(source: Source) -> frozenset[int]:
    """The ids that the model's own generation defaults stop at."""
    path = source.folder / "generation_config.json"
    ids = read_json(path).get("eos_token_id") if path.is_file() else None
    if ids is None:
        return frozenset()
    ids = ids if isinstance(ids, list) else [ids]
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
        raise CheckpointError(f"{path}: eos_token_id {ids} are not token ids")
    return frozenset(ids)

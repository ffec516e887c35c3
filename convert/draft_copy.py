"""A quantized copy of the drafting stages, stored beside a model so that loading need not make it.

- in: a model's configuration and tensors; or a folder that contains a copy
- out: `draft.safetensors`; or the copy, attached to the model's own matrices
- it records the sketch of its model, and is refused beside another
- the copy has stage 0, a merged specialist's own stage, and the heads that they draft through
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from cognica_mlx.config import PoEConfig
from cognica_mlx.convert.quantization import Plan
from cognica_mlx.decoding.quantized_prefix import quantize_prefix
from cognica_mlx.errors import CheckpointError, one_line
from cognica_mlx.files import lineage
from cognica_mlx.files.git_lfs import pointer_problem
from cognica_mlx.files.safetensors_files import write_arrays
from cognica_mlx.files.stored import StoredTensor
from cognica_mlx.network.model import PoEModel
from cognica_mlx.network.quantized_copies import copies_of, is_finite, quantized
from cognica_mlx.scheme import SUFFIXES, Scheme, draft_scheme

DRAFT_FILE = "draft.safetensors"
_BITS, _OF = "draft_bits", "of"


def copied_matrices(config: PoEConfig, bits: str, plan: Plan) -> dict[str, Any]:
    """The matrices of a model's quantized copy by path, unevaluated; none that `plan` quantizes, as
    the model drafts from its own. RequestError if quantizing would change nothing."""
    found = _matrices(PoEModel(config), draft_scheme(bits))
    return {path: matrix for path, matrix in found.items() if path not in plan}


def write_copy(
    folder: Path,
    matrices: Mapping[str, Any],
    weights: Mapping[str, StoredTensor],
    bits: str,
    dtype: mx.Dtype | None,
    of: lineage.Sketch,
) -> None:
    """Write the quantized `matrices` of a model with these tensors and this sketch to `folder`.

    Raises OSError if the file cannot be written.
    """
    arrays: dict[str, mx.array] = {}
    for path, module in matrices.items():
        matrix = weights[f"{path}.weight"].read()
        matrix = matrix[: module.weight.shape[0]]
        way = Scheme(module.bits, module.group_size, module.mode)
        for suffix, part in way.quantize(matrix if dtype is None else matrix.astype(dtype)).items():
            arrays[f"{path}.{suffix}"] = part
        mx.eval(arrays)
    file, metadata = folder / DRAFT_FILE, {_BITS: bits, _OF: json.dumps(lineage.record(of))}
    write_arrays(file, arrays, metadata)


def offer_copy(model: PoEModel, folder: Path) -> None:
    """Make `model` load the copy in a folder, if there is one, when it first drafts.

    Raises CheckpointError, now or then, for a file that is not a copy.
    """
    path = folder / DRAFT_FILE
    if path.is_file():
        model.stored_copies[_load(path)[1]] = partial(_take_up, model, path)


def _take_up(model: PoEModel, path: Path) -> None:
    arrays, scheme, of = _load(path)
    if of and (odd := lineage.difference(of, lineage.of_model(model))):
        raise CheckpointError(
            f"{path} belongs to another model: its {odd} differs; delete it, or convert again"
        )
    dtype = model.resid_lambdas.dtype
    modules = dict(model.named_modules())
    for place, packed in _matrices(PoEModel(model.config), scheme).items():
        own = modules[place]
        if not isinstance(own, nn.Linear):
            continue  # the model itself was loaded quantized
        for suffix in SUFFIXES:
            if suffix not in packed:
                continue
            part = arrays.get(f"{place}.{suffix}")
            if part is None or part.shape != packed[suffix].shape:
                raise CheckpointError(
                    f"{path} does not fit its model at {place}: delete it, or convert again"
                )
            if not is_finite(suffix, part, packed.mode):
                raise CheckpointError(
                    f"{path}: {place}.{suffix} holds NaN or infinity: delete it, or convert again"
                )
            kept = mx.issubdtype(part.dtype, mx.integer)
            packed[suffix] = part if kept else part.astype(dtype)
        mx.eval(packed.parameters())
        copies_of(own)[scheme] = packed


def _matrices(model: PoEModel, scheme: Scheme) -> dict[str, Any]:
    """The quantized matrices of a copy by their paths, unevaluated."""
    prefix = quantize_prefix(model, scheme, 0, "summed")
    drafting = [*(b for k in prefix.of for b in model.stages[k].blocks), *prefix.originals]
    inside = {id(module) for part in drafting for _, module in part.named_modules()}
    found = {p: quantized(m, scheme) for p, m in model.named_modules() if id(m) in inside}
    return {path: copy for path, copy in found.items() if isinstance(copy, nn.QuantizedLinear)}


def _load(path: Path) -> tuple[dict[str, mx.array], Scheme, lineage.Sketch]:
    """A copy's arrays, its scheme, and the sketch of its model, which is empty in an older one."""
    try:
        loaded: Any = mx.load(str(path), format="safetensors", return_metadata=True)
        arrays, metadata = loaded
        of = lineage.recorded({_OF: json.loads(metadata.get(_OF, "{}"))}, _OF)
        return arrays, draft_scheme(metadata[_BITS]), of
    except CheckpointError:
        raise CheckpointError(f"{path} is damaged: delete it, or convert again") from None
    except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
        problem = f"is not a quantized copy ({one_line(error)}): delete it, or convert again"
        raise CheckpointError(f"{path} {pointer_problem(path) or problem}") from None

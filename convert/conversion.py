"""Converts checkpoints to MLX folders, tensor by tensor.

- in: a checkpoint, base or delta, and how to quantize it
- out: a folder that `load` and mlx-lm read: a whole model, or a delta that refers to its base
- `prepare` plans everything from names and shapes; `Conversion.write` reads, packs and writes one
  tensor after another, so that memory holds only a few
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx
from huggingface_hub import HfApi
from mlx.utils import tree_flatten
from tiktoken import Encoding

from cognica_mlx.calibration_file import CALIBRATION_FILE, CalibrationWarning, read_calibration
from cognica_mlx.config import SUMMED, PoEConfig
from cognica_mlx.convert.base import read_converted_base, with_summed_heads
from cognica_mlx.convert.chat_layout import BOS, REPLY_END
from cognica_mlx.convert.checkpoint import Checkpoint, eos_token_ids, read_checkpoint
from cognica_mlx.convert.draft_copy import copied_matrices, write_copy
from cognica_mlx.convert.formats.tokenizer_files import read_encoding
from cognica_mlx.convert.formats.tokenizer_json import write_tokenizer
from cognica_mlx.convert.formats.whole_folder import check_target, new_folder, remove_leftovers
from cognica_mlx.convert.model_card import model_card
from cognica_mlx.convert.quantization import (
    Plan,
    Rule,
    check_range,
    make_plan,
    mixed,
    pack,
    to_fields,
    within,
)
from cognica_mlx.convert.sources import Source, hub_reason
from cognica_mlx.errors import CheckpointError, RequestError, TokenizerError
from cognica_mlx.files import lineage, strict_json
from cognica_mlx.files.safetensors_files import (
    Spec,
    TensorWriter,
    lay_out,
    nbytes,
    read_json,
    write_index,
)
from cognica_mlx.files.stored import DTYPES, StoredTensor, dtype_name, dtype_named
from cognica_mlx.network.model import PoEModel
from cognica_mlx.scheme import Scheme

# The file that mlx-lm imports for the model's architecture, given `--trust-remote-code`.
SHIM_FILE = "cognica_poe.py"
SHIM = """\
# For mlx-lm with --trust-remote-code; the package cognica-mlx must be installed.
from cognica_mlx.mlx_lm_model import Model, ModelArgs
"""

_HEADS = ("wte", "lm_head", "value_embed")
SMALL_FILES_BYTES = 32 * 2**20  # more than the tokenizer, card and other small files take


@dataclass(frozen=True)
class Conversion:
    """A planned folder, not written yet.

    `weights` and `plan` use the model's parameter names, `layout` the names in the files. `base` is
    the converted base that a delta folder refers to; without it the folder is a whole model.
    """

    checkpoint: Checkpoint
    config: PoEConfig
    weights: dict[str, StoredTensor]
    plan: Plan
    dtype: mx.Dtype | None
    base: Checkpoint | None
    draft_bits: str | None = None

    @property
    def stem(self) -> str:
        """The stem of the weight files' names."""
        return "delta" if self.base else "model"

    @cached_property
    def layout(self) -> dict[str, list[Spec]]:
        """The weight files, and the tensors of each."""
        specs = []
        for name, tensor in self.weights.items():
            shapes = self._packed(name, mx.zeros(tensor.shape, tensor.dtype))
            specs += [(key, array.shape, array.dtype) for key, array in shapes.items()]
        return lay_out(specs, self.stem)

    @property
    def source_bytes(self) -> int:
        """Bytes of weights to read."""
        return sum(tensor.nbytes for tensor in self.weights.values())

    @property
    def nbytes(self) -> int:
        """Bytes of weights to write."""
        return sum(nbytes(spec) for specs in self.layout.values() for spec in specs)

    @cached_property
    def n_parameters(self) -> int:
        """Number of parameters to write, before packing."""
        parameters = dict(tree_flatten(PoEModel(self.config).parameters()))
        return sum(parameters[name].size for name in self.weights if name in parameters)

    def write(
        self,
        target: Path,
        overwrite: bool = False,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        """Write the folder `target`, whole or not at all.

        `progress` is called with the bytes written and those to write. Raises RequestError if
        `target` must not be written, CheckpointError or OSError if it cannot be.
        """
        remove_leftovers(target)
        made_from = [*self.checkpoint.chain, *([self.base] if self.base else [])]
        check_target(target, overwrite, [link.source.folder for link in made_from])
        encoding = read_encoding(self.checkpoint.tokenizer_folder)
        if encoding.n_vocab > self.config.vocab_size:
            raise CheckpointError(
                f"{self.checkpoint.source.name}: its tokenizer has ids up to "
                f"{encoding.n_vocab - 1}, its vocab_size is {self.config.vocab_size}"
            )
        of = self.checkpoint
        calibration, problem = read_calibration(of.source.folder, self.config, of.sketch)
        if problem:
            warnings.warn(f"calibration not copied: {problem}", CalibrationWarning, stacklevel=2)
        with new_folder(target, self.nbytes + SMALL_FILES_BYTES, overwrite) as folder:
            self._write_small_files(folder, target, encoding, calibration is not None)
            self._write_weights(folder, progress)
            if self.draft_bits:
                matrices = copied_matrices(self.config, self.draft_bits, self.plan)
                sketch = self.checkpoint.sketch()
                write_copy(folder, matrices, self.weights, self.draft_bits, self.dtype, sketch)

    def _packed(self, name: str, array: mx.array) -> dict[str, mx.array]:
        """A parameter's tensors by their names in the files, packed by the plan."""
        if any(part in name for part in _HEADS) and array.ndim == 2:
            rows = self.config.padded_vocab_size
            if array.shape[0] < rows:  # the padding is never read
                array = mx.pad(array, [(0, rows - array.shape[0]), (0, 0)])
            array = array[:rows]
        packed = pack(name, array, self.plan, self.dtype)
        return {self._stored_name(key): value for key, value in packed.items()}

    def _stored_name(self, name: str) -> str:
        if self.base is None:
            return name
        head = f"lm_head_specialists.{len(self.config.specialist_layers) - 1}"
        return name.replace(head, "lm_head_stage")

    def _write_weights(self, folder: Path, progress: Callable[[int, int], None]) -> None:
        tensors, done, total = self._tensors(), 0, self.nbytes
        for file, specs in self.layout.items():
            writer = TensorWriter(folder / file, specs)
            for spec in specs:
                name, array = next(tensors)
                writer.write(name, array)
                del array  # before the next is read
                done += nbytes(spec)
                progress(done, total)
            writer.close()
        write_index(folder, self.stem, self.layout)

    def _tensors(self) -> Iterator[tuple[str, mx.array]]:
        for name, tensor in self.weights.items():
            array = tensor.read()
            self.checkpoint.check(name, array)
            packed = self._packed(name, array)
            check_range(array, packed)
            del array
            while packed:
                first = next(iter(packed))
                yield first, packed.pop(first)
            mx.clear_cache()

    def _write_small_files(
        self, folder: Path, target: Path, encoding: Encoding, calibrated: bool
    ) -> None:
        checkpoint = self.checkpoint
        try:
            write_tokenizer(folder, encoding, chat=bool(self.config.specialist_layers))
        except TokenizerError as error:
            where = checkpoint.tokenizer_folder
            raise TokenizerError(f"the tokenizer in {where} {error}") from None
        generation = checkpoint.source.folder / "generation_config.json"
        defaults = read_json(generation) if generation.is_file() else {}
        stops = sorted(eos_token_ids(checkpoint.source))
        write_config(folder, self._config_fields(target), encoding, defaults, stops)
        if self.base is None:
            (folder / SHIM_FILE).write_text(SHIM, encoding="utf-8")
        source = checkpoint.source.folder
        for name in ("LICENSE", *([CALIBRATION_FILE] if calibrated else [])):
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
        base = self.base.source if self.base else None
        card = model_card(checkpoint, target.resolve().name, self.settings(), base, calibrated)
        (folder / "README.md").write_text(card, encoding="utf-8", errors="replace")

    def settings(self) -> dict[str, str]:
        """The settings as text, for the summary and the model card."""
        schemes = list(self.plan.values())
        counts = {s: schemes.count(s) for s in dict.fromkeys(schemes)}
        quantized = [
            f"{s.bits} bits, groups of {s.group_size}, {s.mode}"
            f" ({count} {'matrix' if count == 1 else 'matrices'})"
            for s, count in sorted(counts.items(), key=lambda item: -item[1])
        ]
        return {
            "result": f"delta on {self.base.source.name}" if self.base else "whole model",
            "dtype": dtype_name(self.dtype) if self.dtype else "as stored",
            "quantized": "; ".join(quantized) or "no",
            # including scales and unpacked tensors
            "bits per weight": f"{8 * self.nbytes / self.n_parameters:.3f}",
            **({"quantized copy": self.draft_bits} if self.draft_bits else {}),
        }

    def _config_fields(self, target: Path) -> dict[str, Any]:
        if self.base:
            fields = delta_fields(self.config, reference_to(self.base.source, target), self.base)
        else:
            shape = self.config.to_dict()
            fields = {"model_type": "cognica_poe", **shape, "model_file": SHIM_FILE}
        floats = [tensor.dtype for name, tensor in self.weights.items() if name.startswith("h.0.")]
        kind = self.dtype or next((d for d in floats if d in DTYPES.values()), mx.bfloat16)
        fields["torch_dtype"] = dtype_name(kind)
        if self.plan:
            entry = {self._stored_name(k): v for k, v in to_fields(self.plan).items()}
            fields["quantization"] = fields["quantization_config"] = entry
        return fields


def prepare(
    source: Source,
    *,
    step: int | None = None,
    dtype: str | None = None,
    quantization: Scheme | None = None,
    recipe: str | None = None,
    rules: Sequence[Rule] = (),
    base: Source | None = None,
    draft_bits: str | None = None,
) -> Conversion:
    """Plan the conversion of a checkpoint; reads configurations and headers only.

    A specialist is merged with its base into one model, whose final head is the sum of all heads,
    computed in float32. With `base`, the converted folder of its base, only the specialist's own
    tensors are written, as a delta that refers to `base`. `dtype` is "float32", "bfloat16" or
    "float16"; by default each tensor keeps its type, and a summed head is float32. `quantization`
    is that of the matrices, except as a `recipe` of RECIPES and then `rules` say (see `make_plan`).
    `step` is a nanochat step. With `draft_bits` a quantized copy to draft with is stored as well.

    Raises CheckpointError or ConfigError for a checkpoint that is incomplete or does not fit
    `base`, RequestError for options that make no sense.
    """
    to = None if dtype is None else dtype_named(dtype)
    checkpoint = read_checkpoint(source, step)
    if quantization and checkpoint.plan:
        raise RequestError(
            f"{source.name} is already quantized: convert what it was made from instead"
        )
    config, weights = checkpoint.config, checkpoint.weights
    if draft_bits and base is not None:
        raise RequestError(
            "draft-bits: a delta has no stage of the base: store the copy with what it was made "
            "from"
        )
    converted = None
    if base is not None:
        converted = read_converted_base(checkpoint, base)
        weights = checkpoint.own_weights
    elif config.specialist_layers and config.head_mode == "dual":
        if any(path.startswith("lm_head") for path in checkpoint.plan):
            raise RequestError(
                f"{source.name} has quantized heads, which cannot be summed: "
                "merge what it was made from instead"
            )
        weights = with_summed_heads(checkpoint)
        config = replace(config, head_mode=SUMMED)
    plan = checkpoint.plan
    if quantization:
        if recipe:
            quantization, of_recipe = mixed(config, recipe, quantization)
            rules = [*of_recipe, *rules]
        plan = make_plan(config, quantization, rules)
    plan = within(plan, weights)
    if draft_bits and not copied_matrices(config, draft_bits, plan):
        raise RequestError(
            "draft-bits: the matrices that draft are quantized themselves, so the copy would not "
            "be used: leave out --draft-bits"
        )
    weights = {name: weights[name] for name in sorted(weights, key=_place)}
    return Conversion(checkpoint, config, weights, plan, to, converted, draft_bits)


def write_config(
    folder: Path,
    fields: Mapping[str, Any],
    encoding: Encoding,
    defaults: Mapping[str, Any] | None = None,
    stops: Sequence[int] = (),
) -> None:
    """Write config.json with `fields` and generation_config.json with `defaults`, both with the
    tokens that begin and end texts, among them `stops`."""
    special = encoding._special_tokens
    ends = [special[name] for name in (REPLY_END, BOS) if name in special]
    tokens = {
        "bos_token_id": special.get(BOS),
        "eos_token_id": list(dict.fromkeys([*ends, *stops])),
    }
    strict_json.write(folder / "generation_config.json", {**(defaults or {}), **tokens})
    strict_json.write(folder / "config.json", {**fields, **tokens})


def reference_to(base: Source, target: Path) -> str:
    """How a delta in folder `target` names its base: by hub id, or by the path to its folder."""
    if base.from_hub:
        return base.name
    return os.path.relpath(base.folder.resolve(), target.resolve())


def delta_fields(config: PoEConfig, reference: str, base: Checkpoint) -> dict[str, Any]:
    """The configuration of a delta with one stage of its own, on `base`, named by `reference`; it
    pins the base's commit if that is on the hub.

    It describes the delta's own layers; its base describes the rest.
    """
    fields = {"model_type": "cognica_poe", **config.to_dict()}
    new_layers = fields.pop("specialist_layers")[-1]
    for name in ("stage_layers", "value_embed_layers", "per_stage_head", "poe_alpha"):
        del fields[name]
    fields["base_model_name_or_path"] = reference
    if base.revision:
        fields["base_model_revision"] = base.revision
    fields["new_layers"] = new_layers
    fields["frozen_layers"] = config.n_layer - new_layers
    fields[lineage.FIELD] = lineage.record(base.sketch())
    return fields


def upload(folder: Path, repo_id: str) -> str:
    """Upload a converted folder to the Hugging Face hub with the user's own token; returns its URL.

    Raises CheckpointError if the upload fails; the folder is unchanged.
    """
    try:
        api = HfApi()
        api.create_repo(repo_id, exist_ok=True)
        return str(api.upload_folder(repo_id=repo_id, folder_path=folder).commit_url)
    except Exception as error:
        raise CheckpointError(
            f"{folder} is written, but the upload to {repo_id} failed ({hub_reason(error)})"
        ) from None


def _place(name: str) -> list[tuple[int, str]]:
    """A sort key that compares numbers in names as numbers: layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]

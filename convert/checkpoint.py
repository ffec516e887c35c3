"""Reads a checkpoint folder, base or specialist delta, as configuration and weights.

- in: a `Source`: Hugging Face style (config.json and safetensors), nanochat's (meta_*.json and
  model_*.pt), or a converted folder, under any of the known name prefixes
- out: `PoEConfig` and unread tensors under the model's own parameter names, shapes checked
- deltas are followed to their root base and stacked; the topmost delta's wte and lambdas win
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from cognica_mlx.backend.streams import end_with_thread
from cognica_mlx.config import SUMMED, PoEConfig, flatten
from cognica_mlx.convert.formats.tokenizer_files import has_tokenizer
from cognica_mlx.convert.formats.torch_files import read_torch_file
from cognica_mlx.convert.quantization import Plan, apply_plan, from_fields
from cognica_mlx.convert.sources import Source, locate_base
from cognica_mlx.errors import CheckpointError, ConfigError, PoEWarning
from cognica_mlx.files import lineage
from cognica_mlx.files.safetensors_files import read_json, read_tensors
from cognica_mlx.files.stored import DTYPES, StoredTensor
from cognica_mlx.network.model import PoEModel
from cognica_mlx.network.quantized_copies import is_finite

# What reads the tensors of a folder's "model" or "delta".
_Tensors = Callable[[str], dict[str, StoredTensor]]

_META = re.compile(r"meta_(\d{1,9})\.json")
_LAYER = re.compile(r"h\.(\d{1,6})\.")
_VALUE_EMBED = re.compile(r"h\.(\d{1,6})\.attn\.(value_embed|ve_gate)\.weight")
# Sizes that cannot exceed the largest tensor dimension, under all their names.
_SIZES: tuple[str, ...] = (
    *("n_layer", "num_hidden_layers", "new_layers", "frozen_layers"),
    *("n_head", "num_attention_heads", "n_kv_head", "num_key_value_heads", "head_dim"),
    *("n_embd", "hidden_size", "intermediate_size", "vocab_size"),
)
_PREFIXES = ("_orig_mod.", "gpt.", "model.")
# Position tables that some exports include; they are computed here instead.
_BUFFERS = re.compile(r"(.*\.)?(cos|sin|inv_freq)")
# Tensors with padded rows, to a multiple of 64 or otherwise; logits are cropped to vocab_size.
_VOCAB_ROWS = re.compile(r"wte\.|lm_head|.*\.value_embed\.")


@dataclass(frozen=True)
class Checkpoint:
    """A stored model: its configuration and its weights by parameter name, not read yet.

    `plan` says which weights are packed and how. `base` is the checkpoint under a delta; its
    weights are included unless the delta has its own.
    """

    source: Source
    config: PoEConfig
    weights: dict[str, StoredTensor]
    plan: Plan
    tokenizer_folder: Path
    base: Checkpoint | None = None

    @property
    def revision(self) -> str | None:
        """The commits from the hub of this checkpoint and its bases, as `locate` takes them."""
        of_base = self.base.revision if self.base else None
        own = self.source.revision or ""
        return (f"{own}:{of_base}" if of_base else own) or None

    @property
    def chain(self) -> list[Checkpoint]:
        """This checkpoint and those under it, down to the root base."""
        return [self, *(self.base.chain if self.base else [])]

    @property
    def own_weights(self) -> dict[str, StoredTensor]:
        """A delta's own weights, or all weights of a base."""
        inherited = self.base.weights if self.base else {}
        return {k: v for k, v in self.weights.items() if inherited.get(k) is not v}

    def read(self, name: str) -> mx.array:
        """A weight as it is stored. CheckpointError if it holds NaN or infinity."""
        array = self.weights[name].read()
        self.check(name, array)
        return array

    def check(self, name: str, array: mx.array) -> None:
        """Raise CheckpointError if the values read for a weight hold NaN or infinity."""
        how = self.plan.get(name.rpartition(".")[0])
        if is_finite(name, array, how.mode if how else "affine"):
            return
        link = self
        while link.base and link.base.weights.get(name) is link.weights[name]:
            link = link.base
        raise CheckpointError(
            f"{link.source.name}: {name} holds NaN or infinity: its file is damaged, or its "
            "training diverged; get another copy"
        )

    def unpacked(self, name: str, dtype: mx.Dtype) -> mx.array:
        """A weight in `dtype`, dequantized if it is packed."""

        def read(name: str) -> mx.array:
            array = self.read(name)
            return array.astype(dtype) if mx.issubdtype(array.dtype, mx.floating) else array

        path = name.removesuffix(".weight")
        if path not in self.plan:
            return read(name)
        biases = read(f"{path}.biases") if f"{path}.biases" in self.weights else None
        how = asdict(self.plan[path])
        return mx.dequantize(read(name), read(f"{path}.scales"), biases, **how).astype(dtype)

    def sketch(self) -> lineage.Sketch:
        """What tells it from other models of its shape; reads a few weights."""
        return lineage.sketch(self.config, lambda name: self.unpacked(name, mx.float32))


def read_checkpoint(source: Source, step: int | None = None) -> Checkpoint:
    """Read a base, or a delta with everything under it.

    `step` selects a step of a nanochat folder, by default the latest.

    Raises CheckpointError for files or tensors that are missing, damaged, unknown or of the wrong
    shape, and for a chain of bases that is broken or circular, naming the chain so far; ConfigError
    for an inconsistent configuration.
    """
    end_with_thread()
    return _read(source, step, ())


def _read(source: Source, step: int | None, chain: tuple[Source, ...]) -> Checkpoint:
    if source.folder.resolve() in [link.folder.resolve() for link in chain]:
        raise CheckpointError(f"the chain of bases is circular: {_walk(*chain, source)}")
    chain = (*chain, source)
    fields, tensors = _opened(source, step)
    reference = fields.get("base_model_name_or_path") or fields.get("base_model_dir")
    revision = source.base_revision or fields.get("base_model_revision")
    try:
        if not reference:
            if source.base_revision:
                raise CheckpointError(
                    f"{source.name} is a base: it has none of revision {source.base_revision}"
                )
            return _read_base(source, fields, tensors)
        if not isinstance(revision, str | None):
            raise ConfigError(f"base_model_revision: {revision!r} is not text")
        try:
            base_source = locate_base(str(reference), source, revision)
        except CheckpointError as error:
            raise CheckpointError(f"{error} (chain so far: {_walk(*chain)})") from None
        base = _read(base_source, None, chain)
        if source.pinned and base_source.from_hub and not revision:
            warnings.warn(
                f"{source.name} names no revision of its base {base_source.name}, which is now at "
                f"{base.revision}; to keep it, add :{base.revision} to the revision",
                PoEWarning,
                stacklevel=2,
            )
        return _stack(source, fields, tensors, base)
    except ConfigError as error:
        raise ConfigError(f"{source.name}: {error}") from None


def _walk(*chain: Source) -> str:
    return " -> ".join(link.name for link in chain)


def _opened(source: Source, step: int | None) -> tuple[dict[str, Any], _Tensors]:
    """A folder's configuration and tensors, in nanochat's those of `step`."""
    path = source.folder / "config.json"
    if path.is_file():
        if step is not None:
            raise CheckpointError(f"{source.name} is not a nanochat folder: it has no step {step}")
        return read_json(path), partial(read_tensors, source.folder)
    meta = _meta(source, step)
    if meta is None:
        # nanochat keeps one folder for each model under base_checkpoints.
        tags = sorted({f.parent.name for f in source.folder.glob("*/meta_*.json")})
        instead = f"; it holds {', '.join(tags[:9])}: name one of them" if tags else ""
        raise CheckpointError(
            f"{source.name} holds no config.json{instead or ': is it a model folder?'}"
        )
    weights = meta.with_name(meta.name.replace("meta_", "model_")).with_suffix(".pt")
    return dict(flatten(read_json(meta))), lambda _: read_torch_file(weights)


def _meta(source: Source, step: int | None) -> Path | None:
    """nanochat's meta file of `step` or of the latest step; None in other folders."""
    steps = {int(m[1]): p for p in source.folder.iterdir() if (m := _META.fullmatch(p.name))}
    if step is not None and step not in steps:
        there = ", ".join(map(str, sorted(steps))) or "none"
        raise CheckpointError(f"{source.name} has no step {step}; it has: {there}")
    return steps[max(steps) if step is None else step] if steps else None


def _tokenizer_folder(source: Source) -> Path | None:
    """The folder of a checkpoint's tokenizer: its own, or the one that nanochat shares."""
    own, shared = source.folder, source.folder.resolve().parent.parent / "tokenizer"
    if has_tokenizer(own):
        return own
    nanochat = not source.from_hub and _meta(source, None) is not None
    return shared if nanochat and has_tokenizer(shared) else None


def _read_base(source: Source, fields: Mapping[str, Any], tensors: _Tensors) -> Checkpoint:
    weights = _named(tensors("model"), source)
    plan = from_fields(fields, weights, source.name)
    config = PoEConfig.from_dict(_complete(fields, weights))
    # Early nanochat checkpoints lack these, which means no scaling.
    weights.setdefault("resid_lambdas", _constant(mx.ones, config.n_layer))
    weights.setdefault("x0_lambdas", _constant(mx.zeros, config.n_layer))
    check_weights(config, weights, plan, source.name)
    return Checkpoint(source, config, weights, plan, _tokenizer_folder(source) or source.folder)


def _constant(make: Callable[[tuple[int, ...]], mx.array], length: int) -> StoredTensor:
    return StoredTensor((length,), mx.float32, partial(make, (length,)))


def _stack(
    source: Source, fields: Mapping[str, Any], tensors: _Tensors, base: Checkpoint
) -> Checkpoint:
    if base.config.head_mode == SUMMED:
        raise CheckpointError(
            f"{source.name} builds on {base.source.name}, a merged specialist, and another head "
            "cannot be added to its sum: name the delta that it was made from"
        )
    delta = _named(tensors("delta"), source)
    head = f"lm_head_specialists.{len(base.config.specialist_layers)}"
    delta = {re.sub("^lm_head_stage\\b", head, name): tensor for name, tensor in delta.items()}
    plan = from_fields(_renamed_head(fields, head), delta, source.name)
    completed = {"frozen_layers": base.config.n_layer, **_with_depth(fields, delta)}
    config = PoEConfig.from_dict(completed, base=base.config)
    _check_lineage(source, fields, base)
    expected = {f"{head}.weight", "wte.weight", "resid_lambdas", "x0_lambdas"}
    modules = {name.rpartition(".")[0] for name in delta}
    for name in delta:
        layer = _LAYER.match(name)
        known = name in expected or name.rpartition(".")[0] in plan
        if not known and not (layer and int(layer[1]) >= base.config.n_layer):
            raise CheckpointError(f"{source.name}: a delta may not hold {name}")
    for name in sorted(expected - delta.keys()):
        raise CheckpointError(
            f"{source.name}: the delta lacks {name.replace(head, 'lm_head_stage')}"
        )
    # A module is replaced as a whole: the base's scales do not apply to the delta's weight.
    kept = {k: v for k, v in base.weights.items() if k.rpartition(".")[0] not in modules - {""}}
    weights = {**kept, **delta}
    plan = {**{path: s for path, s in base.plan.items() if path not in modules}, **plan}
    check_weights(config, weights, plan, source.name)
    folder = _tokenizer_folder(source) or base.tokenizer_folder
    return Checkpoint(source, config, weights, plan, folder, base)


def _check_lineage(source: Source, fields: Mapping[str, Any], base: Checkpoint) -> None:
    """Raise CheckpointError if the delta was trained on another model than `base`."""
    try:
        trained_on = lineage.recorded(fields)
    except CheckpointError as error:
        raise CheckpointError(f"{source.name}: {error}") from None
    if trained_on and (odd := lineage.difference(trained_on, base.sketch())):
        raise CheckpointError(
            f"{source.name} was trained on another model than {base.source.name}: its {odd} "
            "differs; put back the model that it was trained on"
        )


def _renamed_head(fields: Mapping[str, Any], head: str) -> Mapping[str, Any]:
    """A delta's configuration, with its head's quantization under the model's name for the head."""
    entry = fields.get("quantization")
    if not isinstance(entry, Mapping) or "lm_head_stage" not in entry:
        return fields
    return {**fields, "quantization": {**entry, head: entry["lm_head_stage"]}}


def _named(tensors: Mapping[str, StoredTensor], source: Source) -> dict[str, StoredTensor]:
    """The tensors under the model's own parameter names."""
    named: dict[str, StoredTensor] = {}
    for stored, tensor in tensors.items():
        name = stored
        while name.startswith(_PREFIXES):
            name = name.split(".", 1)[1]
        name = name.removeprefix("transformer.")
        name = re.sub(r"^value_embeds\.(\d+)\.", r"h.\1.attn.value_embed.", name)
        if _BUFFERS.fullmatch(name):
            continue
        if name in named:
            raise CheckpointError(f"{source.name}: two tensors are called {name}")
        named[name] = tensor
    return named


def _complete(fields: Mapping[str, Any], weights: Mapping[str, StoredTensor]) -> dict[str, Any]:
    """Complete a base's configuration from the tensors' names and shapes."""
    config = _with_depth(fields, weights)
    # check_weights reports tensors of other ranks.
    shapes = {name: tensor.shape for name, tensor in weights.items() if len(tensor.shape) == 2}
    if "wte.weight" in shapes:
        rows, width = shapes["wte.weight"]
        if not config.keys() & {"n_embd", "hidden_size"}:
            config["n_embd"] = width
        config.setdefault("vocab_size", rows)
    if not config.get("intermediate_size") and "h.0.mlp.c_fc.weight" in shapes:
        config["intermediate_size"] = shapes["h.0.mlp.c_fc.weight"][0]
    n_head = config.get("n_head", config.get("num_attention_heads"))
    q_rows, k_rows = (shapes.get(f"h.0.attn.c_{part}.weight", (0,))[0] for part in "qk")
    if q_rows and k_rows and isinstance(n_head, int) and n_head > 0:
        if not config.get("head_dim"):
            config["head_dim"] = q_rows // n_head
        if not config.keys() & {"n_kv_head", "num_key_value_heads"}:
            config["n_kv_head"] = n_head * k_rows // q_rows
    config["value_embed_layers"] = sorted(
        {int(m[1]) for name in weights if (m := _VALUE_EMBED.fullmatch(name))}
    )
    if "lm_head_stages.0.weight" in shapes:
        config.setdefault("per_stage_head", True)
    return config


def _with_depth(fields: Mapping[str, Any], weights: Mapping[str, StoredTensor]) -> dict[str, Any]:
    """Add the number of layers, unless `fields` has it. Raises ConfigError for a size that is too
    large."""
    config = {k: v for k, v in fields.items() if v is not None}
    longest = max((size for tensor in weights.values() for size in tensor.shape), default=0)
    for key, value in config.items():
        # Refused now: a model of such a size could not even be laid out for comparison.
        if key in _SIZES and isinstance(value, int) and value > longest:
            raise ConfigError(f"{key}: {value}, but no tensor is larger than {longest}")
    layers = [int(m[1]) for name in weights if (m := _LAYER.match(name))]
    if layers and not config.keys() & {"n_layer", "num_hidden_layers", "new_layers"}:
        config["n_layer"] = max(layers) + 1
    return config


def check_weights(
    config: PoEConfig, weights: Mapping[str, StoredTensor], plan: Plan, name: str
) -> None:
    """Raise CheckpointError unless `weights` are exactly what `config` and `plan` require."""
    model = PoEModel(config)
    try:
        apply_plan(model, plan)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{name} has an invalid quantization: {error}") from None
    expected = dict(tree_flatten(model.parameters()))
    problems = [f"lacks the tensor {k}" for k in expected if k not in weights]
    problems += [f"holds an unknown tensor {k}" for k in weights if k not in expected]
    for key in [k for k in expected if k in weights]:
        shape, wanted = weights[key].shape, expected[key].shape
        dtype, kind = weights[key].dtype, expected[key].dtype
        if _VOCAB_ROWS.match(key) and len(shape) == 2 and shape[0] >= config.vocab_size:
            wanted = (shape[0], wanted[1])
        if shape != wanted:
            problems.append(f"has {key} of shape {shape}, not {wanted}")
        elif dtype not in DTYPES.values() if kind in DTYPES.values() else dtype != kind:
            problems.append(f"has {key} in {dtype}, which is not a type for weights")
    if problems:
        more = f" (and {len(problems) - 1} more such problems)" if len(problems) > 1 else ""
        raise CheckpointError(f"{name} {problems[0]}{more}")


def eos_token_ids(source: Source) -> frozenset[int]:
    """The stop token ids in the model's generation defaults; CheckpointError if invalid."""
    path = source.folder / "generation_config.json"
    ids = read_json(path).get("eos_token_id") if path.is_file() else None
    if ids is None:
        return frozenset()
    ids = ids if isinstance(ids, list) else [ids]
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
        raise CheckpointError(f"{path}: eos_token_id {ids} are not token ids")
    return frozenset(ids)

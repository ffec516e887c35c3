"""A checkpoint folder, base or specialist delta, as configuration and weights.

- in: a `Source`: Hugging Face style (config.json and safetensors) or nanochat's (meta_*.json and
  model_*.pt, the latest step), under any of the known name prefixes
- out: `PoEConfig` and the model's own parameter names with lazy arrays, shapes checked
- deltas are followed to their root base and stacked, nearest wte and lambdas winning
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from cognica_mlx.config import PoEConfig, flatten
from cognica_mlx.convert.safetensors_files import read_json, read_tensors
from cognica_mlx.convert.sources import Source, locate_base
from cognica_mlx.convert.torch_files import TorchFile
from cognica_mlx.errors import CheckpointError, ConfigError
from cognica_mlx.model import PoEModel

_META = re.compile(r"meta_(\d{1,9})\.json")
_LAYER = re.compile(r"h\.(\d{1,6})\.")
_VALUE_EMBED = re.compile(r"h\.(\d{1,6})\.attn\.(value_embed|ve_gate)\.weight")
# Sizes that some tensor must have room for, by all their names.
_SIZES: tuple[str, ...] = (
    *("n_layer", "num_hidden_layers", "new_layers", "frozen_layers"),
    *("n_head", "num_attention_heads", "n_kv_head", "num_key_value_heads", "head_dim"),
    *("n_embd", "hidden_size", "intermediate_size", "vocab_size"),
)
_PREFIXES = ("_orig_mod.", "gpt.", "model.")
# Position tables that some exports carry along; they are computed here.
_BUFFERS = re.compile(r"(.*\.)?(cos|sin|inv_freq)")
# Their rows are padded, to 64 or otherwise; the logits are cropped to vocab_size.
_VOCAB_ROWS = re.compile(r"wte\.|lm_head|.*\.value_embed\.")
_FLOATS = (mx.float32, mx.bfloat16, mx.float16)


@dataclass(frozen=True)
class Checkpoint:
    """A model as stored: its configuration, its weights by parameter name, its tokenizer's folder.

    Weights from safetensors are not read yet; those of a `.pt` file are copies.
    """

    config: PoEConfig
    weights: dict[str, mx.array]
    tokenizer_folder: Path


def read_checkpoint(source: Source) -> Checkpoint:
    """Read a base, or a delta with all that it stands on.

    Raises CheckpointError for files or tensors that are missing, damaged, of a wrong shape or
    unknown, and for a cascade that is broken or goes in a circle, with the chain walked so far;
    ConfigError for a configuration that does not hold together.
    """
    return _read(source, ())


def _read(source: Source, chain: tuple[Source, ...]) -> Checkpoint:
    if source.folder.resolve() in [link.folder.resolve() for link in chain]:
        raise CheckpointError(f"the chain of bases goes in a circle: {_walk(*chain, source)}")
    chain = (*chain, source)
    fields = _read_config(source)
    reference = fields.get("base_model_name_or_path") or fields.get("base_model_dir")
    try:
        if not reference:
            return _read_base(source, fields)
        try:
            base_source = locate_base(str(reference), source)
        except CheckpointError as error:
            raise CheckpointError(f"{error} (chain walked so far: {_walk(*chain)})") from None
        return _stack(source, fields, _read(base_source, chain))
    except ConfigError as error:
        raise ConfigError(f"{source.name}: {error}") from None


def _walk(*chain: Source) -> str:
    return " -> ".join(link.name for link in chain)


def _read_config(source: Source) -> dict[str, Any]:
    path = source.folder / "config.json"
    if path.is_file():
        return read_json(path)
    meta = _latest_meta(source)
    if meta is None:
        raise CheckpointError(f"{source.name} holds no config.json: is it a model folder?")
    return dict(flatten(read_json(meta)))


def _latest_meta(source: Source) -> Path | None:
    """nanochat's description of its latest step; None in a folder of another kind."""
    steps = {int(m[1]): p for p in source.folder.iterdir() if (m := _META.fullmatch(p.name))}
    return steps[max(steps)] if steps else None


def _tensors(source: Source, stem: str) -> dict[str, mx.array]:
    """The tensors of a safetensors `stem`, or of nanochat's latest step, under their own names."""
    meta = _latest_meta(source)
    if (source.folder / "config.json").is_file() or meta is None:
        return read_tensors(source.folder, stem)
    file = TorchFile(meta.with_name(meta.name.replace("meta_", "model_")).with_suffix(".pt"))
    return {name: file.read(name) for name in file.shapes()}


def _tokenizer_folder(source: Source) -> Path | None:
    """Where a checkpoint's tokenizer lies: beside it, or where nanochat keeps it for all."""
    own, shared = source.folder, source.folder.resolve().parent.parent / "tokenizer"
    if (own / "tokenizer.pkl").is_file() or source.from_hub or _latest_meta(source) is None:
        return own if (own / "tokenizer.pkl").is_file() else None
    return shared if (shared / "tokenizer.pkl").is_file() else None


def _read_base(source: Source, fields: Mapping[str, Any]) -> Checkpoint:
    weights = _named(_tensors(source, "model"), source)
    config = PoEConfig.from_dict(_complete(fields, weights))
    # Checkpoints of early nanochat lack these, and mean no scaling.
    weights.setdefault("resid_lambdas", mx.ones((config.n_layer,)))
    weights.setdefault("x0_lambdas", mx.zeros((config.n_layer,)))
    check_weights(config, weights, source.name)
    return Checkpoint(config, weights, _tokenizer_folder(source) or source.folder)


def _stack(source: Source, fields: Mapping[str, Any], base: Checkpoint) -> Checkpoint:
    delta = _named(_tensors(source, "delta"), source)
    completed = {"frozen_layers": base.config.n_layer, **_with_depth(fields, delta)}
    config = PoEConfig.from_dict(completed, base=base.config)
    expected = {"lm_head_stage.weight", "wte.weight", "resid_lambdas", "x0_lambdas"}
    for name in delta:
        layer = _LAYER.match(name)
        if name not in expected and not (layer and int(layer[1]) >= base.config.n_layer):
            raise CheckpointError(f"{source.name}: a delta may not hold {name}")
    for name in sorted(expected - delta.keys()):
        raise CheckpointError(f"{source.name}: the delta lacks {name}")
    head = f"lm_head_specialists.{len(base.config.specialist_layers)}.weight"
    delta[head] = delta.pop("lm_head_stage.weight")
    weights = {**base.weights, **delta}
    check_weights(config, weights, source.name)
    return Checkpoint(config, weights, _tokenizer_folder(source) or base.tokenizer_folder)


def _named(tensors: Mapping[str, mx.array], source: Source) -> dict[str, mx.array]:
    """The tensors under the model's own parameter names."""
    named: dict[str, mx.array] = {}
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


def _complete(fields: Mapping[str, Any], weights: Mapping[str, mx.array]) -> dict[str, Any]:
    """Add to a base's configuration what the tensors' own names and shapes tell."""
    config = _with_depth(fields, weights)
    # Tensors of other ranks are named by check_weights.
    shapes = {name: tensor.shape for name, tensor in weights.items() if tensor.ndim == 2}
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


def _with_depth(fields: Mapping[str, Any], weights: Mapping[str, mx.array]) -> dict[str, Any]:
    """Add where the layers end, unless `fields` say it. ConfigError for a size beyond reason."""
    config = {k: v for k, v in fields.items() if v is not None}
    longest = max(size for tensor in weights.values() for size in (0, *tensor.shape))
    for key, value in config.items():
        # Refused now: a model of such a size could not even be laid out to compare it.
        if key in _SIZES and isinstance(value, int) and value > longest:
            raise ConfigError(f"{key}: {value}, but no tensor is larger than {longest}")
    layers = [int(m[1]) for name in weights if (m := _LAYER.match(name))]
    if layers and not config.keys() & {"n_layer", "num_hidden_layers", "new_layers"}:
        config["n_layer"] = max(layers) + 1
    return config


def check_weights(config: PoEConfig, weights: Mapping[str, mx.array], name: str) -> None:
    """Raise CheckpointError unless `weights` are just what a model of `config` takes."""
    expected = dict(tree_flatten(PoEModel(config).parameters()))
    problems = [f"lacks the tensor {k}" for k in expected if k not in weights]
    problems += [f"holds an unknown tensor {k}" for k in weights if k not in expected]
    for key in expected.keys() & weights.keys():
        shape, wanted = weights[key].shape, expected[key].shape
        if _VOCAB_ROWS.match(key) and len(shape) == 2 and shape[0] >= config.vocab_size:
            wanted = (shape[0], wanted[1])
        if shape != wanted:
            problems.append(f"has {key} of shape {shape}, not {wanted}")
        elif weights[key].dtype not in _FLOATS:
            problems.append(f"has {key} in {weights[key].dtype}, which is no weight's type")
    if problems:
        more = f" (and {len(problems) - 1} more such problems)" if len(problems) > 1 else ""
        raise CheckpointError(f"{name} {problems[0]}{more}")

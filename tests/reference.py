"""The oracle: the model of MODEL.md in plain numpy, and a maker of random checkpoints.

- `Reference` reads a Hugging Face folder and runs a whole sequence at once: no cache, no batch,
  float32 throughout. It shares no code with the package under test.
- `write_checkpoint` and `write_delta` write bases and specialists with random weights.

Tokens are ids of shape (T,), logits are (T, V).
"""

from __future__ import annotations

import json
import re
import shutil
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray
Config = dict[str, Any]
Tokens = Sequence[int] | Array

EPS = 1.1920929e-07
SMEAR_CHANNELS, VE_CHANNELS = 24, 12
_TAGS = {"bfloat16": "BF16", "float32": "F32"}
_NUMPY = {"BF16": "<u2", "F32": "<f4", "I32": "<i4"}
_TOKENIZER_FILES = ("tokenizer.pkl", "tokenizer_config.json", "special_tokens_map.json")


# --- files ------------------------------------------------------------------------------------


def read_tensors(path: Path) -> dict[str, Array]:
    """All tensors of one safetensors file: floats as float32, int32 as it is."""
    raw = path.read_bytes()
    start = 8 + struct.unpack("<Q", raw[:8])[0]
    tensors = {}
    for name, entry in json.loads(raw[8:start]).items():
        if name != "__metadata__":
            begin, end = (start + offset for offset in entry["data_offsets"])
            values = np.frombuffer(raw[begin:end], _NUMPY[entry["dtype"]])
            if entry["dtype"] == "BF16":
                values = (values.astype(np.uint32) << 16).view(np.float32)
            tensors[name] = values.reshape(entry["shape"])
    return tensors


def write_tensors(path: Path, tensors: Mapping[str, Array], dtype: str) -> int:
    """Write float32 tensors, rounded to nearest even for bfloat16; the bytes of data."""
    header, blobs, end = {}, [], 0
    for name, values in tensors.items():
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
        if dtype == "bfloat16":
            bits = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        blobs.append(bits.tobytes())
        begin, end = end, end + len(blobs[-1])
        span, shape = [begin, end], list(values.shape)
        header[name] = {"dtype": _TAGS[dtype], "shape": shape, "data_offsets": span}
    text = json.dumps({"__metadata__": {"format": "pt"}} | header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(blobs))
    return end


def _read_weights(folder: Path) -> dict[str, Array]:
    """The weights of one folder, shards joined and name prefixes stripped."""
    files = [*folder.glob("model*.safetensors"), *folder.glob("delta*.safetensors")]
    found = {name: values for file in files for name, values in read_tensors(file).items()}
    return {re.sub(r"^((gpt|model|_orig_mod)\.)+", "", name): w for name, w in found.items()}


def _read_config(folder: Path) -> Config:
    return json.loads((folder / "config.json").read_text())


# --- the model --------------------------------------------------------------------------------


def norm(x: Array) -> Array:
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + EPS)


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def log_softmax(z: Array) -> Array:
    z = z - z.max(axis=-1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=-1, keepdims=True))


def rotate(x: Array, theta: float) -> Array:
    """Rotate (T, heads, head_dim) by minus theta, halves layout."""
    exponents = np.arange(0, x.shape[-1], 2, dtype=np.float32) / x.shape[-1]
    angles = np.outer(np.arange(len(x), dtype=np.float32), np.float32(theta) ** -exponents)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]  # (T, 1, head_dim / 2)
    x1, x2 = np.split(x, 2, axis=-1)
    return np.concatenate([x1 * cos + x2 * sin, x2 * cos - x1 * sin], axis=-1)


def layer_windows(config: Config, n_layer: int) -> list[int]:
    """How many keys before its own each layer's query sees."""
    length, pattern = config["sequence_len"], config.get("window_pattern", "L")
    size = {"L": length, "S": -(-length // 4 // 128) * 128}
    return [size[pattern[i % len(pattern)]] for i in range(n_layer - 1)] + [length]


def boundary_layers(config: Config) -> list[int]:
    """The last layer of every stage of a base."""
    n_layer = config["n_layer"]
    if lengths := config.get("poe_stage_layers"):
        return [sum(lengths[: k + 1]) - 1 for k in range(len(lengths))]
    step = config.get("poe_every") or n_layer
    return sorted({*range(step - 1, n_layer, step), n_layer - 1})


class Reference:
    """A base, or a specialist with its whole chain folded in."""

    def __init__(
        self, config: Config, weights: dict[str, Array], new_heads: list[Array], n_layer: int
    ) -> None:
        """`config` is the root base's; `new_heads` are the deltas' heads, nearest last."""
        self.config, self.weights = config, weights
        self.new_heads, self.n_layer = new_heads, n_layer
        self.boundary_layers = boundary_layers(config)
        self.windows = layer_windows(config, n_layer)

    @classmethod
    def from_folder(cls, path: str | Path) -> Reference:
        """Read a base, or a delta and every folder that it stands on."""
        chain = [Path(path).resolve()]
        while parent := _read_config(chain[-1]).get("base_model_name_or_path"):
            chain.append((chain[-1] / parent).resolve())
            if chain[-1] in chain[:-1]:
                raise ValueError(f"the bases of {path} form a cycle at {chain[-1]}")
        weights: dict[str, Array] = {}
        heads = []
        for folder in reversed(chain):  # root first: the nearest delta's wte and lambdas win
            weights |= _read_weights(folder)
            if "lm_head_stage.weight" in weights:
                heads.append(weights.pop("lm_head_stage.weight"))
        blocks = {m[1] for name in weights if (m := re.match(r"transformer\.h\.(\d+)", name))}
        return cls(_read_config(chain[-1]), weights, heads, len(blocks))

    def predictions(self, tokens: Tokens) -> dict[str, Array]:
        """Everything that one pass predicts, (T, V) each, under the goldens' names.

        "stage_<k>" at the base's boundaries (no backout, no delta's head), their Log-OP "logop",
        "full" (logits, or Log-OP scores with per-stage heads), and a specialist's "base" (all
        heads but the nearest delta's) and "spec" (that one alone).
        """
        w, config = self.weights, self.config
        states, final = self._run(tokens)
        shared, own = w["lm_head.weight"], config.get("per_stage_head", False)
        stages = []
        for k, x in enumerate(states):
            extra = [w[f"lm_head_stages.{k}.weight"]] if own else []
            stages.append(self._logits(x, [shared, *extra]))
        found = {f"stage_{k}": logits for k, logits in enumerate(stages)}
        divisor = len(stages) ** (1 - config.get("poe_alpha", 0.0))
        found["logop"] = np.sum([log_softmax(z) for z in stages], axis=0) / divisor
        found["full"] = self._logits(final, [shared, *self.new_heads])
        if self.new_heads:
            found["base"] = self._logits(final, [shared, *self.new_heads[:-1]])
            found["spec"] = self._logits(final, self.new_heads[-1:])
        elif own:
            found["full"] = found["logop"]
        return found

    def boundaries(self, tokens: Tokens) -> list[Array]:
        """Logits at each base stage's boundary, (T, V) each."""
        found = self.predictions(tokens)
        return [found[f"stage_{k}"] for k in range(len(self.boundary_layers))]

    def logop(self, tokens: Tokens) -> Array:
        """Log-OP scores of the base's stages, (T, V)."""
        return self.predictions(tokens)["logop"]

    def full(self, tokens: Tokens, head_mode: str = "dual") -> Array:
        """The full model's logits or scores, (T, V); other head modes are for specialists."""
        key = {"dual": "full", "base": "base", "specialist": "spec"}[head_mode]
        return self.predictions(tokens)[key]

    def _logits(self, x: Array, heads: list[Array]) -> Array:
        h = norm(x)
        z = sum((h @ w.T for w in heads[1:]), h @ heads[0].T)
        return (15 * np.tanh(z / 15))[:, : self.config["vocab_size"]]

    def _run(self, tokens: Tokens) -> tuple[list[Array], Array]:
        """The residual stream at every base boundary and, backed out, at the end: (T, D) each."""
        ids, w = np.asarray(tokens, dtype=np.int64), self.weights
        x = norm(w["transformer.wte.weight"][ids])
        gate = sigmoid(x[1:, :SMEAR_CHANNELS] @ w["smear_gate.weight"].T)  # (T - 1, 1)
        x = np.concatenate([x[:1], x[1:] + w["smear_lambda"] * gate * x[:-1]])
        x0 = backout = x
        states = []
        for i in range(self.n_layer):
            # Old checkpoints lack the lambdas.
            resid = w["resid_lambdas"][i] if "resid_lambdas" in w else 1.0
            again = w["x0_lambdas"][i] if "x0_lambdas" in w else 0.0
            x = resid * x + again * x0
            x = x + self._attention(i, norm(x), ids)
            inner = np.maximum(norm(x) @ w[f"transformer.h.{i}.mlp.c_fc.weight"].T, 0) ** 2
            x = x + inner @ w[f"transformer.h.{i}.mlp.c_proj.weight"].T
            if i == self.config["n_layer"] // 2:
                backout = x
            if i in self.boundary_layers:
                states.append(x)
        return states, x - w["backout_lambda"] * backout

    def _attention(self, i: int, u: Array, ids: Array) -> Array:
        config, w, block = self.config, self.weights, f"transformer.h.{i}.attn."
        length, n_head = len(u), config["n_head"]
        n_kv_head = config.get("n_kv_head") or n_head
        q, k, v = (
            (u @ w[f"{block}c_{part}.weight"].T).reshape(length, heads, -1)
            for part, heads in (("q", n_head), ("k", n_kv_head), ("v", n_kv_head))
        )  # (T, heads, head_dim)
        if f"value_embeds.{i}.weight" in w:
            gate = 3 * sigmoid(u[:, :VE_CHANNELS] @ w[block + "ve_gate.weight"].T)  # (T, kv)
            v = v + gate[..., None] * w[f"value_embeds.{i}.weight"][ids].reshape(v.shape)
        q, k = (norm(rotate(part, config.get("rope_theta", 100000.0))) * 1.2 for part in (q, k))
        k, v = (np.repeat(part, n_head // n_kv_head, axis=1) for part in (k, v))
        q, k, v = (part.transpose(1, 0, 2) for part in (q, k, v))  # (n_head, T, head_dim)
        scores = q @ k.transpose(0, 2, 1) * q.shape[-1] ** -0.5  # (n_head, T, T)
        age = np.arange(length)[:, None] - np.arange(length)
        scores = np.where((age >= 0) & (age <= self.windows[i]), scores, -np.inf)
        mixed = np.exp(log_softmax(scores)) @ v
        return mixed.transpose(1, 0, 2).reshape(length, -1) @ w[block + "c_proj.weight"].T


# --- random checkpoints -----------------------------------------------------------------------


def weight_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Every tensor that the folder of `config` holds, a base's or a delta's, unprefixed."""
    width, n_layer, frozen = config["n_embd"], config["n_layer"], config.get("frozen_layers", 0)
    q_width, kv_width = (config[key] * config["head_dim"] for key in ("n_head", "n_kv_head"))
    inner = config.get("intermediate_size") or 4 * width
    rows = -(-config["vocab_size"] // 64) * 64
    shapes: dict[str, tuple[int, ...]] = {"transformer.wte.weight": (rows, width)}
    shapes |= {"resid_lambdas": (n_layer,), "x0_lambdas": (n_layer,)}
    for i in range(frozen, n_layer):
        block = {
            "attn.c_q": (q_width, width),
            "attn.c_k": (kv_width, width),
            "attn.c_v": (kv_width, width),
            "attn.c_proj": (width, q_width),
            "mlp.c_fc": (inner, width),
            "mlp.c_proj": (width, inner),
        }
        if not frozen and i % 2 == (n_layer - 1) % 2:
            block["attn.ve_gate"] = (config["n_kv_head"], VE_CHANNELS)
            shapes[f"value_embeds.{i}.weight"] = (rows, kv_width)
        shapes |= {f"transformer.h.{i}.{name}.weight": shape for name, shape in block.items()}
    if frozen:
        return shapes | {"lm_head_stage.weight": (rows, width)}
    shapes |= {"lm_head.weight": (rows, width), "smear_gate.weight": (1, SMEAR_CHANNELS)}
    shapes |= {"smear_lambda": (1,), "backout_lambda": (1,)}
    n_own = len(boundary_layers(config)) if config.get("per_stage_head") else 0
    return shapes | {f"lm_head_stages.{k}.weight": (rows, width) for k in range(n_own)}


def _draw(config: Config, seed: int) -> dict[str, Array]:
    """Random weights of the golden checkpoints' sizes, under which no activation dies."""
    rng, weights = np.random.default_rng(seed), {}
    mean = {"resid_lambdas": 1.05, "x0_lambdas": 0.22, "smear_lambda": 0.6, "backout_lambda": 0.4}
    gains = {"_gate": 0.5, "wte": 0.8, "value_embeds": 0.8}
    by_width = {"lm_head.": 1.75, "lm_head_stage": 0.65, "mlp.c_proj": 2.4, "": 1.2}
    for name, shape in weight_shapes(config).items():
        noise = rng.standard_normal(shape, dtype=np.float32)
        if name in mean:
            weights[name] = mean[name] + 0.1 * np.clip(noise, -1.5, 1.5)  # keeps signs
            continue
        gain = next((g for part, g in gains.items() if part in name), None)
        if gain is None:
            gain = next(g for part, g in by_width.items() if part in name) * shape[-1] ** -0.5
        weights[name] = gain * noise
    return weights


def _save(folder: Path, config: Config, weights: dict[str, Array], stem: str, shards: int) -> None:
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    names, size, where = sorted(weights), 0, dict[str, str]()
    for n in range(shards):
        shard = f"-{n + 1:05}-of-{shards:05}" if shards > 1 else ""
        part = {name: weights[name] for name in names[n::shards]}
        file = f"{stem}{shard}.safetensors"
        size += write_tensors(folder / file, part, config["torch_dtype"])
        where |= dict.fromkeys(part, file)
    if shards > 1:
        index = {"metadata": {"total_size": size}, "weight_map": where}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2))


def write_checkpoint(
    folder: str | Path,
    seed: int,
    *,
    prefix: str = "",
    shards: int = 1,
    dtype: str = "bfloat16",
    tokenizer_from: Path | None = None,
    **config: Any,
) -> Path:
    """Write a base with random weights in the Hugging Face layout; the folder.

    `config` needs n_layer, n_head, n_embd, sequence_len and vocab_size; every other key of the
    configuration may be given (poe_every, window_pattern, ...), None being as good as absent.
    `prefix` ("gpt.") goes before every tensor name; `dtype` is bfloat16 or float32;
    `tokenizer_from` is a folder to copy the tokenizer's files from.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    defaults = {
        "architectures": ["CognicaPoEForCausalLM"],
        "model_type": "cognica_poe",
        "n_kv_head": config["n_head"],
        "head_dim": config["n_embd"] // config["n_head"],
        "window_pattern": "SSSL",
        "rope_theta": 100000.0,
        "poe_mode": "flat",
        "poe_alpha": 0.0,
        "bos_token_id": config["vocab_size"] - 9,
        "torch_dtype": dtype,
    }
    config = defaults | {key: value for key, value in config.items() if value is not None}
    weights = {prefix + name: values for name, values in _draw(config, seed).items()}
    _save(folder, config, weights, "model", shards)
    if tokenizer_from:
        for file in _TOKENIZER_FILES:
            shutil.copyfile(tokenizer_from / file, folder / file)
    return folder


def write_delta(
    folder: str | Path,
    seed: int,
    *,
    base: str,
    new_layers: int,
    prefix: str = "",
    share_base: bool = False,
) -> Path:
    """Write a specialist of `new_layers` random blocks over `base`, a path relative to `folder`.

    The base may itself be a delta. With `share_base` the wte and the frozen layers' lambdas are
    the base's own, so that siblings see the same keys and values; otherwise all are drawn anew.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    parent = _read_config(folder / base)
    frozen = parent["n_layer"]
    config = parent | {
        "n_layer": frozen + new_layers,
        "base_model_name_or_path": base,
        "new_layers": new_layers,
        "frozen_layers": frozen,
        "dual_head": True,
        "stage_training": {"best_step": 10, "val_bpb": 2.0},
    }
    weights = _draw(config, seed)
    if share_base:
        old = _read_weights(folder / base)
        weights["transformer.wte.weight"] = old["transformer.wte.weight"]
        for name in ("resid_lambdas", "x0_lambdas"):
            weights[name][:frozen] = old[name]
    _save(folder, config, {prefix + name: w for name, w in weights.items()}, "delta", 1)
    return folder

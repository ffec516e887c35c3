"""Which matrices are quantized to how many bits, and how a checkpoint records that.

- a `Plan` gives a `Scheme` to each module that is quantized; MLX does the work
- it is made from the command's options, or read from a converted folder's `config.json`, in
  mlx-lm's format
- scalars and gates are never quantized; gates are narrower than a group
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from cognica_mlx.config import PoEConfig
from cognica_mlx.errors import CheckpointError, RequestError
from cognica_mlx.files.stored import dtype_name
from cognica_mlx.network.model import PoEModel
from cognica_mlx.network.quantized_copies import is_finite
from cognica_mlx.scheme import BITS, GROUP_SIZES, MODES, Scheme

# mlx-lm's mixed recipes: the bits of most matrices, and of those that need them most.
RECIPES = {"mixed_2_6": (2, 6), "mixed_3_4": (3, 4), "mixed_3_6": (3, 6), "mixed_4_6": (4, 6)}
UNQUANTIZED = 16

_LAYER = re.compile(r"h\.(\d+)\.")
_RANGE = re.compile(r"(layer|stage)s?([0-9]{1,5})(?:-([0-9]{1,5}))?")
_SENSITIVE = re.compile(r"h\.\d+\.(attn\.c_v|mlp\.c_proj)")
_KINDS = {
    "head": re.compile(r"lm_head.*"),
    "embed": re.compile(r"wte|.*\.value_embed"),
    "attn": re.compile(r"h\.\d+\.attn\.c_.*"),
    "mlp": re.compile(r"h\.\d+\.mlp\..*"),
}


Plan = dict[str, Scheme]
# Matrices that get other bits than the rest, and how many.
Rule = tuple[str, int]


def scheme(bits: int | None = None, group_size: int | None = None, mode: str = "affine") -> Scheme:
    """The scheme of these options, with the mode's defaults for None.

    Raises RequestError for a combination that MLX does not support.
    """
    if mode not in MODES:
        raise RequestError(f"q-mode {mode!r} is not one of {', '.join(MODES)}")
    default_group, default_bits = MODES[mode]
    bits = default_bits if bits is None else bits
    group_size = default_group if group_size is None else group_size
    if type(bits) is not int or type(group_size) is not int:
        raise RequestError(f"q-bits {bits!r} and q-group-size {group_size!r} must be whole numbers")
    if mode != "affine" and (group_size, bits) != (default_group, default_bits):
        raise RequestError(
            f"q-mode {mode} always has {default_bits} bits in groups of {default_group}: "
            "leave out q-bits and q-group-size, or choose affine"
        )
    for what, number, known in (("q-bits", bits, BITS), ("q-group-size", group_size, GROUP_SIZES)):
        if mode == "affine" and number not in known:
            raise RequestError(f"{what} {number} is not one of {', '.join(map(str, known))}")
    return Scheme(bits, group_size, mode)


def make_plan(config: PoEConfig, default: Scheme, rules: Sequence[Rule] = ()) -> Plan:
    """`default` for every matrix of a model of `config`, except as `rules` say; later rules win.

    A rule names "head", "embed", "attn", "mlp", a stage ("stage0"), a layer ("layer3") or several
    ("layers0-5"). Its bits use `default`'s mode if that supports them, else affine; 16 bits means
    as it is. Raises RequestError for a rule that matches nothing in the model, or invalid bits.
    """
    matrices = _matrices(config)
    schemes = dict.fromkeys(matrices, default)
    for what, bits in rules:
        chosen = default
        if bits != default.bits:
            group_size = default.group_size if default.mode == "affine" else None
            chosen = scheme(bits, group_size) if bits != UNQUANTIZED else Scheme(UNQUANTIZED, 1)
        named = _selected(config, matrices, what)
        if not named:
            raise RequestError(f"q-bits-for {what}: this model has none")
        schemes.update(dict.fromkeys(named, chosen))
    return {
        path: scheme
        for path, scheme in schemes.items()
        if scheme.bits != UNQUANTIZED and scheme.fits(matrices[path])
    }


def within(plan: Plan, weights: Container[str]) -> Plan:
    """The part of a plan that is about `weights`, which are names."""
    return {path: scheme for path, scheme in plan.items() if f"{path}.weight" in weights}


def mixed(config: PoEConfig, recipe: str, scheme: Scheme) -> tuple[Scheme, list[Rule]]:
    """One of RECIPES as a default scheme, with the group size of `scheme`, and its rules.

    The head gets more bits. So do the value matrices and the MLP's output matrices in the first and
    last eighth of the layers and in every third layer between. Raises RequestError unless `scheme`
    is affine.
    """
    if scheme.mode != "affine":
        raise RequestError(f"quant-predicate {recipe} is for q-mode affine only")
    low_bits, high_bits = RECIPES[recipe]
    eighth = config.n_layer // 8
    layers = [
        i
        for i in range(config.n_layer)
        if i < eighth or i >= 7 * config.n_layer // 8 or (i - eighth) % 3 == 2
    ]
    rules = [("head", high_bits), *((f"sensitive{i}", high_bits) for i in layers)]
    return replace(scheme, bits=low_bits), rules


def _matrices(config: PoEConfig) -> dict[str, int]:
    """The modules that MLX can quantize, and the length of their rows."""
    return {
        path: module.weight.shape[-1]
        for path, module in PoEModel(config).named_modules()
        if hasattr(module, "to_quantized")
    }


def _selected(config: PoEConfig, matrices: Iterable[str], what: str) -> list[str]:
    if what in _KINDS:
        return [path for path in matrices if _KINDS[what].fullmatch(path)]
    if what.startswith("sensitive"):
        prefix = f"h.{what.removeprefix('sensitive')}."
        return [p for p in matrices if p.startswith(prefix) and _SENSITIVE.fullmatch(p)]
    match = _RANGE.fullmatch(what)
    if not match:
        raise RequestError(
            f"q-bits-for {what}: name head, embed, attn, mlp, stage0 and so on, or layers0-5"
        )
    kind, first, last = match[1], int(match[2]), int(match[3] or match[2])
    count = config.n_layer if kind == "layer" else config.poe_n_stages
    if not first <= last < count:
        raise RequestError(f"q-bits-for {what}: this model has {kind}s 0 to {count - 1}")
    layers = set(range(first, last + 1))
    if kind == "stage":
        layers = {i for stage in layers for i in config.stage_range(stage)}
    return [path for path in matrices if (m := _LAYER.match(path)) and int(m[1]) in layers]


def pack(
    name: str, array: mx.array, plan: Plan, dtype: mx.Dtype | None = None
) -> dict[str, mx.array]:
    """A parameter's tensors by name, in `dtype`, quantized if `plan` has the module of its weight.

    Integer tensors, which are packed already, are unchanged.
    """
    if dtype is not None and mx.issubdtype(array.dtype, mx.floating):
        array = array.astype(dtype)
    module, _, suffix = name.rpartition(".")
    if suffix != "weight" or module not in plan or not mx.issubdtype(array.dtype, mx.floating):
        return {name: array}
    return {f"{module}.{key}": part for key, part in plan[module].quantize(array).items()}


def check_range(array: mx.array, packed: Mapping[str, mx.array]) -> None:
    """Evaluate what `pack` made. RequestError if it made an infinity of finite numbers."""
    mx.eval(packed)
    for name, part in packed.items():
        if part is not array and not is_finite(name, part):
            raise RequestError(
                f"{name} has numbers too large for {dtype_name(part.dtype)}: choose another dtype"
            )


def apply_plan(model: PoEModel, plan: Plan) -> None:
    """Replace the modules in `plan` with quantized ones, their weights unevaluated."""
    for path, module in model.named_modules():
        if path in plan and isinstance(module, nn.Embedding):
            width = module.weight.shape[-1]
            if not plan[path].fits(width):
                raise ValueError(f"{plan[path].mode} for {path}, whose rows have {width} numbers")
    if plan:
        nn.quantize(
            model, class_predicate=lambda path, _: asdict(plan[path]) if path in plan else False
        )


def fill(
    model: PoEModel,
    arrays: Iterator[tuple[str, mx.array]],
    plan: Plan,
    dtype: mx.Dtype | None = None,
    *,
    lazy: bool = False,
) -> None:
    """Set the parameters of `model`, in `dtype` and quantized as `plan` says; others do not change.

    `arrays` yields them one by one. Unless `lazy`, each is evaluated before the next is read, so
    that memory never holds two copies of the model.
    """
    apply_plan(model, plan)
    weights: dict[str, mx.array] = {}
    for name, array in arrays:
        packed = pack(name, array, plan, dtype)
        if not lazy:
            check_range(array, packed)
        weights.update(packed)
        del array  # before the next is read
    model.update(tree_unflatten(list(weights.items())))
    model.eval()


def to_fields(plan: Plan) -> dict[str, Any]:
    """The `quantization` entry of a `config.json`: the most common scheme, and others by path."""
    schemes = list(plan.values())
    common = max(dict.fromkeys(schemes), key=schemes.count)
    others = {path: asdict(scheme) for path, scheme in plan.items() if scheme != common}
    return {**asdict(common), **others}


def from_fields(fields: Mapping[str, Any], tensors: Iterable[str], name: str) -> Plan:
    """The plan that the `tensors` of the checkpoint `name` were packed by, from its `config.json`.

    Raises CheckpointError if packed tensors have no scheme there, or an invalid one.
    """
    paths = [name.removesuffix(".scales") for name in tensors if name.endswith(".scales")]
    if not paths:
        return {}
    entry = fields.get("quantization")
    if not isinstance(entry, Mapping):
        raise CheckpointError(
            f"{name} holds quantized tensors, but its config.json has no quantization"
        )
    plan: Plan = {}
    for path in paths:
        own = entry[path] if isinstance(entry.get(path), Mapping) else entry
        try:
            if None in (own["bits"], own["group_size"]):
                raise RequestError("both must be given here")
            plan[path] = scheme(own["bits"], own["group_size"], own.get("mode", "affine"))
        except (KeyError, TypeError, RequestError):
            raise CheckpointError(
                f"{name} has no valid quantization for {path} in its config.json: "
                f"{dict(own)!r:.120}"
            ) from None
    return plan

"""A decoding state as arrays and plain numbers, for writing to a file and reading back.

Everything read is checked against the model before use: shapes, types, ranges, lengths.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx

from cognica_mlx.cache.hidden import Hidden, Rows, pack
from cognica_mlx.decoding.state import DecodingState
from cognica_mlx.errors import RequestError
from cognica_mlx.network.model import PoEModel

OPTIONS = ("slack", "max_pending", "keep_trunk")
LISTS = ("tokens", "filled", "starts")
PARTS = ("x", "x0", "backout")


def to_arrays(state: DecodingState) -> tuple[dict[str, mx.array], dict[str, Any]]:
    """Everything that `from_arrays` needs to continue from here: arrays and JSON-ready fields."""
    arrays: dict[str, mx.array] = {}
    caches: list[Any] = state.caches  # other kinds than `StageCache` refuse
    for k, (cache, given) in enumerate(zip(caches, state.given, strict=True)):
        for i, (keys, values) in enumerate(cache.rows()):
            arrays[f"cache.{k}.{i}.keys"], arrays[f"cache.{k}.{i}.values"] = keys, values
        if given.start < cache.offset:
            hidden = pack(given.read(given.start, cache.offset))
            for name in PARTS:
                if (part := getattr(hidden, name)) is not None:
                    arrays[f"given.{k}.{name}"] = part
    fields = {
        "tokens": state.tokens,
        "filled": state.filled,
        "starts": [
            min(given.start, filled)
            for given, filled in zip(state.given, state.filled, strict=True)
        ],
        **{name: getattr(state, name) for name in OPTIONS},
    }
    return arrays, fields


def from_arrays(
    model: PoEModel, arrays: Mapping[str, mx.array], fields: Mapping[str, Any]
) -> DecodingState:
    """The state that `to_arrays` saved, for the same model.

    Raises RequestError if arrays and fields do not fit the model or each other.
    """
    numbers = [fields.get(name) for name in OPTIONS]
    for name in LISTS:
        if not isinstance(fields.get(name), list):
            raise RequestError(f"the saved state is damaged: {name} is not a list")
        numbers += fields[name]
    if not all(type(number) is int and 0 <= number < 2**31 for number in numbers):
        raise RequestError("the saved state is damaged: it contains a value that is not a number")
    state = DecodingState(model, **{name: fields[name] for name in OPTIONS})
    state.model.check_ids(fields["tokens"])
    try:
        _restore(state, arrays, fields)
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise RequestError(f"the saved state does not fit this model ({error})") from None
    return state


def _restore(
    state: DecodingState, arrays: Mapping[str, mx.array], fields: Mapping[str, Any]
) -> None:
    model, tokens = state.model, fields["tokens"]
    text = mx.array([tokens], dtype=mx.int32)
    caches: list[Any] = state.caches
    stages = zip(model.stages, fields["filled"], fields["starts"], strict=True)
    for k, (stage, filled, start) in enumerate(stages):
        supply = fields["filled"][stage.source - 1] if stage.source else len(tokens)
        if not start <= filled <= supply:
            raise ValueError(f"stage {k}: its lengths disagree")
        rows = (
            [_rows(state, arrays, k, i, filled) for i in range(len(stage.blocks))] if filled else []
        )
        caches[k].restore(rows, filled)
        given = state.given[k]
        given.stop = start
        if start < filled:
            span = (1, filled - start, model.config.n_embd)
            x, x0 = (_checked(model, arrays, f"given.{k}.{name}", span) for name in PARTS[:2])
            backout = None
            if stage.layers[-1] >= model.config.backout_layer:
                backout = _checked(model, arrays, f"given.{k}.backout", span)
            given.append(Rows.of(Hidden(text[:, start:filled], x, x0, backout)))
    state.append(tokens)


def _rows(
    state: DecodingState, arrays: Mapping[str, mx.array], k: int, i: int, filled: int
) -> tuple[mx.array, mx.array]:
    """The keys and values of a stage's i-th layer."""
    config = state.model.config
    cache: Any = state.caches[k]
    window = cache.windows[i]
    count = arrays[f"cache.{k}.{i}.keys"].shape[2]
    if not min(filled, window) <= count <= min(filled, cache.limit(window)):
        raise ValueError(f"stage {k}, layer {i}: {count} rows")
    shape = (1, config.n_kv_head, count, config.head_dim)
    keys, values = (
        _checked(state.model, arrays, f"cache.{k}.{i}.{part}", shape) for part in ("keys", "values")
    )
    return keys, values


def _checked(
    model: PoEModel, arrays: Mapping[str, mx.array], name: str, shape: tuple[int, ...]
) -> mx.array:
    array, dtype = arrays[name], model.resid_lambdas.dtype
    if array.shape != shape or array.dtype != dtype:
        raise ValueError(f"{name} is {array.dtype} {array.shape}, expected {dtype} {shape}")
    return array

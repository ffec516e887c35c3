"""A new stage on a frozen base: its parameters, their initial values, and the loss.

- in: activations at the base's last boundary, which the base or a store supplies
- out: the loss on the counted tokens, and its gradient; logits at their positions only
- of the base it keeps only the heads, which its predictions read; no block and no embedding
- parameters have the model's own names, in float32; `resid_lambdas` and `x0_lambdas` cover the new
  layers only
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from cognica_mlx.backend.kernels import Rotation, compiles, mixed
from cognica_mlx.cache.attention import Visible
from cognica_mlx.cache.hidden import Hidden
from cognica_mlx.config import SUMMED, PoEConfig
from cognica_mlx.errors import RequestError
from cognica_mlx.network.linear import Linear
from cognica_mlx.network.model import PoEModel
from cognica_mlx.network.shared_base import share_base
from cognica_mlx.scheme import unpacked
from cognica_mlx.training.loss import cross_entropy

Parameters = dict[str, mx.array]

# As in nanochat, the first matrix of an MLP starts with this share of the other matrices' bound.
FC_SHARE = 0.4
LAMBDAS = ("resid_lambdas", "x0_lambdas")


def stacked_config(base: PoEConfig, layers: int, head_mode: str | None = None) -> PoEConfig:
    """The configuration of `base` with a stage of `layers` blocks on top.

    `head_mode` defaults to the base's. Raises RequestError if the stage cannot start by predicting
    what the base does: on a merged specialist, or if the mode adds heads that the base does not
    predict through.
    """
    if base.head_mode == SUMMED:
        raise RequestError(
            "this model is a merged specialist, and another head cannot be added to its sum: name "
            "the delta that it was made from"
        )
    mode = head_mode or base.head_mode
    if base.specialist_layers and mode != "specialist" and base.head_mode != "dual":
        raise RequestError(
            f"head_mode {mode}: the specialist below predicts with head_mode {base.head_mode}, so "
            "a stage on it cannot add to all heads; use head_mode specialist"
        )
    return replace(
        base,
        n_layer=base.n_layer + layers,
        specialist_layers=(*base.specialist_layers, layers),
        head_mode=mode,
    )


def stacked(base: PoEModel, config: PoEConfig, rows: list[int], values: mx.array) -> PoEModel:
    """A model of `config` over `base` in memory, with its new blocks and head not set yet.

    `values` (n, D) are the new embeddings of the tokens `rows`.
    """
    model = PoEModel(config)
    share_base(model, base, rows, values)
    layers = config.specialist_layers[-1]
    for name, start in zip(LAMBDAS, (mx.ones, mx.zeros), strict=True):
        setattr(model, name, mx.concatenate([base[name], start((layers,), base[name].dtype)]))
    return model


class NewStage:
    """The last stage of a model, to be trained.

    It computes in `dtype`. With `grad_checkpoint` the blocks' inner activations are recomputed in
    the backward pass instead of kept.
    """

    def __init__(self, model: PoEModel, dtype: mx.Dtype, *, grad_checkpoint: bool = False):
        self.config, self.dtype = model.config, dtype
        self.layers = self.config.stage_range(self.config.poe_n_stages - 1)
        self._grad_checkpoint = grad_checkpoint
        self._head = f"lm_head_specialists.{len(self.config.specialist_layers) - 1}.weight"
        # Weights are set in this model for each pass; its initial weights are never evaluated.
        self._model = shell = PoEModel(self.config)
        shell.lm_head, shell.backout_lambda = model.lm_head, model.backout_lambda
        inherited = model.lm_head_specialists[:-1]
        shell.lm_head_specialists = [*inherited, shell.lm_head_specialists[-1]]
        mx.eval(
            shell.lm_head.parameters(), shell.backout_lambda, [h.parameters() for h in inherited]
        )
        self._frozen_head = self._one_head()
        loss = mx.value_and_grad(self._loss)
        self._loss_and_gradient: Callable[..., tuple[mx.array, Parameters]] = (
            mx.compile(loss) if compiles() else loss
        )

    def _one_head(self) -> mx.array | None:
        """The base's head, if one product can serve both it and the new head: the base's matrix
        plus zeros is the same matrix to the last bit.

        In 16 bits the sum would lose what is learned, and nothing can be added to packed weights.
        """
        mode, only = self.config.head_mode, len(self.config.specialist_layers) == 1
        plain = isinstance(self._model.lm_head, nn.Linear) and self.dtype == mx.float32
        return self._model.lm_head.weight if mode == "dual" and only and plain else None

    @property
    def nbytes(self) -> int:
        """Bytes of the base's heads, which the stage keeps."""
        heads = [self._model.lm_head, *self._model.lm_head_specialists[:-1]]
        return sum(array.nbytes for head in heads for array in _named(head).values())

    def start(self, base: PoEModel, seed: int) -> Parameters:
        """Initial parameters, with which the stage predicts exactly what `base` does: its blocks
        and head add nothing; a head used alone starts as the sum of the base's heads.

        The other matrices are uniform within sqrt(3 / D), as in nanochat.
        """
        width = self.config.n_embd
        bound = (3 / width) ** 0.5
        key, parameters = mx.random.key(seed), {}
        for i in self.layers:
            for name, array in _named(self._model.h[i]).items():
                path = f"h.{i}.{name}"
                if "c_proj" in name:
                    parameters[path] = mx.zeros(array.shape)
                    continue
                key, own = mx.random.split(key)
                limit = bound * (FC_SHARE if "c_fc" in name else 1)
                parameters[path] = mx.random.uniform(-limit, limit, array.shape, key=own)
        head = mx.zeros((self.config.padded_vocab_size, width))
        if self.config.head_mode == "specialist":
            head = sum((unpacked(one) for one in base.heads(base.poe_n_stages - 1)), start=head)
        parameters[self._head] = head
        for name, begin in zip(LAMBDAS, (mx.ones, mx.zeros), strict=True):
            parameters[name] = begin((len(self.layers),))
        mx.eval(parameters)
        return parameters

    @property
    def untrained(self) -> frozenset[str]:
        """Parameters that no prediction reads: the head, with `head_mode` "base"."""
        return frozenset({self._head} if self.config.head_mode == "base" else ())

    def logits(self, parameters: Parameters, hidden: Hidden, rows: mx.array) -> mx.array:
        """Logits at `rows` (n,) of the flattened positions (B, T): (n, V) float32."""
        cast = {name: array.astype(self.dtype) for name, array in parameters.items()}
        lambdas = [cast.pop(name) for name in LAMBDAS]
        self._model.update(tree_unflatten(list(cast.items())))
        windows, (batch, length, width) = self.config.windows, hidden.x.shape
        x, x0 = (array.reshape(-1, width) for array in (hidden.x, hidden.x0))
        rotate = Rotation(0, batch, length, self.config.rope_theta)
        whole = {w: Visible(w, 0, len(hidden)) for w in {windows[i] for i in self.layers}}
        for place, i in enumerate(self.layers):
            keep, again = (part[place : place + 1] for part in lambdas)
            x = mixed(keep, x, again, x0)
            x = self._block(i, x, hidden.tokens, whole[windows[i]], rotate)
        assert hidden.backout is not None, "the last boundary lies beyond the backout layer"
        x, backout = (part.reshape(-1, width)[rows][None] for part in (x, hidden.backout))
        return self._predict(Hidden(hidden.tokens, x, x, backout), cast[self._head])

    def _predict(self, hidden: Hidden, head: mx.array) -> mx.array:
        if self._frozen_head is None:
            return self._model.stage_logits(self.config.poe_n_stages - 1, hidden)[0]
        both = Linear(1, 1, bias=False)
        both.weight = self._frozen_head + head
        return self._model.final_logits(hidden, [both])[0]

    def _block(
        self, i: int, x: mx.array, tokens: mx.array, attention: Visible, rotate: Rotation
    ) -> mx.array:
        block = self._model.h[i]
        if not self._grad_checkpoint:
            return block(x, tokens, attention, rotate)

        def run(weights: dict[str, Any], x: mx.array) -> mx.array:
            block.update(weights)
            return block(x, tokens, attention, rotate)

        return mx.checkpoint(run)(block.parameters(), x)

    def _loss(
        self,
        parameters: Parameters,
        hidden: tuple[mx.array, ...],
        rows: mx.array,
        *targets: mx.array,
    ) -> mx.array:
        tokens, x, x0, backout = hidden
        logits = self.logits(parameters, Hidden(tokens, x, x0, backout), rows)
        return cross_entropy(logits, *targets)

    def loss(self, parameters: Parameters, hidden: Hidden, *targets: mx.array) -> mx.array:
        """The weighted sum of the cross entropies, in nats.

        `targets` are the `rows`, `targets` and `weights` (n,) of a `Batch`.
        """
        return self._loss(parameters, _arrays(hidden), *targets)

    def loss_and_gradient(
        self, parameters: Parameters, hidden: Hidden, *targets: mx.array
    ) -> tuple[mx.array, Parameters]:
        """`loss`, and its gradient with respect to each parameter, float32."""
        return self._loss_and_gradient(parameters, _arrays(hidden), *targets)


def _arrays(hidden: Hidden) -> tuple[mx.array, ...]:
    assert hidden.backout is not None, "the last boundary lies beyond the backout layer"
    return hidden.tokens, hidden.x, hidden.x0, hidden.backout


def _named(module: nn.Module) -> Parameters:
    found: Parameters = dict(tree_flatten(module.parameters()))
    return found

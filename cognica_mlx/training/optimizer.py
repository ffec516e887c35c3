"""Muon for matrices and AdamW for the rest, as a pure function of a state; the learning rate.

- in: parameters and gradients by name, float32
- out: new parameters and a new state; nothing is changed in place, so an interrupted step leaves
  the old ones intact
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.optimizers as optim

from cognica_mlx.backend.kernels import compiles
from cognica_mlx.training.stage import Parameters

# AdamW's learning rate as a share of Muon's at width 128; as in nanochat, it falls with the square
# root of the width.
ADAMW_SHARE, REFERENCE_WIDTH = 0.5, 128
BETAS, MOMENTUM = [0.8, 0.95], 0.95
# From the released recipe: the shares of all steps in which the rate rises and in which it falls.
WARM_UP, WARM_DOWN = 0.05, 0.9
OPTIMIZERS = ("muon", "adamw")

State = dict[str, mx.array]


def rate(step: int, steps: int) -> float:
    """The factor on the learning rates in step `step` (from 0) of `steps`: a linear rise, a
    plateau, and a linear fall that would reach 0 one step after the last."""
    up, down = max(round(WARM_UP * steps), 1), max(round(WARM_DOWN * steps), 1)
    return min((step + 1) / up, 1.0, (steps - step) / down)


class MuonAdamW:
    """Muon (momentum, then Newton-Schulz) for the blocks' matrices, AdamW for heads and lambdas.

    With `kind` "adamw", AdamW for everything. `max_norm` clips the gradient's norm; 0 turns that
    off. `width` is the model's; `frozen` parameters do not change.
    """

    def __init__(
        self, kind: str, max_norm: float, width: int, frozen: frozenset[str] = frozenset()
    ):
        self._kind, self._max_norm, self._frozen = kind, max_norm, frozen
        self._share = ADAMW_SHARE * (REFERENCE_WIDTH / width) ** 0.5
        self._muon = optim.Muon(0.0, momentum=MOMENTUM, weight_decay=0.0)
        self._adamw = optim.AdamW(0.0, betas=BETAS, weight_decay=0.0, bias_correction=True)
        self._update: Callable[..., tuple[Parameters, State, mx.array]] = (
            mx.compile(self._apply) if compiles() else self._apply
        )

    def _is_matrix(self, name: str, parameter: mx.array) -> bool:
        return self._kind == "muon" and name.startswith("h.") and parameter.ndim == 2

    def start(self, parameters: Parameters) -> State:
        """The state before the first update."""
        state = {"step": mx.array(0, mx.uint64)}
        for name, parameter in parameters.items():
            slots = "v" if self._is_matrix(name, parameter) else "mv"
            if name not in self._frozen:
                state |= {f"{name}:{slot}": mx.zeros_like(parameter) for slot in slots}
        mx.eval(state)
        return state

    def update(
        self, parameters: Parameters, gradients: Parameters, state: State, learning_rate: float
    ) -> tuple[Parameters, State, mx.array]:
        """The parameters and state after one update, and the gradient's norm before clipping.

        `learning_rate` is Muon's; AdamW's is a share of it (see `ADAMW_SHARE`).
        """
        return self._update(parameters, gradients, state, mx.array(learning_rate, mx.float32))

    def _apply(
        self, parameters: Parameters, gradients: Parameters, state: State, learning_rate: mx.array
    ) -> tuple[Parameters, State, mx.array]:
        gradients = {k: g for k, g in gradients.items() if k not in self._frozen}
        if self._max_norm:
            gradients, norm = optim.clip_grad_norm(gradients, self._max_norm)
        else:
            norm = mx.sqrt(mx.stack([mx.square(g).sum() for g in gradients.values()]).sum())
        matrices = {k for k in gradients if self._is_matrix(k, parameters[k])}
        parts = (
            (self._muon, matrices, learning_rate),
            (self._adamw, gradients.keys() - matrices, self._share * learning_rate),
        )
        parameters, new_state = dict(parameters), {"step": state["step"] + 1}
        for optimizer, names, own_rate in parts:
            if not names:
                continue
            ordered = sorted(names)
            slots = {n: {k[-1]: a for k, a in state.items() if k[:-2] == n} for n in ordered}
            optimizer.state = {"step": state["step"], "learning_rate": own_rate, **slots}
            both = ({name: part[name] for name in ordered} for part in (gradients, parameters))
            parameters |= optimizer.apply_gradients(*both)
            for name in ordered:
                new_state |= {f"{name}:{k}": a for k, a in optimizer.state[name].items()}
        return parameters, new_state, norm

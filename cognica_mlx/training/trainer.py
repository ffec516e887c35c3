"""Training, one iteration after another: from one state to the next.

- in: a stage, batches, their activations
- out: a new `Training` for each iteration; the old one is unchanged, so an interruption loses only
  the current iteration
- the order of the data and the learning rate follow from the iteration number, so the state and the
  settings determine everything that follows
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field, replace

import mlx.core as mx

from cognica_mlx.cache.hidden import Hidden
from cognica_mlx.decoding.sampling import bits_per_byte
from cognica_mlx.errors import PoEError
from cognica_mlx.training.batches import ROW_SHARE, Batch, Batches, bucket
from cognica_mlx.training.optimizer import MuonAdamW, State, rate
from cognica_mlx.training.stage import NewStage, Parameters
from cognica_mlx.training.store import Activations


class DivergedError(PoEError):
    """The loss or its gradient is no longer finite."""


@dataclass(frozen=True)
class Evaluation:
    """Losses after `iteration` iterations, in nats per counted token.

    `train_loss` is the mean since the previous evaluation; `bits_per_byte` is that of the
    validation texts, over the bytes of their counted tokens.
    """

    iteration: int
    train_loss: float | None
    valid_loss: float
    bits_per_byte: float


@dataclass(frozen=True)
class Training:
    """Everything that the next iteration needs, and the best parameters so far.

    `gradients` are summed over `counted` tokens until the next update; `best` are the parameters
    with the lowest validation loss, as saved. `loss` and `loss_tokens` accumulate since the last
    evaluation.
    """

    iteration: int
    parameters: Parameters
    optimizer: State
    gradients: Parameters = field(default_factory=dict)
    counted: int = 0
    best: Parameters = field(default_factory=dict)
    best_iteration: int = 0
    curve: tuple[Evaluation, ...] = ()
    loss: float = 0.0
    loss_tokens: int = 0

    @property
    def best_evaluation(self) -> Evaluation:
        """That of the best parameters."""
        return next(e for e in self.curve if e.iteration == self.best_iteration)


@dataclass
class Trainer:
    """Iterations over `batches`, with an update after every `accumulation` of them.

    `kept` is the dtype in which parameters are saved; validation uses the saved form.
    """

    stage: NewStage
    optimizer: MuonAdamW
    batches: Batches
    activations: Activations
    _: KW_ONLY
    iterations: int
    learning_rate: float
    accumulation: int = 1
    kept: mx.Dtype = mx.bfloat16

    def start(self, parameters: Parameters) -> Training:
        """The state before the first iteration."""
        return Training(0, parameters, self.optimizer.start(parameters))

    def rate(self, iteration: int) -> float:
        """Muon's learning rate in `iteration`."""
        updates = -(-self.iterations // self.accumulation)
        return self.learning_rate * rate(iteration // self.accumulation, updates)

    def most_bytes(self, state: Training) -> int:
        """The most bytes that an iteration needs, without the base: weights, the best weights,
        optimizer, heads, and the larger of a backward pass and an update.

        The backward pass's share is an upper estimate, checked against measurements with 1 to 4
        layers, 25 to 2,048 counted positions, and texts of 64 to 512 tokens.
        """
        config, texts = self.stage.config, self.batches.texts
        longest = bucket(max(map(len, texts)))
        positions = self.batches.batch_size * longest
        rows = min(self.batches.batch_size * max(int(t.counted.sum()) for t in texts), positions)
        layers = len(self.stage.layers)
        weights, slots = (
            sum(array.nbytes for array in part.values())
            for part in (state.parameters, state.optimizer)
        )
        # Each layer's activations, those of the boundary, attention's scores, the logits.
        values = positions * config.n_embd * (24 * layers + 28)
        values += positions * config.n_head * longest * 3 * (layers + 2) // 2
        values += (rows + positions // ROW_SHARE) * config.padded_vocab_size * 8
        backward = values * mx.float32.size + weights * (1 + (self.accumulation > 1))
        held = weights + weights * self.kept.size // mx.float32.size + slots + self.stage.nbytes
        return held + max(backward, 3 * weights + 2 * slots)

    def step(self, state: Training) -> Training:
        """The state after one more iteration, evaluated.

        Raises DivergedError if the loss or the gradient is not finite.
        """
        batch = self.batches[state.iteration]
        loss, gradients = self.stage.loss_and_gradient(
            state.parameters, *_inputs(batch, self.activations.read(batch))
        )
        if state.gradients:
            gradients = {k: g + state.gradients[k] for k, g in gradients.items()}
        state = replace(
            state,
            iteration=state.iteration + 1,
            gradients=gradients,
            counted=state.counted + batch.counted,
        )
        size = mx.array(0.0)
        if state.iteration % self.accumulation == 0:
            state, size = self._updated(state)
        state = _evaluated(state, loss=loss, gradient=size)
        return replace(
            state, loss=state.loss + float(loss), loss_tokens=state.loss_tokens + batch.counted
        )

    def finish(self, state: Training) -> Training:
        """The state with an update by the gradients that still wait for one, when training ends.

        Raises DivergedError if the gradient is not finite.
        """
        if not state.gradients:
            return state
        state, size = self._updated(state)
        return _evaluated(state, gradient=size)

    def _updated(self, state: Training) -> tuple[Training, mx.array]:
        """The state after an update, and the gradient's norm; not evaluated yet."""
        mean = {k: g / max(state.counted, 1) for k, g in state.gradients.items()}
        parameters, optimizer, size = self.optimizer.update(
            state.parameters, mean, state.optimizer, self.rate(state.iteration - 1)
        )
        updated = replace(
            state, parameters=parameters, optimizer=optimizer, gradients={}, counted=0
        )
        return updated, size

    def evaluate(
        self, state: Training, batches: Sequence[Batch], activations: Activations
    ) -> Training:
        """The state with one more evaluation, and with its parameters as `best` if they are.

        Raises DivergedError if the validation loss is not finite.
        """
        parameters = {name: array.astype(self.kept) for name, array in state.parameters.items()}
        total, counted, n_bytes = 0.0, 0, 0
        for batch in batches:
            total += float(self.stage.loss(parameters, *_inputs(batch, activations.read(batch))))
            counted, n_bytes = counted + batch.counted, n_bytes + batch.n_bytes
        loss = total / max(counted, 1)
        if not math.isfinite(loss):
            raise DivergedError(
                f"the validation loss after iteration {state.iteration} is not a finite number"
            )
        train = state.loss / state.loss_tokens if state.loss_tokens else None
        measured = Evaluation(state.iteration, train, loss, bits_per_byte(total, n_bytes))
        state = replace(state, curve=(*state.curve, measured), loss=0.0, loss_tokens=0)
        if loss < min((e.valid_loss for e in state.curve[:-1]), default=math.inf):
            mx.eval(parameters)
            state = replace(state, best=parameters, best_iteration=state.iteration)
        return state


def _evaluated(state: Training, **finite: mx.array) -> Training:
    """The state, evaluated. DivergedError names any of `finite` that is not."""
    # Row-major, as in a checkpoint: sums depend on the order in memory.
    parameters, optimizer, gradients = (
        {name: mx.contiguous(array) for name, array in arrays.items()}
        for arrays in (state.parameters, state.optimizer, state.gradients)
    )
    mx.eval(finite, parameters, optimizer, gradients)
    for what, value in finite.items():
        if not math.isfinite(float(value)):
            raise DivergedError(f"the {what} of iteration {state.iteration} is not a finite number")
    return replace(state, parameters=parameters, optimizer=optimizer, gradients=gradients)


def _inputs(batch: Batch, hidden: Hidden) -> tuple[Hidden, mx.array, mx.array, mx.array]:
    return hidden, mx.array(batch.rows), mx.array(batch.targets), mx.array(batch.weights)

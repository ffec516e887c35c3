"""How a training run reports progress, and how it ends: with a result, or early."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from cognica_mlx.training.batches import Text
from cognica_mlx.training.trainer import Evaluation


class Reporter(Protocol):
    """Receives a run's progress."""

    def note(self, text: str) -> None:
        """A line for people."""

    def phase(self, name: str, total: int) -> None:
        """A phase of `total` steps begins; it ends with the next phase, or with `done`."""

    def advance(self, count: int, text: str = "") -> None:
        """`count` more steps of the phase are done; `text` is the current status."""

    def done(self) -> None:
        """The phase is over."""

    def evaluated(self, evaluation: Evaluation, rate: float) -> None:
        """The stage has been measured on the validation rows; `rate` is the learning rate."""


class InterruptedTraining(Exception):
    """Training was interrupted by Ctrl-C. `iteration` is the checkpoint's, or None without one."""

    def __init__(self, iteration: int | None):
        super().__init__(iteration)
        self.iteration = iteration


@dataclass(frozen=True)
class Result:
    """A run's result: its curve, the iteration that the folder holds, the training time in seconds,
    positions trained on per second, peak memory of training in bytes, and the validation and test
    rows."""

    curve: tuple[Evaluation, ...]
    best_iteration: int
    seconds: float
    tokens_per_second: float
    peak_memory: int
    valid: list[Text]
    test: list[Text] | None

    @property
    def best(self) -> Evaluation:
        """The evaluation of the weights in the folder."""
        return next(e for e in self.curve if e.iteration == self.best_iteration)

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

    def progress(self, name: str, done: int, total: int, status: str = "") -> None:
        """`done` of the `total` steps of a phase are done."""

    def evaluated(self, evaluation: Evaluation, rate: float) -> None:
        """The stage has been measured on the validation rows; `rate` is the learning rate."""


class InterruptedTraining(Exception):
    """Training was interrupted by Ctrl-C. `iteration` is the checkpoint's, or None without one."""

    def __init__(self, iteration: int | None):
        super().__init__(iteration)
        self.iteration = iteration


@dataclass(frozen=True)
class Result:
    """A run's result: its curve, the evaluation of the folder's weights, the training time in
    seconds, positions trained on per second, peak memory in bytes, and the validation and test
    rows."""

    curve: tuple[Evaluation, ...]
    best: Evaluation
    seconds: float
    tokens_per_second: float
    peak_memory: int
    valid: list[Text]
    test: list[Text] | None

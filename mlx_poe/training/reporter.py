"""Who watches a training run, and how it ends early."""

from __future__ import annotations

from typing import Protocol

from cognica_mlx.training.trainer import Evaluation


class Reporter(Protocol):
    """What a run tells whoever watches it."""

    def note(self, text: str) -> None:
        """A line for people."""

    def phase(self, name: str, total: int) -> None:
        """A piece of work of so many steps begins; it ends with the next, or with `done`."""

    def advance(self, count: int, text: str = "") -> None:
        """So many steps of the phase are done; `text` says where it stands."""

    def done(self) -> None:
        """The phase is over."""

    def evaluated(self, evaluation: Evaluation, rate: float) -> None:
        """The stage has been measured on the validation rows; `rate` is the learning rate."""


class InterruptedTraining(Exception):
    """Ctrl-C came; `iteration` is what the checkpoint holds, None where there is none yet."""

    def __init__(self, iteration: int | None):
        super().__init__(iteration)
        self.iteration = iteration

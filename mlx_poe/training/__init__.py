"""Training a specialist on this machine: data formats, stores, and the resulting folder."""

from mlx_poe.training.reporter import InterruptedTraining, Reporter
from mlx_poe.training.run import Result, train
from mlx_poe.training.settings import TrainingSettings

__all__ = ["InterruptedTraining", "Reporter", "Result", "TrainingSettings", "train"]

"""Training a specialist on this machine: data formats, stores, and the resulting folder."""

from mlx_poe.training.reporter import InterruptedTraining, Reporter, Result
from mlx_poe.training.run import train
from mlx_poe.training.settings import TrainingSettings

__all__ = ["InterruptedTraining", "Reporter", "Result", "TrainingSettings", "train"]

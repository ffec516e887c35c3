"""Training a specialist on this machine: data formats, stores, the folder that it becomes."""

from mlx_poe.training.run import InterruptedTraining, Result, train
from mlx_poe.training.settings import TrainingSettings

__all__ = ["InterruptedTraining", "Result", "TrainingSettings", "train"]

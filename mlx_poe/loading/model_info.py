"""A description of a model, for threads that may not touch its arrays."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

from cognica_mlx.decoding.modes import MODES, make_mode
from cognica_mlx.errors import RequestError
from cognica_mlx.network.model import PoEModel
from cognica_mlx.network.shared_base import Siblings


@dataclass(frozen=True)
class ModelInfo:
    """`kind` is "base", "specialist" or "composition"; `modes` are the decoding modes that need no
    further options; `sequence_len` is the length of the texts it was trained on."""

    kind: str
    stages: int
    modes: tuple[str, ...]
    sequence_len: int
    vocab_size: int

    @property
    def chats(self) -> bool:
        """Whether it was trained to chat."""
        return self.kind != "base"


def describe(model: PoEModel) -> ModelInfo:
    """The model's description. Call it in the thread that owns its arrays: it tries out modes."""
    modes = []
    for mode in MODES:
        with suppress(RequestError):
            make_mode(model, mode, None, model.calibration)
            modes.append(mode)
    kind = "specialist" if model.config.specialist_layers else "base"
    if isinstance(model, Siblings):
        kind = "composition"
    config = model.config
    return ModelInfo(kind, model.poe_n_stages, tuple(modes), config.sequence_len, config.vocab_size)

"""Many requests over time, from any thread: `Engine`."""

from mlx_poe.engine.engine import Engine
from mlx_poe.engine.ticket import EngineClosedError, EngineRequest, Listener

__all__ = ["Engine", "EngineClosedError", "EngineRequest", "Listener"]

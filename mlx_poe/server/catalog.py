"""The served models by name: the base, each specialist, and compositions of specialists."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mlx_poe.engine import Engine
from mlx_poe.loading.model_info import ModelInfo
from mlx_poe.server.error_bodies import ApiError
from mlx_poe.server.fields import Fields, shown


@dataclass(frozen=True)
class Served:
    """A model and its name in requests. `specialist` and `weights` are for `Engine.submit`."""

    name: str
    info: ModelInfo
    specialist: str | tuple[str, ...] | None = None
    weights: tuple[float, ...] | None = None

    def as_json(self, created: int) -> dict[str, Any]:
        """Its entry in `/v1/models`."""
        info = self.info
        about = {"kind": info.kind, "chat": info.chats, "stages": info.stages, "modes": info.modes}
        return {
            "id": self.name,
            "object": "model",
            "created": created,
            "owned_by": "cognica-mlx",
            "poe": {**about, "sequence_len": info.sequence_len},
        }


class Catalog(dict[str, Served]):
    """The models by name, in the order they are listed."""

    def find(self, name: str) -> Served:
        """The model of that name, or ApiError 404. Names are looked up here and nowhere else."""
        if name not in self:
            message = f"model: {shown(name)} is not served here; served: {', '.join(self)}"
            raise ApiError(404, message, "model", "model_not_found")
        return self[name]

    def named_in(self, body: Fields) -> Served:
        """The model that a request asks for."""
        return self.find(body.required("model", body.text))


def make_catalog(
    engine: Engine,
    base: str,
    specialists: Sequence[str],
    compositions: Sequence[tuple[str, Sequence[str], Sequence[float]]],
) -> Catalog:
    """All models of an engine with `specialists` attached, under their names there. Each of the
    `compositions` is a name, specialists, and their weights.

    Raises RequestError for an impossible composition.
    """
    served = [Served(base, engine.describe())]
    served += [Served(name, engine.describe(name), name) for name in specialists]
    for name, parts, weights in compositions:
        info = engine.describe(parts, weights)
        served.append(Served(name, info, tuple(parts), tuple(weights)))
    return Catalog((one.name, one) for one in served)

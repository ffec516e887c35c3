"""Specialists at run time: one base in memory, with specialists attached by name.

Each adds only its own blocks, head and lambdas, and the rows of the embedding table that it
changed. The base is not copied, reloaded or modified.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten

from cognica_mlx.calibration_file import read_calibration
from cognica_mlx.convert.checkpoint import Checkpoint, read_checkpoint
from cognica_mlx.convert.quantization import fill, make_plan, scheme, within
from cognica_mlx.errors import CheckpointError, RequestError
from cognica_mlx.files.lineage import difference, of_model
from cognica_mlx.machines.placement import NOTHING, Absent
from cognica_mlx.network.model import PoEModel
from cognica_mlx.network.shared_base import Siblings, share_base
from mlx_poe.loading.load import find_model


class Specialists:
    """The specialists over `base`, by name; `use` returns the model to decode with.

    `is_here(i)` says whether the i-th specialist attached is on this machine; by default all are.
    """

    def __init__(self, base: PoEModel, is_here: Callable[[int], bool] = lambda _: True):
        self.base, self._is_here = base, is_here
        self._models: dict[str, PoEModel] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """The attached specialists, in the order they were attached."""
        return tuple(self._models)

    def attach(
        self,
        name: str,
        path_or_hf_repo: str | Path,
        *,
        revision: str | None = None,
        quantize: int | None = None,
    ) -> PoEModel:
        """Load a specialist of the base, or a chain of them, and return its model.

        `path_or_hf_repo` and `revision` are as in `load`; `quantize` is the number of bits to
        quantize its own matrices to. Raises RequestError for a name that is taken, CheckpointError
        or ConfigError for a checkpoint that is damaged or belongs to another base.
        """
        if name in self._models:
            raise RequestError(f"{name} is already attached: detach it, or choose another name")
        checkpoint = read_checkpoint(find_model(path_or_hf_repo, revision))
        shared = self._link_in_memory(checkpoint)
        here = self.is_next_here()
        if not here and checkpoint.config.poe_n_stages != self.base.poe_n_stages + 1:
            raise RequestError(f"{name} has more than one stage of its own: rank 0 must hold it")
        model = self._stack(checkpoint, shared, quantize, here)
        model.calibration, model.calibration_problem = read_calibration(
            checkpoint.source.folder, model.config, partial(of_model, model)
        )
        model.revision = checkpoint.revision
        self.add(name, model)
        return model

    def add(self, name: str, model: PoEModel) -> None:
        """Add a model that already shares the base in memory: see `share_base`."""
        self._models[name] = model

    def is_next_here(self) -> bool:
        """Whether this machine holds the next specialist to be attached."""
        return self._is_here(len(self._models))

    def use(self, name: str | None) -> PoEModel:
        """The base with the specialist `name` on top, or with None the base itself.

        Raises RequestError if no specialist has that name.
        """
        if name is None:
            return self.base
        if name not in self._models:
            known = ", ".join(self._models) or "none"
            raise RequestError(f"no specialist {name} is attached; attached: {known}")
        return self._models[name]

    def compose(self, names: Sequence[str], weights: Sequence[float] | None = None) -> PoEModel:
        """The weighted Log-OP of several specialists. The base runs once for all of them.

        Weights are equal by default. Raises RequestError if the specialists do not fit together.
        """
        if not names:
            raise RequestError("name at least one specialist to compose")
        models = [self.use(name) for name in names]
        return Siblings(models, [1.0] * len(models) if weights is None else weights)

    def choose(
        self, specialist: str | Sequence[str] | None, weights: Sequence[float] | None = None
    ) -> PoEModel:
        """`use` one specialist, or `compose` several."""
        if specialist is not None and not isinstance(specialist, str):
            return self.compose(specialist, weights)
        if weights is not None:
            raise RequestError("weights need several specialists")
        return self.use(specialist)

    def detach(self, name: str) -> None:
        """Detach a specialist; its memory is freed once nothing decodes with it anymore."""
        self.use(name)
        del self._models[name]

    def nbytes(self, name: str) -> int:
        """How many bytes a specialist adds to the base."""
        held = {id(array) for array in dict(tree_flatten(self.base.parameters())).values()}
        own = dict(tree_flatten(self.use(name).parameters()))
        return sum(array.nbytes for array in own.values() if id(array) not in held)

    def _link_in_memory(self, checkpoint: Checkpoint) -> Checkpoint:
        """The link in the checkpoint's chain that is the base in memory."""
        below = (one for one in checkpoint.chain[1:] if one.config == self.base.config)
        link, name = next(below, None), checkpoint.source.name
        if link is None:
            raise CheckpointError(f"{name} does not belong to the model in memory: shapes differ")
        if odd := difference(link.sketch(), of_model(self.base)):
            raise CheckpointError(
                f"{name} belongs to {link.source.name}, which is not the model in memory: its "
                f"{odd} differs"
            )
        return link

    def _stack(
        self, checkpoint: Checkpoint, link: Checkpoint, quantize: int | None, here: bool
    ) -> PoEModel:
        config, dtype = checkpoint.config, self.base.resid_lambdas.dtype
        own = {k: v for k, v in checkpoint.weights.items() if link.weights.get(k) is not v}
        own = {k: v for k, v in own.items() if not k.startswith("wte.")}
        plan = within(checkpoint.plan, own)
        if quantize:
            if plan:
                raise RequestError(f"{checkpoint.source.name} is already quantized")
            plan = within(make_plan(config, scheme(quantize)), own)
        model = PoEModel(config)
        if not here:
            NOTHING.strip(model)
            own = {name: tensor for name, tensor in own.items() if NOTHING.holds(name)}
            plan = {}
        fill(model, ((name, checkpoint.read(name)) for name in own), plan, dtype)
        share_base(model, self.base, *self._changed_rows(checkpoint, link))
        return model

    def _changed_rows(self, checkpoint: Checkpoint, link: Checkpoint) -> tuple[list[int], mx.array]:
        """The tokens whose embedding differs from the base's, and their embeddings."""
        dtype = self.base.resid_lambdas.dtype
        if isinstance(self.base.wte, Absent):
            return [], mx.zeros((0, self.base.config.n_embd), dtype)
        theirs, ours = (c.unpacked("wte.weight", dtype) for c in (checkpoint, link))
        count = min(theirs.shape[0], ours.shape[0], checkpoint.config.padded_vocab_size)
        changed = mx.any(theirs[:count] != ours[:count], axis=1).tolist()
        rows = [row for row, differs in enumerate(changed) if differs]  # type: ignore[arg-type]
        values = theirs[mx.array(rows, mx.int32)]
        mx.eval(values)
        return rows, values

"""An upper bound on the memory that a decoding state will need, before it is created.

- in: a model, how long the text may become, a state's options
- out: bytes, never less than `DecodingState.nbytes` will be
- from shapes alone: nothing is computed or allocated
"""

from __future__ import annotations

from collections.abc import Collection

from cognica_mlx.cache.stage_cache import GROWTH, most_rows
from cognica_mlx.decoding.state import FORGET, SLACK, DecodingState
from cognica_mlx.network.model import PoEModel

# Bytes of a token id.
ID = 4


def state_bytes(
    model: PoEModel,
    positions: int,
    *,
    slack: int = SLACK,
    keep_trunk: int = 0,
    pending: int = 0,
    spare: int = 0,
    chunk: int = GROWTH,
    start: DecodingState | None = None,
    aside: Collection[int] = (),
) -> int:
    """The most bytes that a state holds after any text of up to `positions` tokens.

    Drafts count as positions. `slack` and `keep_trunk` are the state's own options. `pending` is
    how many positions may wait before a stage, `spare` how many foreign positions its activations
    may keep in memory (see `DecodingState.compact`), `chunk` how many run at once (activations are
    dropped in the pieces in which they were computed). `start` is the state that the text
    continues. A drafter may hold a second copy of the caches of the stages in `aside`.
    """
    config, itemsize = model.config, model.resid_lambdas.dtype.size
    row = config.n_kv_head * config.head_dim * itemsize
    base, total = len(config.stage_layers), 0
    for k, stage in enumerate(model.stages):
        room, now, behind = _at_start(start, k) if start else (0, 0, 0)
        for window in stage.windows:
            rows = most_rows(window, slack, max(positions, room), row)
            copies = 2 if k in aside else 1
            total += copies * 2 * rows * row  # keys and values
        held = max(slack, pending, keep_trunk if k + 1 == base else 0)
        # What waits runs at once, and its activations are dropped at once.
        held = max(held + max(chunk, FORGET, pending, behind + chunk), now + chunk)
        streams = 3 if stage.layers[-1] >= config.backout_layer else 2
        total += (min(positions, held) + spare) * (streams * config.n_embd * itemsize + ID)
    return total


def _at_start(state: DecodingState, stage: int) -> tuple[int, int, int]:
    """What a state already has at a stage, which does not shrink on a rollback: the rows that its
    buffers have room for, the activations held, and the largest piece of them or of the positions
    that have not gone through the stage."""
    cache = state.caches[stage]
    rows = [array.shape[2] for array in cache.arrays()]
    pieces = [len(hidden) for hidden in state.given[stage].sources()]
    behind = max([*pieces, state.length - cache.offset])
    return max(rows, default=0), sum(pieces), behind

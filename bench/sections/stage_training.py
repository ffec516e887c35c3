"""Training a stage: an iteration over stored activations against one that runs the base.

- in: a setup with a specialist as its model, whose last stage is trained as a new one
- out: seconds of an iteration either way and of an update, and the memory that an iteration needs
- the two alternate; an update (Muon and AdamW) is the same for both and is timed separately
"""

from __future__ import annotations

import tempfile
import time
from functools import partial
from operator import add
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from cognica_mlx.bench.sections.stage_speeds import Figure, Setup, figure
from cognica_mlx.errors import RequestError
from cognica_mlx.training.batches import Batches, Text
from cognica_mlx.training.optimizer import MuonAdamW
from cognica_mlx.training.stage import NewStage, Parameters
from cognica_mlx.training.store import Activations, LiveBase, StoredActivations, write_store

# Short conversations; the second half of each is the reply.
TEXTS, LENGTH = 8, 65
# The released recipe has 65 to 131 thousand tokens per update.
UPDATE_TOKENS = 65536


def training(setup: Setup) -> list[Figure]:
    """All figures of the section. RequestError for a model without a specialist stage."""
    model = setup.model
    if not model.config.specialist_layers:
        raise RequestError("--only training needs a specialist: --shape 1.3b-stage, or --model")
    stage = NewStage(model, model.resid_lambdas.dtype)
    parameters = stage.start(model, seed=0)
    optimizer = MuonAdamW("muon", 1.0, model.config.n_embd, stage.untrained)
    state = optimizer.start(parameters)
    batches = Batches(_texts(model.config.vocab_size), TEXTS, seed=0)
    tokens = TEXTS * (LENGTH - 1)

    def iteration(activations: Activations) -> float:
        """Seconds for activations, loss and gradient."""
        started = time.perf_counter()
        batch = batches[0]
        arrays = (mx.array(part) for part in (batch.rows, batch.targets, batch.weights))
        mx.eval(stage.loss_and_gradient(parameters, activations.read(batch), *arrays))
        return time.perf_counter() - started

    with tempfile.TemporaryDirectory() as folder:
        write_store(Path(folder), model, batches.texts, 16)
        width = model.config.n_embd
        stored = StoredActivations(Path(folder), batches.texts, width, 16, stage.dtype)
        cases = {
            "with a store": partial(iteration, stored),
            "running the base": partial(iteration, LiveBase(model)),
        }
        taken = setup.interleaved(cases, "training")
        # The peak memory of an iteration, in addition to what is held already.
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        iteration(stored)
        peak = mx.get_peak_memory() - before
    gradients = {name: mx.random.normal(array.shape) for name, array in parameters.items()}
    mx.eval(gradients)
    started = time.perf_counter()
    mx.eval(optimizer.update(parameters, gradients, state, 0.01))
    update = time.perf_counter() - started
    # An update's share of an iteration, with as many tokens per update as the released models had.
    share = update * tokens / UPDATE_TOKENS
    notes = {"positions": tokens, "counted": int(tokens / 2)}
    found = []
    for label, extra in (("an iteration", 0.0), ("the same with its share of an update,", share)):
        ways = {f"{label} {name}": one.each(partial(add, extra)) for name, one in taken.items()}
        live = ways[f"{label} running the base"]
        found += [
            figure("training", name, "s", samples, baseline=live, notes=notes)
            for name, samples in ways.items()
        ]
    held = stage.nbytes + sum(a.nbytes for part in (parameters, state) for a in part.values())
    sizes = {
        "memory of an iteration with a store: weights and optimizer": held,
        "the same: gradients and activations": peak,
        "the base's weights, which are not in it": _base_bytes(setup, stage),
    }
    found.append(figure("training", "an update", "s", update))
    return found + [figure("training", name, "GB", size / 1e9) for name, size in sizes.items()]


def _texts(vocab_size: int) -> list[Text]:
    random = np.random.default_rng(0)
    counted = np.arange(LENGTH) > LENGTH // 2
    return [
        Text(random.integers(0, vocab_size, LENGTH).astype(np.int32), counted, int(counted.sum()))
        for _ in range(TEXTS)
    ]


def _base_bytes(setup: Setup, stage: NewStage) -> int:
    """Bytes of the model without the trained stage and without the heads."""
    parameters: Parameters = dict(tree_flatten(setup.model.parameters()))
    own = tuple(f"h.{i}." for i in stage.layers)
    last = f"lm_head_specialists.{len(setup.model.config.specialist_layers) - 1}."
    below = sum(a.nbytes for name, a in parameters.items() if not name.startswith((*own, last)))
    return below - stage.nbytes

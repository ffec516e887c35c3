"""A plot of a run's losses by iteration."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cognica_mlx.files import whole_file
from cognica_mlx.training.trainer import Evaluation

TRAIN, VALID, BEST = "#bbbbbb", "#4c78a8", "#e45756"


def plot(curve: Sequence[Evaluation], best: Evaluation, path: Path) -> None:
    """Plot a run's evaluations into a file; its suffix gives the type.

    Needs matplotlib (the extra `plot`). Raises ValueError for an unknown type.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawing, axis = pyplot.subplots(figsize=(6.4, 3.6))
    trained = {e.iteration: e.train_loss for e in curve if e.train_loss is not None}
    axis.plot(list(trained), list(trained.values()), ".-", color=TRAIN)
    axis.plot([e.iteration for e in curve], [e.valid_loss for e in curve], ".-", color=VALID)
    axis.plot([best.iteration], [best.valid_loss], "o", color=BEST)
    axis.set_yscale("log")
    axis.set_xlabel("iteration")
    axis.set_ylabel("nats per counted token")
    axis.legend(["training", "validation", f"kept: {best.valid_loss:.4f}"], frameon=False)
    drawing.tight_layout()
    with whole_file.replacing(path, path.suffix) as temporary:
        drawing.savefig(temporary, dpi=150)
    pyplot.close(drawing)

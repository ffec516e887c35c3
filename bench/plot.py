"""A plot of a run: latency by stage against the bandwidth limit, speed-up by mode."""

from __future__ import annotations

from pathlib import Path

from cognica_mlx.bench.report import Report

INK, BAR, LIMIT, PREDICTED = "#333333", "#4c78a8", "#bbbbbb", "#e45756"


def plot(report: Report, path: Path) -> None:
    """Plot the run's figures for stages and modes. Needs matplotlib (the extra `plot`)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    stages = [figure for figure in report.figures if figure.section == "stages"]
    modes = [figure for figure in report.figures if figure.section == "modes"]
    widths = [width for width, shown in ((5.6, stages), (9.0, modes)) if shown]
    size = sum(widths), 3.0 + 0.12 * len(modes)
    drawing, axes = pyplot.subplots(
        1, len(widths), figsize=size, squeeze=False, width_ratios=widths
    )
    free = iter(axes[0])
    if stages:
        axis = next(free)
        names = [figure.name.replace(" (", "\n(") for figure in stages]
        values = [figure.value for figure in stages]
        spread = list(zip(*((f.value - f.low, f.high - f.value) for f in stages), strict=True))
        axis.bar(names, values, color=BAR, yerr=spread, ecolor=INK, label="measured")
        limits = [figure.limit or 0 for figure in stages]
        axis.bar(names, limits, color=LIMIT, width=0.5, label="limit by memory bandwidth")
        for at, figure in enumerate(stages):
            axis.annotate(f"{figure.speedup:.2f}x", (at, figure.high), ha="center", va="bottom")
        axis.set_ylabel("ms per token")
        axis.set_title("Latency by stage cut-off")
        axis.margins(y=0.12)
        axis.tick_params(axis="x", labelsize=8)
        axis.legend(loc="upper left", frameon=False)
    if modes:
        axis = next(free)
        names = [figure.name for figure in modes][::-1]
        axis.barh(names, [figure.speedup or 0 for figure in modes][::-1], color=BAR)
        for at, figure in enumerate(reversed(modes)):
            agreement = float(figure.notes["agreement"])
            right = max(figure.speedup or 0, figure.predicted or 0)
            label = f" {figure.speedup:.2f}x, {agreement:.0%} as full"
            axis.annotate(label, (right, at), va="center", fontsize=8)
            if figure.predicted:
                axis.plot([figure.predicted], [at], "|", color=PREDICTED, markersize=14)
        axis.axvline(1, color=INK, linewidth=0.8)
        axis.set_xlabel("speed, full depth = 1; red: as its parts predict")
        axis.set_title("Decoding modes, greedy")
        axis.margins(x=0.4)
    where = f"{report.machine.processor}, {report.machine.back_end}"
    drawing.suptitle(f"{report.model}, {report.dtype}\n{where}", fontsize=9)
    drawing.tight_layout()
    drawing.savefig(path, dpi=150)
    pyplot.close(drawing)

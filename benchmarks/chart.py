"""The chart of the cost of a step against the number of parameters."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from timing import Ratios

Curve = tuple[list[float], list[Ratios]]
COLORS = ("#1b6ca8", "#2a9d8f", "#d1495b", "#8d6b94")
TICKS = (1, 1.5, 2, 3, 4, 6, 8, 12, 16)


def save(path: Path, curves: Mapping[str, Curve]) -> None:
    """Saves the chart.

    Arguments:
        path: The file.
        curves: The numbers of parameters and the ratios, by title. The band of a curve is from the
            least ratio to the largest.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
    for color, (title, (sizes, ratios)) in zip(COLORS, curves.items(), strict=False):
        low, high = [min(r.values) for r in ratios], [max(r.values) for r in ratios]
        axes.fill_between(sizes, low, high, color=color, alpha=0.12, linewidth=0)
        medians = [r.median for r in ratios]
        axes.plot(sizes, medians, color=color, marker="o", markersize=3.5, label=title)
    axes.axhline(1, color="0.4", linewidth=0.8, linestyle=(0, (4, 3)), label="plain net")
    axes.set_xscale("log")
    axes.set_yscale("log")
    bottom, top = axes.get_ylim()
    ticks = [tick for tick in TICKS if tick <= 1.05 * top]
    axes.set_yticks(ticks, [f"{tick:g}×" for tick in ticks])
    axes.set_yticks([], minor=True)
    axes.set_ylim(min(bottom, 0.9), 1.05 * top)
    axes.set_xlabel("parameters D")
    axes.set_ylabel("time of a step / plain net's")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=120)
    plt.close(figure)

"""Draws the picture of the first page, from the code of that page."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from pyro_bayes.evaluation import plots

FOLDER = Path(__file__).parent
COLORS = {"light": ("#222222", "#0072B2"), "dark": ("#dddddd", "#56B4E9")}


def draw(scope: dict[str, Any], folder: Path) -> None:
    """Draws the picture for both modes of the page.

    Arguments:
        scope: What the page's code has computed.
        folder: Where to write the files.
    """
    for mode, (color, band) in COLORS.items():
        style = dict.fromkeys(
            ("axes.edgecolor", "axes.labelcolor", "text.color", "xtick.color", "ytick.color"), color
        )
        # Files are the same each time.
        with matplotlib.rc_context({**style, "svg.hashsalt": "pyro_bayes", "font.size": 9}):
            ax = Figure(figsize=(6, 3.2), layout="constrained").add_subplot()
            ax.spines[["top", "right"]].set_visible(False)
            plots.regression_band(scope["grid"], scope["predictive"], ax=ax)
            for artist in (*ax.collections, *ax.lines):
                artist.set_color(band)
            ax.plot(scope["x"], scope["y"], ".", color=color, markersize=3, label="data")
            ax.set(ylim=(-4, 4))
            ax.legend(frameon=False, loc="upper right", markerscale=2)
            path = folder / f"regression-{mode}.svg"
            ax.figure.savefig(path, transparent=True, metadata={"Date": None})


if __name__ == "__main__":
    scope: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", (FOLDER / "index.md").read_text(), re.DOTALL):
        exec(block, scope)
    draw(scope, FOLDER / "_static")

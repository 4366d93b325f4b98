"""Draws the pictures of the first page and of the page on priors, from the code of these pages."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.distributions import Normal

from pyro_bayes import BayesianModel
from pyro_bayes.evaluation import plots
from pyro_bayes.priors.hierarchical import HierarchicalPrior

FOLDER = Path(__file__).parent
COLORS = {"light": ("#222222", "#0072B2"), "dark": ("#dddddd", "#56B4E9")}


@contextmanager
def style(color: str, size: float) -> Iterator[None]:
    """Sets the colour and the size of text; files are the same each time.

    Arguments:
        color: The colour of text and axes.
        size: The size of text.
    """
    names = "axes.edgecolor", "axes.labelcolor", "text.color", "xtick.color", "ytick.color"
    fixed = {"svg.hashsalt": "pyro_bayes", "font.size": size}
    with matplotlib.rc_context({**dict.fromkeys(names, color), **fixed}):
        yield


def draw(scope: dict[str, Any], folder: Path) -> None:
    """Draws the picture of the first page, for both modes.

    Arguments:
        scope: What the page's code has computed.
        folder: Where to write the files.
    """
    for mode, (color, band) in COLORS.items():
        with style(color, 9):
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


def draw_priors(scope: dict[str, Any], folder: Path) -> None:
    """Draws the picture of the page on priors, for both modes.

    Arguments:
        scope: What the page's code has computed.
        folder: Where to write the files.
    """
    t = torch.linspace(-3, 3, 121)
    models = {k: BayesianModel(scope["pretrained"], prior=p) for k, p in scope["pictured"].items()}
    torch.manual_seed(0)
    densities = {label: density(bnn, "2.weight", t) for label, bnn in models.items()}
    for mode, (color, band) in COLORS.items():
        torch.manual_seed(0)
        with style(color, 7):
            figure = Figure(figsize=(7.2, 6.4), layout="constrained")
            axes = figure.subplots(4, 4)
            for i, (label, bnn) in enumerate(models.items()):
                upper, lower = axes[i // 4 * 2 : i // 4 * 2 + 2, i % 4]
                upper.plot(t, Normal(0.0, 1.0).log_prob(t).exp(), "--", color=color, linewidth=0.8)
                upper.plot(t, densities[label], color=band, linewidth=1.5)
                upper.set(title=label, yscale="log", ylim=(2e-3, 2e1), xlim=(-3, 3))
                upper.minorticks_off()
                plots.prior_predictive(bnn, torch.linspace(-3, 3, 61).unsqueeze(-1), ax=lower)
                for artist in (*lower.collections, *lower.lines):
                    artist.set_color(band)
                for ax, what in ((upper, "density"), (lower, "output")):
                    ax.spines[["top", "right"]].set_visible(False)
                    ax.set(xlabel="", ylabel=what if i % 4 == 0 else "")
            path = folder / f"priors-{mode}.svg"
            figure.savefig(path, transparent=True, metadata={"Date": None})


def density(bnn: BayesianModel, name: str, values: Tensor) -> Tensor:
    """Returns the density of a parameter's first element under the prior.

    Arguments:
        bnn: The model.
        name: The name of the parameter.
        values: Where it is wanted.
    """
    rule = bnn.guide.priors.rules[name]
    everywhere = values.reshape(-1, *[1] * len(rule.shape)).expand(-1, *rule.shape)
    # A random deviation is drawn anew each time.
    count = 2000 if isinstance(rule, HierarchicalPrior) else 1
    draws = [rule.elements(torch.zeros(())).log_prob(everywhere).exp() for _ in range(count)]
    return torch.stack(draws).mean(0).flatten(1)[:, 0]


def scope_of(page: str) -> dict[str, Any]:
    """Returns what the first block of a page's code computes, or all of the first page.

    Arguments:
        page: The name of the page.
    """
    scope: dict[str, Any] = {}
    blocks = re.findall(r"```python\n(.*?)```", (FOLDER / page).read_text(), re.DOTALL)
    for block in blocks if page == "index.md" else blocks[:1]:
        exec(block, scope)
    return scope


if __name__ == "__main__":
    draw(scope_of("index.md"), FOLDER / "_static")
    draw_priors(scope_of("priors.md"), FOLDER / "_static")

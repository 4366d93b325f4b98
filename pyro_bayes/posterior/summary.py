"""What a model consists of, parameter by parameter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from pyro_bayes.base.selection import Choice
from pyro_bayes.base.tables import print_table


@dataclass(frozen=True)
class Row:
    r"""One parameter.

    Arguments:
        parameter: The dotted name, with the further names of a tied parameter.
        shape: The shape.
        included: Whether the parameter is Bayesian.
        why: The pattern that decided, or why no pattern could, and how many elements are fixed
            because they carry no information.
        prior: The prior, or whether a deterministic parameter trains.
        divergence: Whether the divergence from the prior is `"exact"` or a `"Monte Carlo"`
            estimate; empty if the parameter is not included.
        signal: The current mean of :math:`|\mu| / \sigma` over the elements; `None` if none is
            random.
        noise: What an estimator reached in a forward pass; `None` if none was made.
        count: How many elements are random.
    """

    parameter: str
    shape: tuple[int, ...]
    included: bool
    why: str
    prior: str
    signal: float | None
    noise: str | None = None
    count: int = 0
    divergence: str = ""


_HEADERS = ("parameter", "shape", "included", "why", "prior", "KL", "mean |μ|/σ")


class Summary:
    """A table of parameters.

    Arguments:
        title: The line above the table.
        rows: One row per parameter.
        note: The line below the table, if there is one.
    """

    def __init__(self, title: str, rows: Sequence[Row], note: str | None = None) -> None:
        self.title = title
        self.rows = tuple(rows)
        self.note = note

    def print(self) -> None:
        """Prints the table.

        Raises:
            ImportError: If the extra `rich` is not installed.
        """
        with_noise = any(row.noise for row in self.rows)
        rows = []
        for row in self.rows:
            signal = "" if row.signal is None else f"{row.signal:.3g}"
            included = "yes" if row.included else "no"
            shape = "×".join(map(str, row.shape)) or "()"
            noise = [row.noise or ""] if with_noise else []
            prior = row.prior, row.divergence
            rows.append([row.parameter, shape, included, row.why, *prior, signal, *noise])
        headers = [*_HEADERS, "noise"] if with_noise else _HEADERS
        print_table(self.title, headers, rows, right=_HEADERS[-1:])
        if self.note is not None:
            print(self.note)

    def __repr__(self) -> str:
        included = sum(row.included for row in self.rows)
        return f"Summary({len(self.rows)} parameters, {included} included)"


def summarize(
    title: str,
    store_name: str,
    choices: Sequence[Choice],
    parameters: Mapping[str, nn.Parameter],
    posterior: Mapping[str, tuple[Tensor, Tensor]],
    describe: Callable[[str], tuple[str, str]],
    uses: Mapping[str, Sequence[str]] | None,
    note: str | None,
) -> Summary:
    r"""Prints a table of a model's parameters, and returns it.

    Arguments:
        title: What the model is.
        store_name: Its name in Pyro's param store.
        choices: What selection decided about each parameter.
        parameters: The parameters by name.
        posterior: The means and log-variances of those that are included; an element whose
            log-variance is :math:`-\infty` is fixed.
        describe: Returns the prior of a parameter, and how its divergence is computed, in words.
        uses: What became of each parameter in a forward pass, if one was made.
        note: What else is to be known.
    """
    rows = []
    for choice in choices:
        signal, noise, count = None, None if uses is None else "deterministic", 0
        divergence = ""
        why = choice.reason
        parameter = parameters[choice.name]
        prior = "none, trains" if parameter.requires_grad else "none, fixed"
        if choice.included:
            mean, logvar = (p.detach() for p in posterior[choice.name])
            free = ~logvar.isneginf()
            count = int(free.sum())
            if count < free.numel():
                why += f", {free.numel() - count} elements fixed"
                mean, logvar = mean[free], logvar[free]
            signal = (mean.abs() * (-0.5 * logvar).exp()).mean().item() if count else None
            prior, divergence = describe(choice.name)
            noise = None if uses is None else "; ".join(uses.get(choice.name, ["not used"]))
        name = " = ".join((choice.name, *choice.aliases))
        shape = tuple(parameter.shape)
        row = Row(name, shape, choice.included, why, prior, signal, noise, count, divergence)
        rows.append(row)
    contents = (
        f"{sum(row.count for row in rows)} Bayesian parameters, '{store_name}' in the param store"
    )
    summary = Summary(f"{title}: {contents}", rows, note)
    summary.print()
    return summary

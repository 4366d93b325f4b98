"""Diagnostics: whether a posterior is learned, and how well its gradient is known."""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from pyro_bayes.base.checks import check_count
from pyro_bayes.base.state import undisturbed
from pyro_bayes.base.tables import text_table
from pyro_bayes.model import BayesianModel
from pyro_bayes.prediction.batches import Batches
from pyro_bayes.training.objective import ELBO

_NEAR = 0.02  # of log σ²: a change of σ by 1 %
_QUICK = -5.0  # the log σ² to start from where the default of -9 takes too long
_FEW = 10  # elements, whose means may all pass through 0 at once while they train
_ADVICE = (
    "Where the prior pulls harder than the data, a wider one lets go: prior_var=1, or a larger"
    " `least` of Empirical. A network with fewer weights, or fewer that are random"
    " (include_params), helps too."
)
_HEADERS = ("parameter", "SNR ∇μ", "SNR ∇log σ²", "σ unmoved", "KL nats")


@dataclass(frozen=True)
class Row:
    r"""One parameter.

    Arguments:
        parameter: The dotted name.
        signal_mean: The signal-to-noise ratio of the gradient of :math:`\mu`, or of the parameter
            itself if it is deterministic.
        signal_logvar: That of the gradient of :math:`\log \sigma^2`; `None` if deterministic.
        unmoved: The share of the :math:`\sigma` that are within 1 % of their initial value; `None`
            if none is random.
        kl: The KL divergence in nats; `None` if deterministic.
    """

    parameter: str
    signal_mean: float
    signal_logvar: float | None = None
    unmoved: float | None = None
    kl: float | None = None


@dataclass(frozen=True)
class Diagnosis:
    """What :func:`diagnose` found. Printed, it is a table with advice below.

    Arguments:
        rows: One row per parameter.
        kl: The KL divergence of the whole posterior in nats.
        num_data: The number of examples.
        unmoved: The share of all deviations that are within 1 % of their initial value.
        advice: What seems wrong, in words.
    """

    rows: tuple[Row, ...]
    kl: float
    num_data: int
    unmoved: float
    advice: tuple[str, ...]

    def __str__(self) -> str:
        cells = [
            (
                row.parameter,
                f"{row.signal_mean:.2g}",
                "" if row.signal_logvar is None else f"{row.signal_logvar:.2g}",
                "" if row.unmoved is None else f"{row.unmoved:.0%}",
                "" if row.kl is None else f"{row.kl:.4g}",
            )
            for row in self.rows
        ]
        total = (
            f"KL: {self.kl:.4g} nats against N = {self.num_data}, {self.kl / self.num_data:.4g} per"
            " datum"
        )
        return "\n".join((text_table(_HEADERS, cells, right=_HEADERS[1:]), total, *self.advice))


def diagnose(objective: ELBO, loader: Iterable[Any], num_gradients: int = 100) -> Diagnosis:
    r"""Looks at the posterior and at the gradient that trains it.

    The signal-to-noise ratio of a gradient :math:`g` is that over steps of a training that stands
    still: batches of the loader, and draws of the weights,

    .. math:: \text{SNR}^2 = \frac{\| \mathbb{E}[g] \|^2}{\operatorname{tr} \operatorname{Var}[g]}

    estimated without the bias that noise adds to the numerator. Where it is small, about
    :math:`1 / \text{SNR}^2` steps pass before a parameter goes its way, as it must be near an
    optimum. The objective is as before in the end: parameters, gradients, buffers, and torch's
    random numbers.

    Arguments:
        objective: The objective. It is evaluated in the mode it is in.
        loader: Gives batches (x, y), as for :func:`pyro_bayes.fit`.
        num_gradients: The number of gradients, at least 2. The loader starts anew as often as
            needed.

    Returns:
        The ratios, the share of deviations that never moved from their start, and the KL
        divergence in nats, with advice in words.

    Raises:
        ValueError: If `num_gradients` is less than 2, or a batch cannot be used.
        TypeError: If a batch is no pair.

    References:
        | Tighter Variational Bounds are Not Necessarily Better (Rainforth et al., 2018)
        | https://arxiv.org/abs/1802.04537

    Example:
        >>> from torch import nn
        >>> from pyro_bayes import BayesianModel, likelihoods
        >>> objective = ELBO(BayesianModel(nn.Linear(2, 1)), likelihoods.Gaussian(0.1), num_data=8)
        >>> diagnosis = diagnose(objective, [(torch.ones(8, 2), torch.ones(8, 1))])
        >>> diagnosis.unmoved
        1.0
        >>> print(diagnosis)  # doctest: +ELLIPSIS
        parameter ...
    """
    check_count("num_gradients", num_gradients, least=2)
    device = next(objective.parameters()).device
    batches = Batches(loader, name="loader", num_data=objective.num_data, device=device)
    trained = {name: p for name, p in objective.named_parameters() if p.requires_grad}
    moments: dict[str, _Moments] = defaultdict(_Moments)
    with undisturbed(objective), torch.enable_grad():
        endless = (batch for _ in range(int(num_gradients)) for batch in batches)
        for batch in islice(endless, int(num_gradients)):
            loss = objective(*batch)
            gradients = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
            for (key, parameter), gradient in zip(trained.items(), gradients, strict=True):
                value = torch.zeros_like(parameter) if gradient is None else gradient
                for name, part in objective.parts(key, value).items():
                    moments[name].add(part)
    signals = {name: moment.ratio() for name, moment in moments.items()}
    model = objective.model
    posterior = model.guide.posterior()
    with torch.no_grad():
        divergences = model.kl_divergences()
    rows = []
    for name in posterior:
        mean, logvar = (f"model.guide.{kind}.{name}" for kind in ("means", "logvars"))
        near, size = _unmoved(model, name)
        share = near / size if size else None
        kl = float(divergences[name])
        rows.append(Row(name, signals.pop(mean, 0.0), signals.pop(logvar, 0.0), share, kl))
    rows += [Row(name.removeprefix("model.base."), signal) for name, signal in signals.items()]
    kl, share = sum(float(value) for value in divergences.values()), unmoved(model)
    advice = _still(share, model), _as_prior(kl) or _silenced(silent(model))
    return Diagnosis(tuple(rows), kl, objective.num_data, share, tuple(a for a in advice if a))


def unmoved(model: BayesianModel) -> float:
    """Returns the share of all deviations that are within 1 % of their initial value.

    Arguments:
        model: The model.
    """
    pairs = [_unmoved(model, name) for name in model.guide.sites.values()]
    return sum(near for near, _ in pairs) / max(sum(size for _, size in pairs), 1)


def warn_if_unmoved(model: BayesianModel, epochs: int) -> None:
    """Warns if most deviations are still at their initial value after a training.

    Arguments:
        model: The model.
        epochs: How many epochs it took.
    """
    advice = _still(unmoved(model), model)
    if advice:
        warnings.warn(f"After {epochs} epochs: {advice}", UserWarning, stacklevel=3)


def silent(model: BayesianModel) -> tuple[str, ...]:
    r"""Returns the names of the weights of which no output has more signal than noise.

    An output :math:`\sum_i w_i x_i` has the mean :math:`\sum_i \mu_i x_i` and the variance
    :math:`\sum_i \sigma_i^2 x_i^2`. By the Cauchy-Schwarz inequality,

    .. math:: \frac{(\sum_i \mu_i x_i)^2}{\sum_i \sigma_i^2 x_i^2}
              \le \sum_i \frac{\mu_i^2}{\sigma_i^2}

    for any input. Tensors of one dimension, such as biases, and those with few elements that are
    random are left out: a network does without the former, and what is noise for a moment may be on
    its way through 0.

    Arguments:
        model: The model.
    """
    names = []
    for name, (mean, logvar) in model.guide.posterior().items():
        if mean.dim() < 2 or mean.numel() < _FEW:
            continue
        mean, logvar = mean.detach(), logvar.detach()
        ratios = mean.square() * (-logvar).exp()
        if ratios.flatten(1).nansum(1).max() < 1 and logvar.isfinite().sum() >= _FEW:
            names.append(name)
    return tuple(names)


def warn_if_silenced(names: Sequence[str], epochs: int) -> None:
    """Warns if a training has silenced weights.

    Arguments:
        names: Their names.
        epochs: How many epochs it took.
    """
    advice = _silenced(names)
    if advice:
        warnings.warn(f"After {epochs} epochs: {advice}", UserWarning, stacklevel=5)


class _Moments:
    """The mean of gradients, and the trace of their covariance."""

    def __init__(self) -> None:
        self._count = 0
        self._mean = torch.zeros(())
        self._squares = 0.0

    def add(self, gradient: Tensor) -> None:
        self._count += 1
        self._mean = self._mean if self._count > 1 else torch.zeros_like(gradient)
        change = gradient - self._mean
        self._mean += change / self._count
        self._squares += float((change * (gradient - self._mean)).sum())

    def ratio(self) -> float:
        variance = self._squares / (self._count - 1)
        # The mean of gradients has a variance of its own, which adds to its square.
        signal = max(float(self._mean.square().sum()) - variance / self._count, 0.0)
        if variance == 0:
            return math.inf if signal > 0 else 0.0
        return math.sqrt(signal / variance)


def _unmoved(model: BayesianModel, name: str) -> tuple[int, int]:
    """Returns how many deviations are near their initial value, and how many there are."""
    logvar = model.guide.posterior()[name][1].detach()
    near = (logvar - model.init_logvar).abs() < _NEAR
    return int(near.sum()), logvar.numel() - int(logvar.isneginf().sum())


def _still(share: float, model: BayesianModel) -> str | None:
    if share <= 0.5:
        return None
    low = model.init_logvar < _QUICK
    nearer = f", or start nearer, as BayesianModel(net, init_logvar={_QUICK})" if low else ""
    return (
        f"{share:.0%} of the posterior's deviations are within 1 % of their initial value,"
        f" init_logvar={model.init_logvar:g}, so that the uncertainty is not learned. Train for"
        f" longer or with a higher learning rate{nearer}."
    )


def _as_prior(kl: float) -> str | None:
    if kl >= 1:
        return None
    return (
        f"The posterior is the prior, with a KL divergence of {kl:.2g} nats: the model has learned"
        f" nothing from the data. Is num_data right? {_ADVICE} After update_prior(), this is where"
        " training starts."
    )


def _silenced(names: Sequence[str]) -> str | None:
    if not names:
        return None
    return (
        f"The posterior of {list(names)} has collapsed: whatever the input, each output has more"
        " noise than signal, Σ μ²/σ² < 1. So what passes through it is lost, and a network without"
        f" a way around it predicts a constant. Is num_data right? {_ADVICE}"
    )

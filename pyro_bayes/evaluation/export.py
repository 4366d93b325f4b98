"""Export to ArviZ."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_bayes.base.checks import check_type
from pyro_bayes.base.extras import require
from pyro_bayes.base.selection import select
from pyro_bayes.base.state import draw_seed, evaluating, seeded
from pyro_bayes.evaluation.passes import Draws, joined, log_probs
from pyro_bayes.likelihoods import Likelihood
from pyro_bayes.likelihoods.predictive import Predictive
from pyro_bayes.model import BayesianModel


def to_arviz(
    bnn: BayesianModel,
    num_samples: int = 500,
    *,
    likelihood: Likelihood | None = None,
    loader: Iterable[Any] | None = None,
    include_params: str | Sequence[str] = ("",),
    chunk_size: int | None = None,
    generator: torch.Generator | None = None,
) -> Any:
    r"""Exports draws from the posterior, and what they predict, to ArviZ.

    The group `posterior` has one chain of draws, a variable per parameter under its dotted name.
    With a likelihood and examples, `observed_data` has their targets `y`, `posterior_predictive`
    one sample of each target from each draw, and `log_likelihood` the log-density of each target
    under each draw, with a dimension `example`. All groups have the same draws, and the base is in
    evaluation mode meanwhile.

    Warning:
        Leave-one-out cross-validation (`arviz.loo`) weighs draws as if they came from the exact
        posterior. These come from :math:`q(\theta)`: judge it by its Pareto :math:`k`, and trust
        examples that were held out more (:func:`~pyro_bayes.evaluate`). The draws are
        independent, so effective sample sizes are about their number, and say nothing about how
        close :math:`q` is.

    Arguments:
        bnn: The model.
        num_samples: The number :math:`S` of draws.
        likelihood: The likelihood that it was trained with.
        loader: Batches of pairs :math:`(x, y)`, as in :func:`~pyro_bayes.evaluate`.
        include_params: Patterns of parameters to export, as in :class:`~pyro_bayes.BayesianModel`;
            by default, all that are Bayesian.
        chunk_size: How many draws to evaluate at once.
        generator: Where the seed comes from, torch's global generator by default.

    Returns:
        The data structure of the ArviZ that is installed, an :class:`xarray.DataTree` from
        version 1 on, an :class:`arviz.InferenceData` before.

    Raises:
        ImportError: If the extra `arviz` is not installed.
        TypeError: If an argument is of the wrong type, or batches are not pairs.
        ValueError: If an argument is out of range, a pattern matches nothing that is Bayesian,
            there is a likelihood without a loader or the other way round, or a target does not fit.

    References:
        | ArviZ: A Unified Library for Exploratory Analysis of Bayesian Models (Kumar et al., 2019)
        | https://doi.org/10.21105/joss.01143

    Example:
        >>> from pyro_bayes.likelihoods import Gaussian
        >>> bnn = BayesianModel(torch.nn.Linear(3, 1))
        >>> loader = [(torch.randn(5, 3), torch.randn(5, 1))]
        >>> data = to_arviz(bnn, 100, likelihood=Gaussian(0.1), loader=loader)
        >>> dict(data["posterior"].sizes)
        {'chain': 1, 'draw': 100, 'weight_dim_0': 1, 'weight_dim_1': 3, 'bias_dim_0': 1}
    """
    require("arviz", extra="arviz")
    if (likelihood is None) != (loader is None):
        missing = "likelihood" if likelihood is None else "loader"
        raise ValueError(f"Expected likelihood and loader together; got no {missing}.")
    draws = Draws(bnn, num_samples, chunk_size=chunk_size, generator=generator)
    posterior = bnn.guide.posterior()
    choices = select(bnn.base, include_params, (), frozen=True)
    names = [c.name for c in choices if c.included and c.name in posterior]
    if not names:
        raise ValueError(
            f"Expected include_params to match Bayesian parameters; got {include_params!r}, which"
            " matches deterministic ones only."
        )

    def chosen(base: torch.nn.Module) -> dict[str, Tensor]:
        parameters = dict(base.named_parameters())
        return {name: parameters[name] for name in names}

    groups: dict[str, dict[str, Any]] = {}
    values = bnn.predict(
        chosen,
        num_samples,
        statistics="samples",
        chunk_size=chunk_size,
        generator=draws.generator(),
    ).samples
    groups["posterior"] = {name: _chain(value) for name, value in values.items()}
    if likelihood is not None and loader is not None:
        check_type("likelihood", likelihood, Likelihood)
        with evaluating(bnn.base):
            pairs = draws.of_pairs(likelihood, loader)
            records = joined("loader", (_of_batch(p, y, draws.noise) for p, y in pairs))
        groups["posterior_predictive"] = {"y": _chain(records["sample"])}
        groups["log_likelihood"] = {"y": _chain(records["log_prob"])}
        groups["observed_data"] = {"y": _array(records["y"][0])}
    return _packed(groups)


def _of_batch(predictive: Predictive, y: Tensor, noise: torch.Generator) -> dict[str, Tensor]:
    _, log_prob = log_probs(predictive, y)
    with seeded(draw_seed(noise)):
        sample = predictive.mixture.sample()
    if not y.is_floating_point():  # ArviZ plots integers otherwise than real numbers
        sample = sample.to(y.dtype)
    return {"y": y.unsqueeze(0), "sample": sample, "log_prob": log_prob}


def _chain(values: Tensor) -> Any:
    """Returns draws as the one chain that they are."""
    return _array(values.unsqueeze(0))


def _array(values: Tensor) -> Any:
    if values.is_floating_point():  # numpy has no bfloat16
        values = values.to(torch.promote_types(values.dtype, torch.float32))
    return values.cpu().numpy()


def _packed(groups: dict[str, dict[str, Any]]) -> Any:
    import arviz

    from pyro_bayes import __version__

    from_dict: Any = arviz.from_dict
    nested = int(arviz.__version__.partition(".")[0]) >= 1
    dims = {"y": ["example"]}
    data = from_dict(groups, dims=dims) if nested else from_dict(**groups, dims=dims)
    for group in groups:
        data[group].attrs.update(
            inference_library="pyro_bayes", inference_library_version=__version__
        )
    return data

"""Evaluation: one pass over the examples, one table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_bayes.base.checks import check_count, check_levels, check_type
from pyro_bayes.base.extras import require
from pyro_bayes.base.state import evaluating
from pyro_bayes.evaluation import metrics
from pyro_bayes.evaluation.bootstrap import Bootstrap
from pyro_bayes.evaluation.passes import Draws, Records, joined
from pyro_bayes.evaluation.records import score, uncertainties
from pyro_bayes.evaluation.result import Evaluation, Row
from pyro_bayes.likelihoods import Likelihood
from pyro_bayes.prediction.predict import Predictor

_REPLICATES = 50


class Metric(NamedTuple):
    """How a metric is computed.

    Arguments:
        needs: The names of the records that it needs.
        compute: A function of these, of all examples at once.
    """

    needs: tuple[str, ...]
    compute: Callable[..., Tensor]


def evaluate(
    bnn: Predictor,
    likelihood: Likelihood,
    loader: Iterable[Any],
    num_samples: int = 100,
    *,
    ood: Iterable[Any] | None = None,
    levels: float | Sequence[float] = (0.5, 0.9),
    bins: int = 15,
    chunk_size: int | None = None,
    generator: torch.Generator | None = None,
) -> Evaluation:
    r"""Scores the predictions of a model on examples that it was not trained on.

    The prediction is :class:`~pyro_bayes.likelihoods.predictive.Predictive`, the even mixture over
    draws from the posterior. All batches meet the same draws, and the base is in evaluation mode
    meanwhile.

    Of every likelihood:

    - `nll`: the mean negative log-density or log-probability of a target, in nats.

    Of classes (:class:`~pyro_bayes.likelihoods.Categorical`,
    :class:`~pyro_bayes.likelihoods.Bernoulli`):

    - `accuracy`: the share of targets whose predicted probability is the largest.
    - `brier`: the mean of :func:`~pyro_bayes.evaluation.metrics.brier_score`, from 0 to 2.
    - `ece`, `adaptive_ece`: the expected calibration error of the predicted class, in bins of
      equal width and of equal numbers of examples.

    Of numbers:

    - `rmse`: the root mean squared error of the predictive mean, in the unit of the target.
    - `crps`: the mean continuous ranked probability score, in the unit of the target: in closed
      form for Gaussian likelihoods, else from one sample per draw, without bias.
    - `pit_deviation`: how far the predictive distribution function at the targets is from uniform,
      as :func:`~pyro_bayes.evaluation.metrics.pit_deviation`. Within a step of it, as counts have,
      its value is random. Of flows, it is the rank among one sample per draw.
    - `coverage@…`, `width@…`: how often the central interval of that probability holds the target,
      and its mean width. An interval of counts covers more than its probability.

    With `ood`, of every likelihood:

    - `auroc_total`, `auroc_aleatoric`, `auroc_epistemic`: how well each uncertainty tells examples
      out of distribution from the others. Of classes, they are the entropy, the expected entropy
      and the mutual information; of numbers, variances.

    A target of several elements counts each of them, except that `nll` is of the whole and
    uncertainties are sums. Elements without a label (`Categorical(ignore_index=…)`) count in none
    but the sums, and examples without any are left out.

    Each value has two standard errors. The Monte Carlo error, over draws, falls with `num_samples`:
    draws are shared by all examples, so their errors do not average out. The other one is over
    examples, and falls with their number. Each is the deviation over 50 :class:`bootstrap
    <pyro_bayes.evaluation.bootstrap.Bootstrap>` replicates, and itself accurate to about 10 %.
    Neither is the uncertainty of training: another seed gives another posterior. For the former,
    some 2 kB per example are kept.

    Arguments:
        bnn: The model.
        likelihood: The likelihood that it was trained with.
        loader: Batches of pairs :math:`(x, y)`, such as a data loader, or `[(x, y)]` for one batch.
            There, x is a tensor, a tuple of positional arguments or a dictionary of keyword
            arguments of the base. They are moved to the device of the model.
        num_samples: The number :math:`S` of draws, at least 2.
        ood: Batches out of distribution, of pairs :math:`(x, y)` whose y is left out, or of x.
        levels: The probabilities of intervals; `()` for none.
        bins: The number of bins of calibration errors.
        chunk_size: How many draws to evaluate at once, as in
            :meth:`pyro_bayes.BayesianModel.predict`.
        generator: Where the seed comes from, torch's global generator by default.

    Returns:
        The table, a mapping from names to values. Its `examples` are what figures are drawn from.

    Raises:
        ImportError: If the extra `metrics` is not installed.
        TypeError: If an argument is of the wrong type, or batches are not pairs.
        ValueError: If an argument is out of range, there are fewer than 2 examples, a target or an
            input does not fit the likelihood or is not finite, or a prediction is not a number.

    Example:
        >>> from pyro_bayes import BayesianModel
        >>> from pyro_bayes.likelihoods import Gaussian
        >>> bnn, x = BayesianModel(nn.Linear(3, 1), init_logvar=-4.0), torch.randn(50, 3)
        >>> y = bnn.base(x).detach() + 0.1 * torch.randn(50, 1)
        >>> evaluation = evaluate(bnn, Gaussian(0.1), [(x, y)])
        >>> list(evaluation)  # doctest: +ELLIPSIS
        ['nll', 'rmse', 'crps', 'pit_deviation', 'coverage@0.5', 'width@0.5', ...]
        >>> bool(evaluation["rmse"] < 0.5)
        True
    """
    require("torchmetrics", extra="metrics")
    check_type("likelihood", likelihood, Likelihood)
    check_count("bins", bins)
    levels = check_levels("levels", levels)
    if _repeats(levels):
        raise ValueError(f"Expected levels to be different numbers between 0 and 1; got {levels}.")
    draws = Draws(bnn, num_samples, chunk_size=chunk_size, generator=generator)
    views = Bootstrap(num_samples, replicates=_REPLICATES, seed=0)
    others: Records = {}
    with evaluating(bnn.base):
        pairs = draws.of_pairs(likelihood, loader)
        scored = (score(p, y, views, levels=levels, generator=draws.noise) for p, y in pairs)
        records = joined("loader", scored)
        if ood is not None:
            inputs = draws.of_inputs(likelihood, ood)
            others = joined("ood", (uncertainties(p, views) for p in inputs))
    count = records["log_prob"].shape[1]
    if count < 2:
        kind = " with a label" if "labelled" in records else ""
        raise ValueError(f"Expected loader to have at least 2 examples{kind}; got {count}.")
    table = _metrics(records, levels, bins)
    examples = dict.fromkeys(records, Bootstrap(count, replicates=_REPLICATES, seed=0))
    for name, record in others.items():
        records[f"ood {name}"] = record
        examples[f"ood {name}"] = Bootstrap(record.shape[1], replicates=_REPLICATES, seed=1000)
        table[f"auroc_{name}"] = Metric((name, f"ood {name}"), metrics.auroc)
    return Evaluation(
        [_row(name, metric, records, examples) for name, metric in table.items()],
        examples={name: record[0] for name, record in records.items() if "ood " not in name},
        ood={name: record[0] for name, record in others.items()},
        num_samples=num_samples,
    )


def _metrics(records: Records, levels: Sequence[float], bins: int) -> dict[str, Metric]:
    """Returns the metrics that records allow, by name, in the order of the table."""
    nll = Metric(("log_prob",), lambda log_prob: -log_prob.mean())
    if "predicted" in records:
        calibration = ("confidence", "correct")
        return {
            "nll": nll,
            "accuracy": Metric(("predicted", "y"), _accuracy),
            "brier": Metric(("brier",), torch.mean),
            "ece": Metric(calibration, partial(metrics.calibration_error, bins=bins)),
            "adaptive_ece": Metric(
                calibration, partial(metrics.adaptive_calibration_error, bins=bins)
            ),
        }
    table = {
        "nll": nll,
        "rmse": Metric(("mean", "y"), _root_mean_squared_error),
        "crps": Metric(("crps",), torch.mean),
        "pit_deviation": Metric(("pit",), metrics.pit_deviation),
    }
    for level in levels:
        table[f"coverage@{level:g}"] = Metric((f"in@{level:g}",), torch.mean)
        table[f"width@{level:g}"] = Metric((f"width@{level:g}",), torch.mean)
    return table


def _row(name: str, metric: Metric, records: Records, examples: Mapping[str, Bootstrap]) -> Row:
    """Computes a metric, and again from other draws and from other examples."""
    labelled = records["labelled"][0] if "labelled" in records else None

    def value(view: int, replicate: int) -> Tensor:
        columns = []
        for need in metric.needs:
            column = records[need][min(view, len(records[need]) - 1)]
            column = column[examples[need].indices(replicate)]
            if labelled is not None and column.shape == labelled.shape:
                column = column[labelled[examples[need].indices(replicate)]]
            column = column.flatten()
            columns.append(column if column.dtype == torch.long else column.double())
        return metric.compute(*columns).double()

    views = range(1 + _REPLICATES)
    by_draws = torch.stack([value(view, 0) for view in views])
    by_examples = torch.stack([value(0, replicate) for replicate in views])
    errors = Bootstrap.error(by_draws).item(), Bootstrap.error(by_examples).item()
    return Row(name, by_draws[0].item(), *errors)


def _accuracy(predicted: Tensor, y: Tensor) -> Tensor:
    from torchmetrics.functional.classification import multiclass_accuracy

    count = max(2, int(torch.maximum(predicted.max(), y.max())) + 1)
    return multiclass_accuracy(predicted, y, count, average="micro", validate_args=False)


def _root_mean_squared_error(mean: Tensor, y: Tensor) -> Tensor:
    from torchmetrics.functional.regression import mean_squared_error

    return mean_squared_error(mean, y, squared=False)


def _repeats(levels: Sequence[float]) -> bool:
    return len({f"{level:g}" for level in levels}) < len(levels)

"""One case per likelihood: outputs, targets, and what scipy says about them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn
from torch.distributions import Independent, Normal

from pyro_bayes import likelihoods
from pyro_bayes.likelihoods import Likelihood

SCALES = torch.tensor([0.3, 1.7], dtype=torch.double)


@dataclass(frozen=True)
class Case:
    """A likelihood with outputs of one tensor.

    Arguments:
        make: Makes the likelihood.
        width: The shape of one example's output.
        target: Draws targets of a shape.
        event: The shape of one example's target.
        exact: The frozen distribution of scipy of each element, given the output.
        output: What the base makes of the tensor.
        learned: The names of parameters that are learned.
    """

    make: Callable[[], Likelihood]
    width: tuple[int, ...]
    target: Callable[[tuple[int, ...]], Tensor]
    event: tuple[int, ...]
    exact: Callable[[np.ndarray], Any]
    output: Callable[[Tensor], Any] = lambda raw: raw
    learned: tuple[str, ...] = ()

    def raw(self, *batch: int) -> Tensor:
        return torch.randn(*batch, *self.width, dtype=torch.double)

    def y(self, *batch: int) -> Tensor:
        return self.target((*batch, *self.event))

    def log_prob(self, raw: Tensor, y: Tensor) -> Tensor:
        """The log-probability of each example by scipy."""
        exact = self.exact(raw.numpy())
        of = exact.logpdf if hasattr(exact.dist, "pdf") else exact.logpmf
        return (
            torch.from_numpy(of(y.numpy()))
            .reshape(*raw.shape[: -len(self.width) or None], -1)
            .sum(-1)
        )


class Base(nn.Module):
    """A linear map from three features to a case's outputs."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case
        self.linear = nn.Linear(3, int(np.prod(case.width)), dtype=torch.double)

    def forward(self, x: Tensor) -> Any:
        return self.case.output(self.linear(x).view(-1, *self.case.width))


def reals(shape):
    return torch.randn(shape, dtype=torch.double)


def counts(shape):
    return torch.randint(6, shape)


def normal(raw):
    mean, scale = np.split(raw, 2, -1)
    return stats.norm(mean, 1e-4 + np.log1p(np.exp(scale)))


class Classes:
    """A categorical distribution, which scipy has for one draw of several only."""

    dist = None

    def __init__(self, logits):
        self._log_probs = torch.from_numpy(logits).log_softmax(-1)

    def logpmf(self, y):
        return self._log_probs.gather(-1, torch.from_numpy(y)[..., None]).squeeze(-1).numpy()


def negative_binomial(raw, count):
    return stats.nbinom(count, count / (count + np.exp(raw)))


CASES = {
    "Gaussian": Case(
        lambda: likelihoods.Gaussian(0.3), (), reals, (), lambda f: stats.norm(f, 0.3)
    ),
    "Gaussian, learned per output": Case(
        lambda: likelihoods.Gaussian(SCALES, learn=True), (2,), reals, (2,),
        lambda f: stats.norm(f, SCALES.numpy()), learned=("log_scale",),
    ),
    "Gaussian, images": Case(
        lambda: likelihoods.Gaussian(0.7, learn=True), (2, 3), reals, (2, 3),
        lambda f: stats.norm(f, 0.7), learned=("log_scale",),
    ),
    "HeteroscedasticGaussian": Case(
        likelihoods.HeteroscedasticGaussian, (4,), reals, (2,), normal
    ),
    "HeteroscedasticGaussian, pair": Case(
        likelihoods.HeteroscedasticGaussian, (2,), reals, (),
        lambda f: stats.norm(f[..., 0], 1e-4 + np.log1p(np.exp(f[..., 1]))),
        output=lambda raw: (raw[..., 0], raw[..., 1]),
    ),
    "StudentT": Case(
        lambda: likelihoods.StudentT(0.6, df=3.5, learn=True), (), reals, (),
        lambda f: stats.t(3.5, f, 0.6), learned=("log_scale",),
    ),
    "StudentT, several": Case(
        lambda: likelihoods.StudentT(SCALES, df=5), (2,), reals, (2,),
        lambda f: stats.t(5, f, SCALES.numpy()),
    ),
    "Bernoulli": Case(
        likelihoods.Bernoulli, (), lambda s: torch.randint(2, s), (),
        lambda f: stats.bernoulli(1 / (1 + np.exp(-f))),
    ),
    "Bernoulli, several": Case(
        likelihoods.Bernoulli, (3,), lambda s: torch.rand(s) < 0.4, (3,),
        lambda f: stats.bernoulli(1 / (1 + np.exp(-f))),
    ),
    "Categorical": Case(
        likelihoods.Categorical, (4,), lambda s: torch.randint(4, s), (), Classes
    ),
    "Categorical, images": Case(
        likelihoods.Categorical, (2, 3, 4), lambda s: torch.randint(4, s), (2, 3), Classes
    ),
    "Poisson": Case(
        likelihoods.Poisson, (), counts, (), lambda f: stats.poisson(np.exp(f))
    ),
    "Poisson, several": Case(
        likelihoods.Poisson, (2,), counts, (2,), lambda f: stats.poisson(np.exp(f))
    ),
    "NegativeBinomial": Case(
        lambda: likelihoods.NegativeBinomial(2.5, learn=True), (), counts, (),
        lambda f: negative_binomial(f, 2.5), learned=("log_total_count",),
    ),
    "NegativeBinomial, several": Case(
        lambda: likelihoods.NegativeBinomial(10 * SCALES, learn=True), (2,), counts, (2,),
        lambda f: negative_binomial(f, 10 * SCALES.numpy()), learned=("log_total_count",),
    ),
    "Density": Case(
        likelihoods.Density, (2,), reals, (2,), lambda f: stats.norm(f, 0.4),
        output=lambda raw: Independent(Normal(raw, 0.4), 1),
    ),
    "Density, batch of elements": Case(
        likelihoods.Density, (2,), reals, (2,), lambda f: stats.norm(f, 0.4),
        output=lambda raw: Normal(raw, 0.4),
    ),
}  # fmt: skip

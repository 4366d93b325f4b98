"""Bayesian linear regression, whose mean-field optimum and ELBO have closed forms."""

import math
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_bayes import BayesianModel
from pyro_bayes.priors import Gaussian

NOISE_VAR = 0.25
PRIOR_VAR = 2.0


@dataclass
class Problem:
    """y = x·w + noise, in double precision."""

    x: Tensor
    y: Tensor
    prior_mean: Tensor
    prior_var: Tensor

    @classmethod
    def make(cls, n: int = 40, prior_mean=(0.0,) * 3, prior_var=(PRIOR_VAR,) * 3) -> "Problem":
        generator = torch.Generator().manual_seed(1)
        options = {"generator": generator, "dtype": torch.float64}
        x = torch.randn(n, 3, **options) @ torch.tensor(
            [[1.0, 0.4, 0.0], [0.0, 1.0, 0.3], [0.0, 0.0, 0.7]], dtype=torch.float64
        )
        w = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
        y = x @ w + math.sqrt(NOISE_VAR) * torch.randn(n, **options)
        return cls(x, y, *(torch.tensor(v, dtype=torch.float64) for v in (prior_mean, prior_var)))

    @property
    def precision(self) -> Tensor:
        return self.x.T @ self.x / NOISE_VAR + torch.diag(1 / self.prior_var)

    @property
    def mean(self) -> Tensor:
        """The mean of the exact posterior, and of the best mean-field one."""
        products = self.x.T @ self.y / NOISE_VAR + self.prior_mean / self.prior_var
        return torch.linalg.solve(self.precision, products)

    @property
    def variance(self) -> Tensor:
        """The variances of the best mean-field posterior."""
        return 1 / self.precision.diag()

    def elbo(self, mean: Tensor, variance: Tensor) -> Tensor:
        """The ELBO in closed form."""
        n = len(self.y)
        squares = (self.y - self.x @ mean).square().sum() + (self.x.square() @ variance).sum()
        likelihood = -0.5 * n * math.log(2 * math.pi * NOISE_VAR) - 0.5 * squares / NOISE_VAR
        ratio, squares = variance / self.prior_var, (mean - self.prior_mean).square()
        kl = 0.5 * (ratio + squares / self.prior_var - 1 - ratio.log()).sum()
        return likelihood - kl

    def model(self) -> BayesianModel:
        net = nn.Linear(3, 1, bias=False, dtype=torch.float64)
        if (self.prior_mean == 0).all() and (self.prior_var == PRIOR_VAR).all():
            return BayesianModel(net, init_logvar=-4.0, prior_var=PRIOR_VAR)
        prior = Gaussian(var=self.prior_var[None], mean=self.prior_mean[None])
        return BayesianModel(net, init_logvar=-4.0, prior=prior)

    def optimum(self) -> BayesianModel:
        bnn = self.model()
        with torch.no_grad():
            bnn.means.weight.copy_(self.mean)
            bnn.logvars.weight.copy_(self.variance.log())
        return bnn

    def loss(self, bnn: BayesianModel, *, local_trick: bool) -> Tensor:
        """The negative ELBO of one draw, through the facade."""
        with bnn.reparameterize(local_trick) as net:
            prediction = net(self.x).squeeze(-1)
        likelihood = torch.distributions.Normal(prediction, NOISE_VAR**0.5).log_prob(self.y).sum()
        return bnn.kl_divergence() - likelihood

    def pyro_model(self, bnn: BayesianModel):
        def model():
            with bnn.lift() as net:
                prediction = net(self.x).squeeze(-1)
            with pyro.plate("data", len(self.y)):
                pyro.sample("y", dist.Normal(prediction, NOISE_VAR**0.5), obs=self.y)

        return model

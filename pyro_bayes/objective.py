"""The objective: the evidence lower bound, for plain PyTorch and for Pyro."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import pyro
import torch
from torch import Tensor, nn

from pyro_bayes.likelihoods import Likelihood
from pyro_bayes.model import BayesianModel
from pyro_bayes.schedule import LinearWarmup


class Terms(NamedTuple):
    """The two terms of the negative ELBO per datum, 0-dim tensors in nats.

    Arguments:
        nll: The mean negative log-likelihood of an example.
        kl: The KL divergence divided by the size of the dataset, without a weight.
    """

    nll: Tensor
    kl: Tensor


class ELBO(nn.Module):
    r"""The negative evidence lower bound per datum.

    Arguments:
        bnn: The model.
        likelihood: The likelihood.
        num_data: The number :math:`N` of examples of the whole training set.
        local_trick: The estimator, as in :meth:`pyro_bayes.BayesianModel.reparameterize`.
        batch_dim: The dimension of inputs that counts examples.
        num_samples: The number of draws per evaluation.
        kl_weight: The weight of the divergence, a number or a schedule.
    """

    model: BayesianModel
    likelihood: Likelihood

    def __init__(
        self,
        bnn: BayesianModel,
        likelihood: Likelihood,
        num_data: int,
        *,
        local_trick: bool | Literal["flipout"] = False,
        batch_dim: int = 0,
        num_samples: int = 1,
        kl_weight: float | LinearWarmup = 1.0,
    ) -> None:
        super().__init__()
        self.model = bnn
        self.likelihood = likelihood
        self.num_data = num_data
        self.num_samples = num_samples
        self.local_trick: bool | Literal["flipout"] = local_trick
        self.batch_dim = batch_dim
        self.kl_weight = kl_weight

    @property
    def weight(self) -> float | Tensor:
        """The weight of the divergence at the present step."""
        return self.kl_weight.weight if isinstance(self.kl_weight, nn.Module) else self.kl_weight

    def step(self) -> None:
        """Advances the schedule of the weight, once per step of the optimiser."""
        if isinstance(self.kl_weight, nn.Module):
            self.kl_weight.step()

    def terms(self, x: Any, y: Tensor) -> Terms:
        """Computes the two terms."""
        args, kwargs = arguments(x)
        nlls = []
        for _ in range(self.num_samples):
            with self.model.reparameterize(self.local_trick, batch_dim=self.batch_dim) as net:
                nlls.append(-self.likelihood.log_prob(net(*args, **kwargs), y).mean())
        nll = torch.stack(nlls).mean()
        return Terms(nll, self.model.kl_divergence() / self.num_data)

    def forward(self, x: Any, y: Tensor) -> Tensor:
        """Computes the loss."""
        nll, kl = self.terms(x, y)
        return nll + self.weight * kl

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        for name in ("model", "likelihood") if recurse else ():
            stem = f"{prefix}.{name}" if prefix else name
            yield from getattr(self, name).named_parameters(stem, recurse, remove_duplicate)


def arguments(x: Any) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """Returns the positional and the keyword arguments of the base."""
    if isinstance(x, Mapping):
        return (), x
    return (x if type(x) is tuple else (x,)), {}


def svi_model(bnn: BayesianModel, likelihood: Likelihood, num_data: int) -> Callable[..., Tensor]:
    """Returns the Pyro model."""

    def model(x: Any, y: Tensor | None = None) -> Tensor:
        args, kwargs = arguments(x)
        with bnn.lift() as net:
            output = net(*args, **kwargs)
            size = len(output)
            with pyro.plate("data", num_data, subsample=torch.arange(size)):
                return likelihood.sample("y", output, y)

    return model

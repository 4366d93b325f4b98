"""The protocol of all likelihoods."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import pyro
import pyro.distributions as dist
import torch
from pyro.contrib.zuko import ZukoToPyro
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor, nn
from torch.distributions import Distribution, Independent

from pyro_bayes.base.checks import is_number
from pyro_bayes.base.state import where_double
from pyro_bayes.base.torch_private import tree_leaves
from pyro_bayes.likelihoods.predictive import Predictive
from pyro_bayes.likelihoods.targets import check_values, fit_target
from pyro_bayes.posterior.rounding import keeping_precision, wide
from pyro_bayes.prediction.predict import Predictor

if TYPE_CHECKING:
    from typing_extensions import Self


class Likelihood(nn.Module, ABC):
    r"""A likelihood :math:`p(y \mid f)`: what a network's output says about a target.

    It is one distribution per example, and never reduces over examples: the mean over a batch, the
    size of the dataset and the KL divergence are the business of :class:`pyro_bayes.ELBO`. What it
    learns of its own, as a scale of noise, are its parameters, without a prior.

    To write one, return a distribution from :meth:`distribution`. All else follows from it alone:
    :meth:`log_prob` and :meth:`sample` cannot be overridden, or :class:`pyro_bayes.ELBO`, SVI and
    predictions would mean different things. A distribution may have a `log_prob` of its own.
    :meth:`as_real` checks that an output is a tensor, and :meth:`per_example` makes one
    distribution per example. Let parameters be unconstrained.

    Example:
        >>> class Laplace(Likelihood):
        ...     def distribution(self, output, *, batch_dims=1):
        ...         output = self.as_real(output, batch_dims)
        ...         return self.per_example(dist.Laplace(output, 1.0), batch_dims)
        >>> Laplace().log_prob(torch.zeros(2, 3), torch.ones(2, 3)).shape
        torch.Size([2])
    """

    def __init__(self) -> None:
        """Makes the likelihood, whose class describes the arguments."""
        super().__init__()
        self.check_definition()

    def extra_repr(self) -> str:
        """Returns the numbers that the likelihood has, for its representation."""
        kinds = (self._buffers, ""), (self._parameters, " (learned)")
        named = ((n, v, note) for values, note in kinds for n, v in values.items())
        parts = []
        for name, value, note in named:
            if value is not None and name.startswith("log_"):
                number = value.detach().exp()
                shown = f"{number.item():.4g}" if number.numel() == 1 else f"{tuple(value.shape)}"
                parts.append(f"{name.removeprefix('log_')}={shown}{note}")
        return ", ".join(parts)

    def check_definition(self) -> None:
        """Raises a `TypeError` if anything but :meth:`distribution` says what is likely."""
        for name in ("log_prob", "sample"):
            own = name in vars(self) or getattr(type(self), name) is not getattr(Likelihood, name)
            if own:
                raise TypeError(
                    f"Expected {type(self).__name__} to define its densities by distribution()"
                    f" alone, which ELBO, SVI and predictions share; got a {name}() of its own,"
                    " which some of them would not ask. Return a distribution that has it: class"
                    " Mine(pyro.distributions.Normal) with a log_prob(), for example."
                )

    @abstractmethod
    def distribution(self, output: Any, *, batch_dims: int = 1) -> Distribution:
        r"""Returns the distribution of the targets.

        Arguments:
            output: The network's output, of shape :math:`(B, *)`.
            batch_dims: How many dimensions on the left of the output count examples and draws, 2
                for the outputs of several draws, of shape :math:`(S, B, *)`.

        Returns:
            A distribution of torch or Pyro, whose batch shape is exactly these dimensions,
            :math:`(B)` or :math:`(S, B)`.

        Raises:
            TypeError: If the output is not of tensors.
            ValueError: If its shape or dtype is not what it has to be.
        """

    def check(self, output: Any, y: Any) -> None:
        """Checks that an output and a target fit the likelihood and each other.

        Arguments:
            output: The network's output, of shape :math:`(B, *)`.
            y: The target, of shape :math:`(B, *)`.

        Raises:
            TypeError: If one of them is not of tensors.
            ValueError: If a shape, a dtype or a value is not what it has to be. Values are not
                looked at in a compiled function.
        """
        self._fit(output, y)

    def log_prob(self, output: Any, y: Tensor) -> Tensor:
        r"""Computes :math:`\log p(y_i \mid f_i)` of each example.

        Arguments:
            output: The network's output, of shape :math:`(B, *)`.
            y: The target, of shape :math:`(B, *)`.

        Returns:
            The log-densities or log-probabilities in nats, of shape :math:`(B)`, sums over each
            example's own dimensions, in single precision or more.

        Raises:
            TypeError: If an argument is not of tensors.
            ValueError: If a shape, a dtype or a value is not what it has to be, as in
                :meth:`Likelihood.check`.
        """
        distribution, y = self._fit(output, y)
        log_prob: Tensor = distribution.log_prob(y)
        self._check_log_prob(log_prob)
        return log_prob

    def sample(
        self, name: str, output: Any, y: Tensor | None = None, *, batch_dims: int = 1
    ) -> Tensor:
        """Makes the sample statement of the targets in a Pyro model, inside a plate of examples.

        Arguments:
            name: The name of the site.
            output: The network's output, of shape :math:`(B, *)`.
            y: The observed target, or `None` to draw it.
            batch_dims: As in :meth:`distribution`, 2 where Pyro vectorises over draws.

        Returns:
            The target.

        Raises:
            TypeError: If an argument is not of tensors.
            ValueError: If a shape, a dtype or a value is not what it has to be.

        Example:
            >>> from pyro_bayes.likelihoods import Poisson
            >>> def model(output, y=None):
            ...     with pyro.plate("data", len(output)):
            ...         return Poisson().sample("y", output, y)
            >>> model(torch.zeros(4)).shape
            torch.Size([4])
        """
        if y is None:
            distribution = self._of_examples(output, batch_dims)
        else:
            distribution, y = self._fit(output, y, batch_dims)
        if not _is_pyro(distribution):
            distribution = ZukoToPyro(distribution)
        value: Tensor = pyro.sample(name, distribution, obs=y)  # type: ignore[arg-type]
        return value

    def predictive(
        self,
        bnn: Predictor,
        x: Any,
        num_samples: int = 100,
        *,
        generator: torch.Generator | None = None,
        chunk_size: int | None = None,
    ) -> Predictive:
        r"""Computes the predictive distribution, an even mixture over draws from the posterior.

        It keeps the outputs of all draws, :math:`S` times the memory of one output.

        Arguments:
            bnn: The model. It is evaluated in the mode that it is in.
            x: The inputs, as in :meth:`pyro_bayes.BayesianModel.predict`.
            num_samples: The number :math:`S` of draws.
            generator: Where the seed of the draws comes from, torch's global generator by default.
            chunk_size: How many draws to evaluate at once; by default, as many as pay.

        Returns:
            The predictive distribution of the targets of `x`.

        Raises:
            TypeError: If `x` or an output is of the wrong type.
            ValueError: If an argument or an output is not what it has to be.

        Example:
            >>> from pyro_bayes import BayesianModel
            >>> from pyro_bayes.likelihoods import Categorical
            >>> bnn = BayesianModel(nn.Linear(3, 4))
            >>> Categorical().predictive(bnn, torch.randn(5, 3)).probs.shape
            torch.Size([5, 4])
        """
        output = bnn.predict(
            x, num_samples, statistics="samples", generator=generator, chunk_size=chunk_size
        ).samples
        with torch.no_grad():
            return Predictive(self._of_examples(output, batch_dims=2))

    def as_real(self, output: Any, batch_dims: int) -> Tensor:
        r"""Returns an output that must be one tensor of real numbers, in single precision or more.

        Arguments:
            output: The network's output.
            batch_dims: How many of its dimensions count examples and draws.

        Raises:
            TypeError: If it is not a tensor.
            ValueError: If it has another dtype, or too few dimensions.
        """
        if not isinstance(output, Tensor):
            fix = " Distributions are for Density()." if hasattr(output, "log_prob") else ""
            raise TypeError(
                f"Expected an output for {type(self).__name__} that is a tensor; got"
                f" {type(output).__name__}.{fix}"
            )
        if not output.is_floating_point() or output.dim() < batch_dims:
            raise ValueError(
                f"Expected an output for {type(self).__name__} of real numbers, with a dimension"
                f" for examples; got {output.dtype} and the shape {tuple(output.shape)}."
            )
        return output.to(torch.promote_types(output.dtype, torch.float32))

    def per_example(self, distribution: Distribution, batch_dims: int) -> Distribution:
        """Returns the joint distribution of each example, of independent elements.

        Arguments:
            distribution: The distribution of all elements.
            batch_dims: How many of its batch dimensions count examples and draws.
        """
        extra = len(distribution.batch_shape) - batch_dims
        if extra <= 0:
            return distribution
        wrapper = dist.Independent if _is_pyro(distribution) else Independent
        joint: Distribution = wrapper(distribution, extra, validate_args=False)
        return joint

    def _fit(self, output: Any, y: Any, batch_dims: int = 1) -> tuple[Distribution, Tensor]:
        """Returns the distribution, and the target as it takes it."""
        if isinstance(y, Tensor) and 0 in y.shape:
            raise ValueError(f"Expected y to have examples; got the shape {tuple(y.shape)}.")
        distribution = self._of_examples(output, batch_dims)
        return distribution, fit_target(y, distribution)

    def _of_examples(self, output: Any, batch_dims: int) -> Distribution:
        """Returns the distribution of the targets, after a look at the output."""
        distribution = self.distribution(output, batch_dims=batch_dims)
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor):
                check_values("the network's output", leaf, "finite real numbers")
        if len(distribution.batch_shape) != batch_dims:
            raise ValueError(
                f"Expected {type(self).__name__}.distribution() to have one batch dimension for"
                f" examples; got the batch shape {tuple(distribution.batch_shape)}. Return"
                " self.per_example(distribution, batch_dims)."
            )
        return distribution

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        for child in self.children() if recurse else ():
            child._apply(fn)
        # What is learned would stand still in half precision, as a posterior would.
        super()._apply(keeping_precision(fn), recurse=False)
        return self

    def _check_log_prob(self, log_prob: Tensor) -> None:
        """Checks log-densities, which are numbers where outputs, targets and scales are."""

    def _set_positive(self, name: str, value: float | Tensor, learn: bool) -> None:
        """Keeps the logarithm of a positive number, or of several, as a parameter or a buffer."""
        if not (is_number(value) or (isinstance(value, Tensor) and value.is_floating_point())):
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(
                f"Expected {name} to be a number or a tensor of real numbers; got {kind}."
            )
        if not isinstance(learn, bool):
            raise TypeError(f"Expected learn to be True or False; got {learn!r}.")
        given = (
            value.detach()
            if isinstance(value, Tensor)
            else torch.tensor(float(value), dtype=torch.double)
        )
        values = where_double(given).double()
        if not ((values > 0) & (values < math.inf)).all():
            raise ValueError(f"Expected {name} to be positive and finite; got {value}.")
        dtype = value.dtype if isinstance(value, Tensor) else torch.get_default_dtype()
        log = values.log().to(given.device, wide(dtype))
        if learn:
            self.register_parameter(f"log_{name}", nn.Parameter(log))
        else:
            self.register_buffer(f"log_{name}", log)

    def _get_positive(self, name: str, output: Tensor, batch_dims: int) -> Tensor:
        """Returns what :meth:`_set_positive` keeps, after a check that it fits an output."""
        log: Tensor = getattr(self, f"log_{name}")
        if log.dim() > 0 and log.shape != output.shape[batch_dims:]:
            raise ValueError(
                f"Expected {name} to be one number or of the shape of one example's output,"
                f" {tuple(output.shape[batch_dims:])}; got {tuple(log.shape)}."
            )
        return log.to(output).exp()


def _is_pyro(distribution: Distribution) -> bool:
    return isinstance(distribution, TorchDistributionMixin)
